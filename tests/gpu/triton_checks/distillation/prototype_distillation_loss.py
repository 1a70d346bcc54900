"""The losses of DINO and iBOT from features and prototypes, by Triton's kernel between PyTorch's products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastssl.kernels import distillation
from fastssl.kernels.common import logits
from fastssl.kernels.common.launch import DTYPES
from fastssl.reference.distillation import prototype_distillation_loss as reference
from tests.gpu.triton_checks.common.compile_gate import Case
from tests.gpu.triton_checks.common.numerics import DEVICE, assert_as_accurate, poisoned
from tests.gpu.triton_checks.distillation import distillation_loss

PRECISIONS = ["float32", "bfloat16", "float16"]
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    """Losses and gradients of float16 logits, which the kernel's own cases have in a sweep only."""
    for case in distillation_loss.cases(capability, sweep=True):
        if case.rows == "fp16" and case.variant in ("both-T1", "both-T2") and (sweep or capability == 90):
            yield case


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    """Several blocks of rows, the last of them smaller, in small matrices."""
    monkeypatch.setattr(logits, "WORKSPACE", 9000)


def _inputs(
    views: int, teachers: int, rows: int, dim: int, prototypes: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (views, rows, dim), (prototypes, dim), (teachers, rows, dim), (prototypes, dim)
    return [(dim**-0.25 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape in shapes]


def _eager(inputs: list[Tensor], center, weight: Tensor, *options, dtype: torch.dtype) -> dict[str, Tensor]:
    """As the paper writes it, summed over pairs of views."""
    x, w, y, v = (z.detach().to(dtype) for z in inputs)
    x, w = x.requires_grad_(), w.requires_grad_()
    student_temperature, teacher_temperature, unlike = options
    pairs = len(x) * len(y) - min(len(x), len(y)) if unlike else 1
    loss = reference(
        *((x, w, y, v) if unlike else (x[0], w, y[0], v)),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        center=center,
        reduction="none",
    )
    losses = loss.to(torch.promote_types(dtype, torch.float32)) * pairs
    total = (losses * weight).sum()
    dx, dw = torch.autograd.grad(total, (x, w))
    return {"losses": losses.detach(), "total": total.detach(), "dx": dx, "dw": dw}


def _ours(inputs: list[Tensor], center, weight: Tensor, *options, precision: str) -> dict[str, Tensor]:
    with poisoned():
        losses, *none = distillation.prototype_distillation_loss(*inputs, center, None, *options, False, precision)
        total, dx, dw = distillation.prototype_distillation_loss(*inputs, center, weight, *options, True, precision)
        backward = distillation.prototype_distillation_loss_backward
        again = backward(torch.full_like(total, 4.0), *inputs, center, weight, *options, precision)
        of_rows = backward(weight, *inputs, center, None, *options, precision)
    assert [x.shape for x in none] == [(0, *inputs[0].shape[1:]), (0, inputs[1].shape[1])]
    assert [x.dtype for x in (dx, dw, *none)] == [inputs[0].dtype, inputs[1].dtype] * 2
    for taken, times_four, other in zip((dx, dw), again, of_rows, strict=True):
        assert torch.equal(taken, other)
        if taken.dtype != torch.float16:  # whose smallest numbers have fewer digits
            assert torch.equal(times_four, 4 * taken)
    return {"losses": losses, "total": total, "dx": dx, "dw": dw}


def _check(inputs: list[Tensor], center, weight: Tensor, *options, precision: str) -> dict[str, Tensor]:
    ours = _ours(inputs, center, weight, *options, precision=precision)
    exact = _eager(inputs, center, weight, *options, dtype=torch.float64)
    theirs = _eager(inputs, center, weight, *options, dtype=DTYPES[precision])
    floor = {name: EPS[precision] * x.norm().item() + 1e-30 for name, x in exact.items()}
    assert_as_accurate(ours, exact, theirs, floor)
    return ours


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "views, teachers, rows, dim, prototypes", [(2, 1, 3, 1, 1), (4, 2, 5, 24, 65), (2, 3, 4, 7, 1500)]
)
def test_dino(views, teachers, rows, dim, prototypes, precision):
    inputs = _inputs(views, teachers, rows, dim, prototypes, DTYPES[precision])
    center = _inputs(1, 1, 1, prototypes, 1, torch.float32, seed=1)[0].flatten()
    weight = torch.linspace(0.5, 2, rows, device=DEVICE) / rows
    _check(inputs, center, weight, 0.1, 0.04, True, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ibot(precision):
    inputs = _inputs(1, 1, 19, 16, 90, DTYPES[precision])
    _check(inputs, None, torch.ones(19, device=DEVICE), 0.2, 0.07, False, precision=precision)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_float32_features_with_short_products(precision):
    _check(
        _inputs(2, 2, 6, 16, 90, torch.float32),
        None,
        torch.ones(6, device=DEVICE),
        0.2,
        0.07,
        True,
        precision=precision,
    )


def test_weights_that_float16_does_not_hold():
    """The mean over many rows makes them small; and their sums make them large."""
    inputs = _inputs(2, 2, 6, 16, 90, torch.float32)
    options, weight = (0.2, 0.07, True), torch.linspace(1, 2, 6, device=DEVICE)
    for size in (1e-20, 0.0, 1e6):
        ours = _ours(inputs, None, size * weight, *options, precision="float16")
        exact = _eager(inputs, None, size * weight, *options, dtype=torch.float64)
        for name in ("dx", "dw"):
            assert (ours[name] - exact[name]).norm() <= 1e-2 * exact[name].norm(), (name, size)


def test_strides():
    x, w, y, v = _inputs(3, 2, 9, 16, 90, torch.float32)
    center, weight = torch.linspace(-1, 1, 90, device=DEVICE), torch.ones(9, device=DEVICE)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1), w.T.contiguous().T, y, v.repeat(2, 1)[::2]]
    strided[3] = torch.stack([v, torch.full_like(v, float("nan"))], 1)[:, 0]
    centers = center, torch.stack([center, center], 1)[:, 0]
    expected, found = (
        _ours(inputs, c, weight, 0.2, 0.07, True, precision="float32")
        for inputs, c in (([x, w, y, v], centers[0]), (strided, centers[1]))
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(value):
    inputs = _inputs(2, 2, 5, 8, 30, torch.float32)
    inputs[0][0, 1, 3] = value
    inputs[2][1, 3, 2] = value
    ours = _ours_with_nan(inputs)
    assert ours["losses"].isnan().tolist() == [False, True, False, True, False]
    assert ours["dx"].isnan().flatten(2).any(2).nonzero().tolist() == [[0, 1], [0, 3]]


def _ours_with_nan(inputs: list[Tensor]) -> dict[str, Tensor]:
    weight, options = torch.ones(5, device=DEVICE), (0.2, 0.07, True, True, "float32")
    losses = distillation.prototype_distillation_loss(*inputs, None, None, *options[:3], False, "float32")[0]
    total, dx, dw = distillation.prototype_distillation_loss(*inputs, None, weight, *options)
    assert total.isnan() and dw.isnan().any()
    return {"losses": losses, "dx": dx}


def test_no_rows():
    inputs = _inputs(2, 1, 0, 8, 30, torch.bfloat16)
    ours = _ours(inputs, None, torch.ones(0, device=DEVICE), 0.1, 0.04, True, precision="bfloat16")
    assert ours["total"] == 0 and ours["dx"].shape == inputs[0].shape and not ours["dw"].any()


def test_blocks_fit_the_workspace():
    for rows, row_bytes in [(0, 10), (1, 10), (100, 90), (101, 90), (7, 9000), (7, 10**9)]:
        blocks = logits.row_blocks(rows, row_bytes)
        sizes = [block.stop - block.start for block in blocks]
        assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(rows))
        assert all(size == 1 or size * row_bytes <= logits.WORKSPACE for size in sizes)
        assert sizes == sorted(sizes, reverse=True)  # the first allocates the workspace


def test_same_bits_every_time():
    inputs = _inputs(2, 2, 9, 16, 90, torch.bfloat16), None, torch.ones(9, device=DEVICE), 0.1, 0.04, True
    first, second = (_ours(*inputs, precision="bfloat16") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
