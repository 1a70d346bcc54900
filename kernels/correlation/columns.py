"""Sums of columns over the rows, from which means, variances and the diagonal of C = A^T B follow:

    sum_n x_n,  sum_n x_n^2,  x = z - z[0], of each view,    sum_n x_a x_b  or  sum_n (z_a - z_b)^2.

Columns are summed in float64, in slots of rows, relative to their first row, so that a constant column becomes exactly
0. Each program reads a block of columns of one slot's rows, once; `moments` and `sum_rows` add the slots. Cost: O(N D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PROGRAMS

SLOTS = 32  # the most slots into which the rows of a sum are divided
BLOCK = {"BR": 16, "BD": 64}  # the tile of the kernels over columns
COUNTS = ["N", "M", "K", "slots", "splits", "view", "first_row", "first_column", "last_column"]  # see common/tiles.py


@triton.jit
def tile_at(BR: tl.constexpr, BD: tl.constexpr, block, start):
    """Rows (BR, 1) from `start` on and columns (1, BD) of a block."""
    rows = tl.cast(start, tl.int64) + tl.arange(0, BR)[:, None]
    return rows, tl.cast(block, tl.int64) * BD + tl.arange(0, BD)[None, :]


@triton.jit
def load(z, rows, columns, N, D, row_stride, column_stride):
    """A tile of z in float32, zero outside."""
    mask = (rows < N) & (columns < D)
    return tl.load(z + rows * row_stride + columns * column_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride):
    """A tile of A in float32, zero outside; `offset` is the mean minus the first row. Without `rstd`, only centred."""
    a = load(z, rows, columns, N, D, row_stride, column_stride)
    a -= load(z, rows * 0, columns, N, D, row_stride, column_stride)
    a -= tl.load(offset + columns, mask=columns < D, other=0.0)
    if rstd is not None:
        a *= tl.load(rstd + columns, mask=columns < D, other=0.0)
    return tl.where(rows < N, a, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def _statistics(
    z_a, z_b, sums, N, D, row_stride_a, column_stride_a, row_stride_b, column_stride_b,
    CROSS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Column sums over one slot of the rows: of x and x^2, x = z - z[0], of each view, and of a cross term.

    CROSS: "product", x_a x_b; "difference", (z_a - z_b)^2; None, where there is one view.
    """
    block, slot = tl.program_id(0), tl.program_id(1)
    slots = tl.num_programs(1)
    first, column = tile_at(BR, BD, block, 0)
    first *= 0
    a_0 = load(z_a, first, column, N, D, row_stride_a, column_stride_a).to(tl.float64)
    a_1 = tl.zeros((BR, BD), tl.float64)
    a_2 = tl.zeros((BR, BD), tl.float64)
    if CROSS is not None:
        b_0 = load(z_b, first, column, N, D, row_stride_b, column_stride_b).to(tl.float64)
        b_1 = tl.zeros((BR, BD), tl.float64)
        b_2 = tl.zeros((BR, BD), tl.float64)
        cross = tl.zeros((BR, BD), tl.float64)
    for start in range(slot * BR, N, slots * BR):
        rows, columns = tile_at(BR, BD, block, start)
        a = load(z_a, rows, columns, N, D, row_stride_a, column_stride_a).to(tl.float64)
        x = tl.where(rows < N, a - a_0, 0.0)
        a_1 += x
        a_2 += x * x
        if CROSS is not None:
            b = load(z_b, rows, columns, N, D, row_stride_b, column_stride_b).to(tl.float64)
            y = tl.where(rows < N, b - b_0, 0.0)
            b_1 += y
            b_2 += y * y
            if CROSS == "product":
                cross += x * y
            else:
                cross += (a - b) * (a - b)
    d = block * BD + tl.arange(0, BD)
    to = sums + slot.to(tl.int64) * D + d
    view = slots.to(tl.int64) * D
    tl.store(to, tl.sum(a_1, 0), mask=d < D)
    tl.store(to + view, tl.sum(a_2, 0), mask=d < D)
    if CROSS is not None:
        tl.store(to + 2 * view, tl.sum(b_1, 0), mask=d < D)
        tl.store(to + 3 * view, tl.sum(b_2, 0), mask=d < D)
        tl.store(to + 4 * view, tl.sum(cross, 0), mask=d < D)


@triton.jit
def sum_rows(sums, which, slots, d, D, SLOTS: tl.constexpr):
    """The `which`-th of the sums that a kernel has left in slots, added over the slots."""
    slot = tl.arange(0, SLOTS)[:, None]
    parts = sums + (slot + which * slots).to(tl.int64) * D + d[None, :]
    return tl.sum(tl.load(parts, mask=(slot < slots) & (d < D)[None, :], other=0.0), 0)


@triton.jit
def moments(sums, view, slots, d, N, D, SLOTS: tl.constexpr):
    """The sums over the rows of columns d: of z - z[0], and of squared deviations from the mean."""
    total = sum_rows(sums, 2 * view, slots, d, D, SLOTS)
    squares = sum_rows(sums, 2 * view + 1, slots, d, D, SLOTS)
    squares -= total * total / N
    return total, tl.where(squares < 0, 0.0, squares)


class Columns(NamedTuple):
    """The statistics of the columns of V views, as `_barlow_twins_columns` and `_vicreg_columns` compute them."""

    offset: Tensor  # (V, D), the mean minus the first row
    rstd: Tensor | None  # (V, D), for Barlow Twins
    slope: Tensor  # (V, D), the factor of the diagonal's part of the gradient
    terms: Tensor  # of the loss, summed over columns, float64
    scale: Tensor | None  # (V,), float64: the factor of the operands of products


def slots_for(rows: int, dim: int) -> int:
    """Into how many slots to divide the rows of a sum over columns."""
    return min(SLOTS, triton.cdiv(rows, 64), max(4 * PROGRAMS // triton.cdiv(dim, BLOCK["BD"]), 1))


def column_sums(views: Sequence[Tensor], cross: str | None) -> Tensor:
    """(2 or 5, slots, D): for each view the sums of x and x^2, then those of the cross term."""
    (rows, dim), slots = views[0].shape, slots_for(*views[0].shape)
    sums = views[0].new_empty((2 if cross is None else 5, slots, dim), dtype=torch.float64)
    first, last = views[0], views[-1]
    _statistics[(triton.cdiv(dim, BLOCK["BD"]), slots)](
        first, last, sums, rows, dim, *first.stride(), *last.stride(), CROSS=cross, **BLOCK, **OPTIONS
    )
    return sums
