"""Drawing from a linear layer's logits, by Triton's kernel after PyTorch's product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastssl.kernels import linear_categorical as kernels
from fastssl.kernels.common import logits
from fastssl.kernels.linear_categorical import BLOCK, WARPS, draw
from fastssl.ops.linear_categorical import _portable
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.numerics import DEVICE, poisoned

_POINTERS = {**dict.fromkeys(("logits", "bias", "scale"), "fp32"), **dict.fromkeys(("seed", "ids"), "i64")}
_KERNEL = Kernel(draw, _POINTERS)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    for variant, absent in {"bias": {}, "plain": {"bias": None}}.items():
        constants = {"BLOCK": BLOCK, **absent}
        yield Case(_KERNEL, variant, capability, "float32", "fp32", tuple(constants.items()), WARPS)


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    """Several blocks of rows, the last of them smaller."""
    monkeypatch.setattr(logits, "WORKSPACE", 20000)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows, dim, classes", [(3, 1, 1), (70, 24, 65), (5, 7, 2500)])
def test_the_classes_of_the_portable_code(rows, dim, classes, precision):
    source = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=source).to(DEVICE) for shape in ((rows, dim), (classes, dim), (classes,)))
    b[1::3] = float("-inf")
    for bias in (b[:0], b):
        for seed in (0, 1 << 61):
            arguments = torch.tensor(seed, device=DEVICE), x, w, bias, torch.tensor([0.7], device=DEVICE), precision
            with poisoned():
                found = kernels.linear_categorical(*arguments)
            assert torch.equal(found, _portable(*arguments))


def test_rows_without_a_distribution():
    x, w = torch.randn(6, 8, device=DEVICE), torch.randn(BLOCK + 40, 8, device=DEVICE)
    x[2, 3], bias = float("nan"), torch.full((len(w),), float("-inf"), device=DEVICE)

    def drawn(scale: float) -> list[int]:
        numbers = torch.tensor(1, device=DEVICE), x, w, bias, torch.tensor([scale], device=DEVICE)
        return kernels.linear_categorical(*numbers, "float32").tolist()

    assert drawn(1.0) == [-1] * 6
    bias[BLOCK + 7] = 0
    assert drawn(1.0) == [BLOCK + 7] * 2 + [-1] + [BLOCK + 7] * 3 and drawn(float("nan")) == [-1] * 6


def test_no_rows():
    one = torch.ones(1, device=DEVICE)
    x, w = torch.empty(0, 8, device=DEVICE), torch.ones(5, 8, device=DEVICE)
    assert kernels.linear_categorical(torch.tensor(1, device=DEVICE), x, w, one[:0], one, "bfloat16").shape == (0,)
