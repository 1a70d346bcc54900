"""`sum_rows` and `take_rows`, which no public function is called by, and losses of labels, which need them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import clip_loss
from fastssl.nn import SupConLoss
from fastssl.ops.row_sums import sum_rows, take_rows
from tests.devices import on_every_device
from tests.inputs import FLOATS
from tests.recorder import Recorder

IDS = torch.tensor([2, 0, 2, 2, 5, 0])


@on_every_device
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_values_and_derivatives(dtype, device, backend):
    """Sums are float32 or float64; what is derived of them, like the input."""
    ids = IDS.to(device)
    rows, x = (torch.randn(6, 4, device=device).to(dtype).requires_grad_() for _ in range(2))
    sums, taken = sum_rows(rows, ids, 7), take_rows(x, ids)
    wide = torch.promote_types(dtype, torch.float32)
    named = torch.nn.functional.one_hot(ids, 7).to(wide)
    assert (sums.dtype, taken.dtype) == (wide, dtype)
    torch.testing.assert_close(sums, named.T @ rows.to(wide))
    assert torch.equal(taken, x[ids])
    of_sums, of_taken = torch.randn_like(sums), torch.randn_like(taken)
    of_rows, of_x = torch.autograd.grad((sums, taken), (rows, x), (of_sums, of_taken))
    assert torch.equal(of_rows, of_sums[ids].to(dtype))
    torch.testing.assert_close(of_x, (named[:, :6].T @ of_taken.to(wide)).to(dtype))


def test_gradients_of_gradients(backend):
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for function in (lambda x: sum_rows(x, IDS, 7), lambda x: take_rows(x, IDS)):
        assert torch.autograd.gradcheck(function, rows)
        assert torch.autograd.gradgradcheck(function, rows)
        expected = torch.autograd.functional.jacobian(function, rows)
        torch.testing.assert_close(torch.func.jacrev(function, chunk_size=1)(rows), expected)


@on_every_device
@pytest.mark.parametrize("suffix", ["", "_portable"])
def test_opcheck(suffix, device):
    rows, ids = torch.randn(6, 3, device=device, requires_grad=True), IDS.to(device)
    for name, args in (("sum_rows", (rows, ids, 7)), ("take_rows", (rows, ids))):
        torch.library.opcheck(getattr(torch.ops.fastssl, name + suffix).default, args)


@on_every_device
def test_nothing(device):
    rows = torch.zeros(0, 3, device=device, requires_grad=True)
    sums = sum_rows(rows, IDS[:0].to(device), 2)
    assert torch.equal(sums, torch.zeros(2, 3, device=device))
    assert torch.autograd.grad(sums.sum(), rows)[0].shape == (0, 3)


def _with_labels(x: Tensor) -> Tensor:
    return clip_loss(x, x.flip(0), 5.0, labels=torch.arange(8) % 2)


def _first_views(x: Tensor) -> Tensor:
    return SupConLoss(contrast_mode="one")(x.view(4, 2, -1), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("loss", [_first_views, _with_labels])
@pytest.mark.parametrize("chosen", ["auto", "portable"])
def test_labels(loss, chosen):
    """Sums of rows of a label, and twice their derivatives, are these operations."""
    x = torch.randn(8, 6, requires_grad=True)
    with fastssl.use_backend(chosen):
        value = loss(x)
    with Recorder() as ran:
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)
    suffix = "_portable" if chosen == "portable" else ""
    assert {"sum_rows" + suffix, "take_rows" + suffix} <= ran
    assert not ran & ({"sum_rows", "take_rows"} if suffix else {"sum_rows_portable", "take_rows_portable"})
