"""What an operation's signatures say, and that all rooms say the same."""

from __future__ import annotations

import contextlib
import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import gather_tokens, masked_patch_loss, nt_xent, patch_embed, restore_tokens, scatter_tokens
from fastssl.ops._derivative import Derivative
from fastssl.ops._numbers import as_tensors
from fastssl.ops._op import triton_launcher
from tests.recorder import Recorder

FORWARD = "f(Tensor x, Tensor? y, bool b) -> (Tensor z, Tensor w)"


@pytest.mark.parametrize(
    "forward, backward, match",
    [
        (FORWARD, "f_backward(Tensor grad_v, Tensor x) -> Tensor grad_x", "grad_v must be grad_<name> of one of z, w"),
        (
            FORWARD,
            "f_backward(Tensor grad_z, Tensor x) -> Tensor grad_v",
            "grad_v must be grad_<name> of one of x, y, b",
        ),
        (FORWARD, "f_backward(Tensor grad_z, Tensor x) -> Tensor dx", "dx must be grad_<name>"),
        (FORWARD, "f_backward(Tensor grad_z, Tensor v) -> Tensor grad_x", "v must be size_<name> of one of x, y, b"),
        (FORWARD, "f_backward(Tensor grad_z, int[] size_z) -> Tensor grad_x", "size_z must be size_<name>"),
        (
            FORWARD,
            "f_backward(Tensor grad_z, bool needs_y) -> Tensor grad_x",
            "needs_y must be needs_<name> of one of x",
        ),
        ("f(Tensor x) -> Tensor x", "f_backward(Tensor grad_x) -> Tensor grad_x", "names that differ"),
    ],
)
def test_names_that_say_nothing_are_refused(forward, backward, match):
    with pytest.raises(ValueError, match=match):
        Derivative(forward, backward)


def test_the_backward_operation_returns_gradients_of_their_inputs_shapes():
    schema = "f_backward(Tensor grad_z, Tensor x, Tensor? y, bool needs_y) -> (Tensor grad_y, Tensor grad_x)"
    fake = Derivative(FORWARD, schema).fake
    x, y = torch.empty(2, 3, dtype=torch.float16), torch.empty(4, 5, dtype=torch.float64)
    for needs_y, rows in ((True, 4), (False, 0)):
        results = fake(torch.empty(3), x, y, needs_y)
        assert [(r.shape, r.dtype) for r in results] == [((rows, 5), torch.float64), ((2, 3), torch.float16)]
    single = Derivative(FORWARD, "f_backward(Tensor grad_z, Tensor x) -> Tensor grad_x").fake(torch.empty(3), x)
    assert single.shape == x.shape


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("family", ["contrastive", "correlation", "distillation", "sigmoid"])
def test_triton_launchers_take_the_arguments_of_their_operations(family):
    module, operations = import_module(f"fastssl.kernels.{family}"), 0
    for name, launcher in vars(module).items():
        if not name.startswith("_") and hasattr(torch.ops.fastssl, name) and inspect.isfunction(launcher):
            schema = getattr(torch.ops.fastssl, name).default._schema
            assert list(inspect.signature(launcher).parameters) == [argument.name for argument in schema.arguments], (
                name
            )
            operations += 1
    assert operations


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "name, args",
    [
        ("distillation_loss", ([torch.ones(2, 3, 4)], [torch.ones(1, 3, 4)], None, None, 1.0, 1.0, True, False)),
        ("column_sums", ([torch.ones(3, 4)],)),
        ("assignments", (torch.ones(3, 4), torch.ones(4), 1.0)),
    ],
)
def test_triton_launchers_leave_float64_to_the_portable_code(name, args):
    """Where no argument says the precision of products: the first one's dtype does."""
    numbers = [i for i, x in enumerate(args) if isinstance(x, float)]
    args = as_tensors([_double(x) for x in args], numbers)
    with Recorder() as ran:
        triton_launcher("distillation", name, numbers)(*args)
    assert ran == {f"{name}_portable"}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_launches_on_the_device_of_the_first_argument(monkeypatch):
    entered, x = [], torch.ones(3, 4)
    guard = contextlib.contextmanager(lambda tensor: (yield entered.append(tensor)))
    monkeypatch.setattr(torch.cuda, "device_of", guard)
    module = import_module("fastssl.kernels.distillation")
    monkeypatch.setattr(module, "column_sums", lambda logits: len(entered))
    assert triton_launcher("distillation", "column_sums")([x]) == 1
    assert entered[0] is x


def _double(x: Any) -> Any:
    return [y.double() for y in x] if isinstance(x, list) else x.double() if isinstance(x, Tensor) else x


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


IDS, RESTORE, MASK = torch.tensor([[2, 0]]), torch.tensor([[1, 2, 0]]), torch.tensor([[True, False, True, True]])
CALLS = {  # a function, its inputs, and what its first and second derivatives run
    "gather_tokens": (lambda x: gather_tokens(x, IDS), [(1, 3, 4)], {"gather_tokens", "scatter_tokens"}),
    "scatter_tokens": (
        lambda x, fill: scatter_tokens(x, IDS, 3, fill),
        [(1, 2, 4), (4,)],
        {"gather_tokens", "scatter_tokens"},
    ),
    "restore_tokens": (
        lambda x, token, pos: restore_tokens(x, RESTORE, token, pos),
        [(1, 2, 4), (4,), (3, 4)],
        {"restore_tokens", "restore_tokens_backward"},
    ),
    "patch_embed": (
        lambda x, weight: patch_embed(x, weight, None, IDS),
        [(1, 3, 4, 4), (5, 3, 2, 2)],
        {"gather_patches", "scatter_patches"},
    ),
    "masked_patch_loss": (
        lambda x: masked_patch_loss(x, torch.ones(1, 3, 4, 4), MASK, 2),
        [(1, 4, 12)],
        {"masked_patch_loss_backward"},
    ),
    "nt_xent": (nt_xent, [(4, 3), (4, 3)], {"nt_xent_backward"}),
}


@pytest.mark.parametrize("elsewhere", ["auto", "portable", "reference"])
@pytest.mark.parametrize("chosen", ["auto", "portable"])
@pytest.mark.parametrize("name", CALLS)
def test_what_ran_forward_runs_backward(name, chosen, elsewhere):
    """Twice, where `use_backend` has chosen something else since."""
    function, shapes, operations = CALLS[name]
    leaves = [_leaf(*shape) for shape in shapes]
    with fastssl.use_backend(chosen):
        output = function(*leaves)
    cotangent = torch.randn(output.shape, requires_grad=True)
    with fastssl.use_backend(elsewhere), Recorder() as ran:
        gradients = torch.autograd.grad(output, leaves, cotangent, create_graph=True)
        torch.autograd.grad(sum(g.sum() for g in gradients), [*leaves, cotangent], allow_unused=True)
    assert ran
    assert ran <= {f"{operation}_portable" if chosen == "portable" else operation for operation in operations}
