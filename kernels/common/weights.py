"""Weights W of similarities S = scale x y^T + bias, which `accumulate` multiplies. WEIGHT says how W comes from S:

    both      r_i exp(S_ij - s_i) + c_j exp(S_ij - t_j)    given factors r, c and shifts s, t of rows and columns
    column    c_j exp(S_ij - t_j)
    softmax   exp(S_ij - max_j S_ij)
    sigmoid   1 / (1 + exp(-S_ij))

Weights are divided by a power of two near the largest |factor|, and multiplied by `PEAK`, so that float16 holds small
ones; those of softmax and sigmoid, which have no factor, are relative to a maximum or a bound of it.

Exponentials take as long as tensor cores need for D = 128, so weights of both sides have one each, where the shifts lie
within `SPREAD` of each other: with m in the middle of them all,

    W_ij = (r_i exp(m - s_i) + c_j exp(m - t_j)) exp(S_ij - m).

`survey` chooses m, on the device, and multiplies the factors, for rows in registers; the kernel of wide rows has no
registers left for two ways. No S is larger than the shifts of its row and column, so nothing overflows; what is 2^-70
times its row's largest, and less, may become 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.tiles import COUNTS

SPREAD = tl.constexpr(40.0)  # 2^58: half of it on either side of m, and float32 ends 2^126 below 1
SURVEYED = 4096  # rows at a time


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
def exponentials(x, shift_i, factor_i, column_shift, column_factor, to_peak, common, j, N, WEIGHT: tl.constexpr):
    """A tile of W, "both" or "column", of S, in columns j. common: the shift that factors are relative to, or NaN."""
    shift_j, factor_j = load_factors(column_shift, column_factor, to_peak, j, N)
    if (WEIGHT == "both") & (common == common):
        w = (factor_i[:, None] + factor_j[None, :]) * tl.exp(x - common)
    else:
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


@triton.jit
def _extremes(shift, factor, count, largest, low, high, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        largest = tl.maximum(largest, tl.abs(tl.load(factor + i, mask=inside, other=0.0)))
        low = tl.minimum(low, tl.load(shift + i, mask=inside, other=float("inf")))
        high = tl.maximum(high, tl.load(shift + i, mask=inside, other=float("-inf")))
    return largest, low, high


@triton.jit
def _relate(shift, factor, relative, count, common, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < count
        of_row = tl.load(factor + i, mask=inside, other=0.0)
        if common == common:
            of_row *= tl.exp(common - tl.load(shift + i, mask=inside, other=0.0))
        tl.store(relative + i, of_row, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def survey(
    column_shift, column_factor, column_relative, row_shift, row_factor, row_relative, peak, N, M, BLOCK: tl.constexpr
):
    """peak[0]: the largest |factor|. If factors relative to a common shift are wanted, peak[1]: that shift, or NaN,
    where it cannot be, and factors are copied. In one program, as its two steps wait for one another."""
    largest = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    largest, low, high = _extremes(column_shift, column_factor, N, largest, low, -low, BLOCK)
    if row_shift is not None:
        largest, low, high = _extremes(row_shift, row_factor, M, largest, low, high, BLOCK)
    tl.store(peak, tl.max(largest, 0))
    if column_relative is not None:
        lowest = tl.min(low, 0)
        spread = tl.max(high, 0) - lowest
        common = tl.where(spread <= SPREAD, lowest + 0.5 * spread, float("nan"))
        tl.store(peak + 1, common)
        _relate(column_shift, column_factor, column_relative, N, common, BLOCK)
        if row_shift is not None:
            _relate(row_shift, row_factor, row_relative, M, common, BLOCK)


class Weights(NamedTuple):
    """W of M rows x and N rows y, neither of them 0, both as `pad` leaves them.

    sizes: M and N. scale and bias of S: 0-d. exclude_by: EXCLUDE in tiles.py; exclude: the column that a row leaves
    out, or the row that a column does. peak: what `survey` finds.
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

    def surveyed(self, relate: bool) -> Weights:
        """The same W, if it has factors with their `peak`. With `relate` those of both sides are relative to a common
        shift, if they can be."""
        if self.columns is None or self.peak is not None:
            return self
        sides = [self.columns] if self.rows is None or self.rows is self.columns else [self.columns, self.rows]
        relate &= self.weight == "both"
        relative = [torch.empty_like(side.factor) if relate else None for side in sides]
        peak = self.columns.factor.new_empty(2 if relate else 1)
        of_sides = [x for side, factor in zip(sides, relative, strict=True) for x in (*side, factor)]
        survey[(1,)](
            *of_sides, *[None] * (6 - len(of_sides)), peak, *self.sizes[::-1], BLOCK=SURVEYED, num_warps=16, **OPTIONS
        )
        if not relate:
            return self._replace(peak=peak)
        related = [side._replace(factor=factor) for side, factor in zip(sides, relative, strict=True)]
        return self._replace(rows=related[-1], columns=related[0], peak=peak)

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
