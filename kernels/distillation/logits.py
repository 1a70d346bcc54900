"""What the kernels over rows of logits share: loads, and a running sum of exponentials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4028234663852886e38)  # in place of minus infinity, whose differences would be NaN


@triton.jit
def load(logits, columns, K):
    return tl.load(logits + columns, mask=columns < K, other=float("-inf")).to(tl.float32)


@triton.jit
def load_centred(logits, center, columns, K):
    x = load(logits, columns, K)
    if center is not None:
        x -= tl.load(center + columns, mask=columns < K, other=0.0)
    return x


@triton.jit
def add_exponential(top, total, x, scale):
    """exp(scale x) more in the sum total exp(scale top), whose `top` is the largest x so far, or `LOWEST`.

    The larger of x and top is subtracted from the other, so that one exponential serves both.
    """
    e = tl.exp(-tl.abs(x - top) * scale)
    larger = x > top
    return tl.where(larger, x, top), tl.where(larger, total * e + 1, total + e)


@triton.jit
def unite(top, total, scale, AXIS: tl.constexpr):
    """Sums of exponentials as one, along an axis. It is NaN if infinity was among them: its difference to itself is."""
    highest = tl.max(top, AXIS)
    return highest, tl.sum(total * tl.exp((top - tl.expand_dims(highest, AXIS)) * scale), AXIS)


def inverse(temperature: float) -> float:
    """1 / temperature, which float32 holds; NaN where temperature is not positive."""
    return min(1 / temperature, torch.finfo(torch.float32).max) if temperature > 0 else float("nan")


def with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
