"""What holds for the sigmoid contrastive loss in particular."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastssl
from fastssl.functional import siglip_loss
from fastssl.reference import OPS, Sample
from tests.accuracy import (
    Results,
    assert_as_accurate_as_eager,
    evaluate,
    public,
    truth_and_eager,
    unreduced,
)
from tests.inputs import normal, unit

SIZES = (1, 3, 63, 64, 65, 127, 128, 129, 255, 257, 513)
DIMS = (1, 2, 15, 16, 17, 31, 33, 100, 130, 257, 768)
SPEC = OPS["siglip_loss"]


@functools.cache
def _ragged(rows: int, dim: int) -> tuple[Sample, tuple[Results, Results]]:
    scalars = (torch.tensor(value, requires_grad=True) for value in (10.0, -3.0))
    # Unit rows of one feature are 1 or -1, and a sum of equal terms is always rounded to the same side.
    leaves = [unit(rows, dim, seed=seed) if dim > 1 else normal(rows, dim, seed=seed) for seed in (0, 1)]
    leaves = (*(x.requires_grad_() for x in leaves), *scalars)
    sample = unreduced(SPEC, Sample("ragged", leaves))
    return sample, truth_and_eager(SPEC, sample)


@pytest.mark.parametrize("rows", [pytest.param(n, marks=[pytest.mark.unsanitized] * (n > 500)) for n in SIZES])
@pytest.mark.parametrize("name", ["siglip_loss"])
@pytest.mark.sanitized
def test_every_edge_of_a_tile(name, rows, kernels):
    for dim in DIMS:
        sample, yardstick = _ragged(rows, dim)
        assert_as_accurate_as_eager(SPEC, sample, evaluate(public(SPEC), sample), yardstick)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 80),
    dim=st.integers(1, 70),
    scale=st.floats(-20, 20),
    bias=st.floats(-20, 20),
    seed=st.integers(0, 2**30),
)
def test_is_a_binary_cross_entropy(batch, dim, scale, bias, seed):
    x, y = unit(batch, dim, seed=seed), unit(batch, dim, seed=seed + 1)
    expected = F.binary_cross_entropy_with_logits(scale * x @ y.T + bias, torch.eye(batch), reduction="sum")
    close = {"rtol": 1e-4, "atol": 1e-5 * batch}
    torch.testing.assert_close(siglip_loss(x, y, scale, bias, reduction="sum"), expected, **close)
    torch.testing.assert_close(siglip_loss(x, y, scale, bias), expected / batch, **close)
    torch.testing.assert_close(siglip_loss(y, x, scale, bias, reduction="sum"), expected, **close)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(siglip_loss(x[order], y[order], scale, bias, reduction="sum"), expected, **close)


@pytest.mark.parametrize("bias", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("name", ["siglip_loss"])
def test_decisions_that_are_certain(name, bias, kernels):
    """Sigmoids of 0 and 1: no overflow, and the gradients of a line."""
    x, y = unit(33, 8).requires_grad_(), unit(33, 8, seed=1).requires_grad_()
    loss = siglip_loss(x, y, 5.0, bias, reduction="sum")
    positive, negative = (33, 0) if bias < 0 else (0, 33 * 32)
    S = 5 * x.detach().double() @ y.detach().double().T + bias
    torch.testing.assert_close(loss.double(), ((S.sum() - S.trace()) * (negative > 0) - S.trace() * (positive > 0)))
    dx, dy = torch.autograd.grad(loss, (x, y))
    if bias < 0:
        torch.testing.assert_close((dx, dy), (-5 * y, -5 * x))
    else:
        torch.testing.assert_close((dx, dy), (5 * (y.sum(0) - y), 5 * (x.sum(0) - x)), rtol=1e-4, atol=1e-4)


def test_a_small_loss_keeps_its_digits(kernels):
    x = torch.eye(32).requires_grad_()
    loss = siglip_loss(x, x.detach(), 50.0, -25.0)  # every decision is wrong with a probability of exp(-25)
    torch.testing.assert_close(loss, torch.tensor(32 * -25.0).div(32).exp() * 32, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["", "_portable"])
@pytest.mark.parametrize("exclude", [None, torch.arange(9) - 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_rectangles(dtype, exclude, variant):
    """similarity_softplus, which a ring of processes runs on its own rows and another's."""
    x, y = unit(9, 8, dtype=dtype).requires_grad_(), unit(8, 5, seed=1, dtype=dtype).T.requires_grad_()
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = (torch.tensor(value, dtype=sums, requires_grad=True) for value in (10.0, -3.0))
    op = getattr(torch.ops.fastssl, f"similarity_softplus{variant}").default
    torch.library.opcheck(op, (x, y, *scalars, exclude, True, str(dtype).removeprefix("torch.")))


def test_the_value_is_the_same_without_gradients(backend):
    x, y = unit(70, 20), unit(70, 20, seed=1)
    value = siglip_loss(x, y, 10.0, -10.0)
    assert not value.requires_grad
    assert torch.equal(value, siglip_loss(x.requires_grad_(), y, 10.0, -10.0).detach())
    with torch.no_grad():
        assert torch.equal(value, siglip_loss(x, y, 10.0, -10.0))


def test_bias_is_zero_by_default(backend):
    x, y = unit(9, 8), unit(9, 8, seed=1)
    assert torch.equal(siglip_loss(x, y, 10.0), siglip_loss(x, y, 10.0, 0.0))


def test_mean_of_an_empty_batch_is_nan(backend):
    assert siglip_loss(torch.ones(0, 8), torch.ones(0, 8), 10.0).isnan()


def test_use_backend_reference_is_the_formula():
    x, y = unit(9, 8), unit(9, 8, seed=1)
    with fastssl.use_backend("reference"):
        assert torch.equal(siglip_loss(x, y, 10.0, -1.0), SPEC.reference(x, y, 10.0, -1.0))


def test_more_than_float32_holds_is_no_error(kernels):
    x, y = ((torch.randn(40, 8) * 1e19).requires_grad_() for _ in range(2))
    scale = torch.tensor(1.0, requires_grad=True)
    loss = siglip_loss(x, y, scale, -10.0)
    loss.backward()
    assert not loss.isfinite() and not scale.grad.isfinite()
