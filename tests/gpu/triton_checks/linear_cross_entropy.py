"""The cross-entropy of a linear layer, by Triton's kernel between PyTorch's products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastssl.kernels import linear_cross_entropy as kernels
from fastssl.kernels.common import logits
from fastssl.kernels.common.launch import DTYPES
from fastssl.kernels.linear_cross_entropy import BLOCK, WARPS, cross_entropy
from fastssl.ops.linear_cross_entropy import _backward, _forward
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.numerics import DEVICE, assert_as_accurate, poisoned

PRECISIONS = ["float32", "bfloat16", "float16"]
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_POINTERS = {
    **dict.fromkeys(("logits", "gradient"), "rows"),
    **dict.fromkeys(("bias", "uniform", "label_weight", "factor", "scales", "loss"), "fp32"),
    "label": "i64",
}
_KERNEL = Kernel(cross_entropy, _POINTERS, (), ("logits_row", "gradient_row"))
_ABSENT = {
    "plain": {"bias": None, "uniform": None},
    "all": {},
    "loss": {"gradient": None, "factor": None},
    "lse": {"label": None, "label_weight": None, "uniform": None},
}
NAMES = "dx", "dw", "db", "dscale"


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    for rows in ("fp32", "bf16", "fp16") if sweep else ("fp32", "bf16"):
        for variant, absent in _ABSENT.items() if sweep else list(_ABSENT.items())[:2]:
            constants = {"BLOCK": BLOCK, **absent}
            yield Case(_KERNEL, variant, capability, "float32", rows, tuple(constants.items()), WARPS)


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    """Several blocks of rows, the last of them smaller, in small matrices."""
    monkeypatch.setattr(logits, "WORKSPACE", 9000)


def _inputs(rows: int, dim: int, classes: int, dtype: torch.dtype, bias: bool = True) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=source) for shape in ((rows, dim), (classes, dim), (classes,)))
    labels = torch.randint(classes, (rows,), generator=source)
    labels[1::3] = -100
    tensors = x.to(dtype), (dim**-0.5 * w).to(dtype), b.to(dtype) if bias else b[:0].to(dtype), labels
    return [*(z.to(DEVICE) for z in tensors), torch.tensor([1.5], device=DEVICE)]


def _both(inputs: list[Tensor], class_weight, weight: Tensor, smoothing: float, normalize: bool, precision: str):
    """What the kernel finds; the portable code in float64; and the portable code."""
    found = []
    for functions, wide in (
        ((kernels.linear_cross_entropy, kernels.linear_cross_entropy_backward), False),
        ((_forward, _backward), True),
        ((_forward, _backward), False),
    ):
        forward, backward = functions
        tensors = [
            z.double() if wide and z is not None and z.is_floating_point() else z for z in (*inputs, class_weight)
        ]
        factor = weight.double() if wide else weight
        numbers, product = (smoothing, -100, normalize), "float64" if wide else precision
        with poisoned():
            losses, *none = forward(*tensors, None, *numbers, False, False, False, product)
            total, *gradients = forward(*tensors, factor, *numbers, True, True, True, product)
            again = backward(torch.full_like(total, 4.0), *tensors, factor, *numbers, True, True, True, product)
            of_rows = backward(factor, *tensors, None, *numbers, True, True, True, product)
            for of_x, of_w in ((True, False), (False, True)):
                _, *some = forward(*tensors, factor, *numbers, True, of_x, of_w, product)
                for z, whole, wanted in zip(some, gradients, (of_x, of_w, True, of_x), strict=True):
                    assert torch.equal(z, whole if wanted else whole[:0])
        assert not any(len(z) for z in none)
        for taken, times_four, other in zip(gradients, again, of_rows, strict=True):
            assert torch.equal(taken, other)
            torch.testing.assert_close(times_four, 4 * taken, rtol=1e-3, atol=1e-6)
        found.append({"losses": losses, "total": total, **dict(zip(NAMES, gradients, strict=True))})
    return found


def _check(inputs, class_weight=None, smoothing=0.0, normalize=False, precision="float32") -> None:
    weight = torch.linspace(0.5, 2, len(inputs[0]), device=DEVICE) / len(inputs[0])
    ours, exact, theirs = _both(inputs, class_weight, weight, smoothing, normalize, precision)
    # And a float32 sum of as many products as there are classes, in an order that is the library's own affair.
    eps = EPS[precision] + 2.0**-24 * len(inputs[1]) ** 0.5
    floor = {name: eps * z.norm().item() + 1e-6 for name, z in exact.items()}
    for name in NAMES if precision != "float32" else ():  # G is rounded, of which a sum may leave little
        floor[name] += EPS[precision] * exact["dx"].norm().item()
    assert_as_accurate(ours, exact, theirs, floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows, dim, classes", [(3, 1, 1), (7, 24, 65), (4, 7, 2500)])
def test_values(rows, dim, classes, precision):
    inputs = _inputs(rows, dim, classes, DTYPES[precision])
    class_weight = torch.linspace(0.5, 2, classes, device=DEVICE)
    _check(inputs, class_weight, 0.1, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain(precision):
    _check(_inputs(19, 16, 90, DTYPES[precision], bias=False), precision=precision)


def test_cosines():
    _check(_inputs(9, 16, 90, torch.float32), smoothing=0.2, normalize=True)


def test_log_sum_exps():
    inputs = _inputs(9, 16, 90, torch.float32)
    inputs[3] = None
    _check(inputs)


def test_confident_rows_keep_their_gradient():
    """1 - Q of a label is exact where Q rounds to 1."""
    x = 3 * torch.eye(32, device=DEVICE)
    nothing, one = torch.zeros(0, device=DEVICE), torch.ones(1, device=DEVICE)
    inputs = [x, x, nothing, torch.arange(32, device=DEVICE), one]
    ours, exact, _ = _both(inputs, None, torch.ones(32, device=DEVICE), 0.0, False, "bfloat16")
    torch.testing.assert_close(ours["dx"].double(), exact["dx"], rtol=1e-2, atol=0)


def test_rising_rows_rescale():
    """Every block of columns holds a new maximum; and the first holds nothing but minus infinity."""
    ramp = torch.linspace(-30, 30, 2 * BLOCK + 5, device=DEVICE)
    late = ramp.clone()
    late[: BLOCK + 7] = float("-inf")
    x, w = torch.ones(2, 1, device=DEVICE), torch.zeros(len(ramp), 1, device=DEVICE)
    labels = torch.tensor([len(ramp) - 1, BLOCK + 9], device=DEVICE)
    for bias, smoothing in ((ramp, 0.1), (late, 0.0)):
        _check([x, w, bias, labels, torch.ones(1, device=DEVICE)], smoothing=smoothing)


def test_nan_stays_in_its_row_and_ignored_rows_take_no_part():
    inputs = _inputs(6, 8, 30, torch.float32)
    inputs[0][1] = inputs[0][2, 3] = float("nan")  # row 1 has no label
    weight = torch.ones(6, device=DEVICE)
    arguments = *inputs, None, weight, 0.0, -100, False, True, True, True, "float32"
    losses, *_ = kernels.linear_cross_entropy(*arguments[:6], None, 0.0, -100, False, False, False, False, "float32")
    _, dx, *_ = kernels.linear_cross_entropy(*arguments)
    assert losses.isnan().tolist() == [False, False, True, False, False, False]
    assert dx.isnan().any(1).tolist() == losses.isnan().tolist() and not dx[1].any()


def test_no_rows():
    inputs = _inputs(0, 8, 30, torch.bfloat16)
    ours, *_ = _both(inputs, None, torch.ones(0, device=DEVICE), 0.1, False, "bfloat16")
    assert ours["total"] == 0 and ours["dx"].shape == (0, 8) and not ours["dw"].any()
