"""DINO's and iBOT's Triton kernel: values against the portable code in float64, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastssl.kernels import distillation
from fastssl.kernels.distillation.distillation_loss import BLOCK, WARPS, distill
from fastssl.ops.distillation.distillation_loss import _backward, _forward
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.numerics import DEVICE, assert_as_accurate, far_apart, poisoned

_POINTERS = {
    **dict.fromkeys(("student", "teacher", "gradient"), "rows"),
    **dict.fromkeys(("center", "weight", "loss"), "fp32"),
}
_KERNEL = Kernel(distill, _POINTERS, ("student_scale", "teacher_scale"), ("student_row", "teacher_row", "gradient_row"))
_ABSENT = {
    "both": {},
    "loss": {"gradient": None, "weight": None},
    "gradient": {"loss": None},
    "plain": {"center": None},
}


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    for rows in ("fp32", "bf16", "fp16") if sweep else ("fp32", "bf16"):
        for teachers in (1, 2, 3) if sweep else (2,):
            for variant, absent in _ABSENT.items() if sweep else list(_ABSENT.items())[:2]:
                sizes = {"T": teachers, "TEACHERS": 4 if teachers == 3 else teachers, "BLOCK": BLOCK}
                constants = {**sizes, **absent, "UNLIKE": teachers > 1}
                name = f"{variant}-T{teachers}"
                yield Case(_KERNEL, name, capability, "float32", rows, tuple(constants.items()), WARPS)


def _views(count: int, rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, rows, columns, generator=generator)).to(dtype).to(DEVICE)


def _both(student: list[Tensor], teacher: list[Tensor], center, weight, *options) -> tuple[dict, dict]:
    """Losses, and gradients of the weighted loss, of the kernel; and of the portable code in float64."""
    found = []
    for wide in (False, True):
        lists = [[x.double() for x in xs] if wide else xs for xs in (student, teacher)]
        c, w = (x if x is None or not wide else x.double() for x in (center, weight))
        forward, backward = (
            (_forward, _backward) if wide else (distillation.distillation_loss, distillation.distillation_loss_backward)
        )
        with poisoned():
            losses, none = forward(*lists, c, None, *options, False)
            total, gradients = forward(*lists, c, w, *options, True)
            again = backward(torch.ones_like(total) * 3, *lists, c, w, *options)
            of_rows = backward(w, *lists, c, None, *options)
        assert none == [] and losses.shape == student[0].shape[1:2] and total.shape == ()
        for x, y, z, s in zip(gradients, again, of_rows, student, strict=True):
            assert x.shape == s.shape and (wide or x.dtype == s.dtype)
            torch.testing.assert_close(3 * x.double(), y.double(), rtol=1e-2, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(x, z, equal_nan=True)
        found.append({"losses": losses, "total": total, **{f"grad{i}": x for i, x in enumerate(gradients)}})
    return found[0], found[1]


def _check(student, teacher, center, weight, *options) -> None:
    ours, exact = _both(student, teacher, center, weight, *options)
    eager = dict(zip(("total", "g"), _forward(student, teacher, center, weight, *options, True), strict=True))
    theirs = {f"grad{i}": x for i, x in enumerate(eager["g"])} | {"total": eager["total"]}
    theirs["losses"] = _forward(student, teacher, center, None, *options, False)[0]
    assert_as_accurate(ours, exact, theirs, {name: 1e-5 * x.norm().item() + 1e-9 for name, x in exact.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, pieces, teachers", [(1, [2], [3]), (17, [1, 1, 1], [1, 1]), (2500, [1, 2], [2])])
def test_dino(dtype, columns, pieces, teachers):
    student = [_views(n, 3, columns, i, dtype) for i, n in enumerate(pieces)]
    teacher = [_views(n, 3, columns, 10 + i, dtype) for i, n in enumerate(teachers)]
    center, weight = _views(1, 1, columns, 20)[0, 0], torch.tensor([0.5, 2.0, 0.25], device=DEVICE)
    _check(student, teacher, center, weight, 0.1, 0.04, True)


@pytest.mark.parametrize("center", [False, True])
def test_ibot(center):
    student, teacher = (_views(1, 7, 300, seed) for seed in (0, 1))
    center = _views(1, 1, 300, 2)[0, 0] if center else None
    _check([student], [teacher], center, torch.rand(7, device=DEVICE), 0.2, 0.07, False)


def test_strides_and_far_rows():
    student, teacher = (_views(1, 4, 40, seed)[0] for seed in (0, 1))
    center, weight = (torch.linspace(0.5, 2, n, device=DEVICE).repeat_interleave(2)[::2] for n in (40, 4))
    _check([student.T.contiguous().T[None]], [far_apart(teacher)[None]], center, weight, 0.1, 0.04, False)
    # No stride needs more than 32 bits, but the offset of the last view.
    teacher = far_apart(_views(3, 1, 40, 2).squeeze(1))[:, None]
    _check([student[None, :1]], [teacher], center, weight[:1], 0.1, 0.04, True)


def test_rising_rows_rescale():
    """Every block holds a new maximum, of the student as of the teacher; and the first holds nothing but -inf."""
    ramp = torch.linspace(-30, 30, 2 * BLOCK + 5, device=DEVICE)[None, None]
    weight = torch.ones(1, device=DEVICE)
    _check([ramp], [ramp.flip(-1) / 3], None, weight, 0.5, 0.1, False)
    _check([ramp], [ramp / 3], None, weight, 0.5, 0.1, False)
    late = ramp.clone()
    late[..., : BLOCK + 7] = float("-inf")
    _check([ramp], [late], None, weight, 0.5, 0.1, False)
    student = [late.clone()]
    ours, exact = _both(student, [ramp / 30], None, weight, 0.5, 0.1, False)
    assert ours["losses"].item() == exact["losses"].item() == float("inf")
    assert torch.allclose(ours["grad0"].double(), exact["grad0"], atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(value):
    student, teacher = _views(2, 4, 50, 0), _views(2, 4, 50, 1)
    student[0, 1, 3] = value
    teacher[1, 2, 3] = value
    weight = torch.ones(4, device=DEVICE)
    ours, exact = _both([student], [teacher], None, weight, 0.1, 0.04, True)
    assert ours["losses"].isnan().tolist() == exact["losses"].isnan().tolist() == [False, True, True, False]
    assert torch.equal(ours["grad0"].isnan(), exact["grad0"].isnan())


def test_same_bits_every_time():
    inputs = [_views(2, 5, 2000, 0)], [_views(2, 5, 2000, 1)], None, torch.rand(5, device=DEVICE), 0.1, 0.04, True
    first, second = _both(*inputs)[0], _both(*inputs)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_rows():
    student, teacher = _views(2, 0, 9, 0), _views(1, 0, 9, 1)
    total, gradients = distillation.distillation_loss(
        [student], [teacher], None, torch.ones(0, device=DEVICE), 0.1, 0.04, True, True
    )
    assert total == 0 and gradients[0].shape == (2, 0, 9)
