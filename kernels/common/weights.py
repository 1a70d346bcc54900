"""Weights W of similarities S = scale x y^T + bias, which `accumulate` multiplies. WEIGHT says how W comes from S:

    both      r_i exp(S_ij - s_i) + c_j exp(S_ij - t_j)    given factors r, c and shifts s, t of rows and columns
    column    c_j exp(S_ij - t_j)
    softmax   exp(S_ij - max_j S_ij)
    sigmoid   1 / (1 + exp(-S_ij))

Weights are divided by a power of two near the largest |factor|, and multiplied by `PEAK`, so that float16 holds small
ones; those of softmax and sigmoid, which have no factor, are relative to a maximum or a bound of it.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def power_of_two(x):
    """x >= 0 rounded down to a power of two, at least 2^-100; 1 for 0, infinity and NaN, which set no scale."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where((x == 0) | (exponent == 255), 127, tl.maximum(exponent, 27))
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_factors(shift, factor, to_peak, i, count):
    """(shift, factor times `to_peak`) of rows i; both are 0 outside."""
    inside = i < count
    scaled = tl.load(factor + i, mask=inside, other=0.0) * to_peak
    return tl.load(shift + i, mask=inside, other=0.0), scaled


@triton.jit
def exponentials(x, shift_i, factor_i, column_shift, column_factor, to_peak, j, N, WEIGHT: tl.constexpr):
    """A tile of W, "both" or "column", of S, in columns j."""
    shift_j, factor_j = load_factors(column_shift, column_factor, to_peak, j, N)
    w = factor_j[None, :] * tl.exp(x - shift_j[None, :])
    if WEIGHT == "both":
        w = factor_i[:, None] * tl.exp(x - shift_i[:, None]) + w
    return w


@triton.jit
def sigmoid_relative(x, shift):
    """1 / (1 + exp(-x)), divided by exp(shift)."""
    return tl.exp(tl.minimum(x, 0.0) - shift) / (1 + tl.exp(-tl.abs(x)))


class Factors(NamedTuple):
    """For each row of one side: its weights are factor exp(S - shift), or relative to exp(shift)."""

    shift: Tensor
    factor: Tensor | None


def largest(*factors: Tensor) -> Tensor:
    """The largest |factor|, on the device."""
    return reduce(torch.maximum, (torch.linalg.vector_norm(f, float("inf")) for f in factors))


class Weights(NamedTuple):
    """W of M rows x and N rows y, neither of them 0, both as `pad` leaves them.

    sizes: M and N. scale and bias of S: 0-d. exclude_by: EXCLUDE in tiles.py; exclude: the column that a row leaves
    out, or the row that a column does. peak: the largest |factor|, 0-d.
    """

    left: Tensor
    right: Tensor
    sizes: tuple[int, int]
    scale: Tensor
    precision: str
    weight: str
    exclude_by: str | None
    bias: Tensor | None = None
    exclude: Tensor | None = None
    rows: Factors | None = None
    columns: Factors | None = None
    peak: Tensor | None = None

    @property
    def symmetric(self) -> bool:
        return self.weight == "both" and self.left is self.right and self.rows is self.columns

    def exchanged(self) -> Weights:
        """W^T."""
        by = {"row": "column", "column": "row"}.get(self.exclude_by, self.exclude_by)
        return self._replace(
            left=self.right,
            right=self.left,
            sizes=self.sizes[::-1],
            exclude_by=by,
            rows=self.columns,
            columns=self.rows,
        )


class Sums(NamedTuple):
    """What `accumulate` leaves: G in splits, (splits, rows, columns), both padded; what its weights were divided by:
    a power of two near `peak`, or for softmax and sigmoid the exponentials of `top`, of each split and row, if there.
    total: for softmax the rows' sums of weights, by splits, divided likewise; for sigmoid sums of weights which add up
    to that of all. loss: likewise, of losses, for sigmoid."""

    weight: str
    gradient: Tensor | None
    peak: Tensor | None
    top: Tensor | None = None
    total: Tensor | None = None
    loss: Tensor | None = None
