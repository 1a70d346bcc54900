"""Barlow Twins and VICReg on the GPU: sums of squares of D x D matrices, and their gradients, without those matrices.

For N rows of D features let A be the centred columns of z (VICReg) or the standardised ones (Barlow Twins), of both
views A and B, and let

    C = A^T B / N        (Barlow Twins; D x D)         redundancy = sum_{i != j} C_ij^2
    C = A^T A / M        (VICReg, M = N - 1 or N)      covariance = sum_{i != j} C_ij^2 / D, of each view

fastssl/ops/correlation.py has the whole losses. With W = C but W_ii = 0 the gradients are

    Barlow Twins:  dA = 2 lambda / N B W^T,  dB = 2 lambda / N A W           VICReg:  dA = 4 nu / (D M) A W

and the derivative of the standardisation, r = 1 / sqrt(var + eps), turns g = dA into

    Barlow Twins:  dz = r (g - mean g - A sum_n(g A) / (N or N - 1))         VICReg:  dz = g - mean g

Algorithm
  1. `_statistics` sums, over slots of rows, what means, variances and the diagonal of C need; `_barlow_twins_columns`
     and `_vicreg_columns` make of it, for each column, those numbers, its part of the loss that has no product, and
     the factor of the gradient's diagonal part. `_standardise` writes A, rounded to the dtype of the products, once,
     padded with zeros to whole tiles.
  2. dual (where N is less than D): sum_ij (A^T B)_ij^2 = <G_a, G_b> with the N x N matrices G_a = A A^T, G_b = B B^T.
     `_multiply` makes the tiles on and below their diagonals, `_gram` the whole of them and their inner product, from
     which the squares of C's diagonal are subtracted. Backward: N B C^T = G_b A, less N C_ii B_ni.
  3. primal: C is made in panels of `PANEL` columns. `_weigh` sums a panel's squares and leaves W, from which two
     products add to the gradients. VICReg's C is symmetric: of its panels only what is on and below the diagonal
     block is made, and what lies below that counts twice.
  4. `_gradient_sums` and `_differentiate` apply the derivative of the standardisation, and add what has no product.

`_multiply` is every product. Where its tiles are too few to fill the GPU the contracted dimension is split between
programs, each with a slot of its own, which the next kernel sums.

Cost: dual, in units 2 N N D floating-point operations: for each view 1/2 forward, 1 backward. primal, in units
U = 2 N D D: Barlow Twins 3 U, VICReg 1.5 U for each view (and half a panel's width more); the losses alone 1 U and
0.5 U. No atomics: every word is written by one program, and a kernel of one configuration gives the same bits every
time. (Autotuning picks the configuration once per process; another may differ in the last bits.)

Memory: for each view N D elements of the products' dtype. dual: N N floats for each view, up to 2^22 in slots, and N D
for each view in the backward pass. primal: N D floats for each view, PANEL D (or up to 2^22) for a panel of C, and its
weights.

Numerics: columns are summed in float64, relative to their first row, so that a constant column is exactly 0. The
diagonals of C (primal) and of G (backward) stay out of rounded weights, and what is subtracted for the diagonal of C
(dual) is made of the same rounded operands as what it is subtracted from. TF32 is rounded to nearest beforehand, as
tensor cores would truncate, which adds up where all terms are positive. Squares are summed in
float32 in a tile, in float64 across tiles. Weights and Gram matrices are held at 2^13 times their size relative to
their largest possible entry, so that float16 holds small ones; for float16 so are VICReg's columns, relative to the
largest deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._tiles import (
    DTYPES,
    OPTIONS,
    PEAK,
    PROGRAMS,
    ROWS,
    autotune,
    configs,
    input_precision,
    span,
    suits_units,
)

PANEL = 1024  # columns of C at a time, a multiple of ROWS
SLOTS = 32  # of rows in sums over columns, at most
BLOCK = {"BR": 16, "BD": 64}  # tile of the kernels over columns
TILE = 32  # of the kernels over a product's tiles

COUNTS = ["N", "M", "K", "slots", "splits", "view", "first_row", "first_column", "last_column"]  # see _tiles.py


def multiply_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    if not suits_units(c, named):
        return None
    layout, tile = named["LAYOUT"], (c["BM"], c["BN"], c["BK"])
    spilled = False  # by the assembler: the tests compile every configuration
    if capability // 10 == 9:
        spilled = size == 4 and (layout, tile) == ("TN", (128, 64, 64))
    if capability // 10 == 10:
        spilled = (layout, tile) == ("TN", (128, 64, 16))
    if capability // 10 == 12:
        spilled = (layout, tile) == ("NT", (64, 64, 64))
        spilled |= size == 2 and layout == "NN" and tile in ((128, 128, 32), (64, 64, 64))
    return None if spilled else c["stages"] * (c["BM"] + c["BN"]) * c["BK"] * size


@triton.jit
def _tile(BR: tl.constexpr, BD: tl.constexpr, block, start):
    """Rows (BR, 1) from `start` on and columns (1, BD) of a block."""
    rows = tl.cast(start, tl.int64) + tl.arange(0, BR)[:, None]
    return rows, tl.cast(block, tl.int64) * BD + tl.arange(0, BD)[None, :]


@triton.jit
def _load(z, rows, columns, N, D, row_stride, column_stride):
    """A tile of z in float32, zero outside."""
    mask = (rows < N) & (columns < D)
    return tl.load(z + rows * row_stride + columns * column_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride):
    """A tile of A in float32, zero outside; `offset` is the mean less the first row. Without `rstd`, centred only."""
    a = _load(z, rows, columns, N, D, row_stride, column_stride)
    a -= _load(z, rows * 0, columns, N, D, row_stride, column_stride)
    a -= tl.load(offset + columns, mask=columns < D, other=0.0)
    if rstd is not None:
        a *= tl.load(rstd + columns, mask=columns < D, other=0.0)
    return tl.where(rows < N, a, 0.0)


@triton.jit
def _rounded(x, dtype: tl.constexpr, TF32: tl.constexpr):
    """x in the dtype of products; to TF32's nearest, as tensor cores would truncate."""
    if TF32:
        bits = (x.to(tl.int32, bitcast=True) + 4096) & -8192
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


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
    first, column = _tile(BR, BD, block, 0)
    first *= 0
    a_0 = _load(z_a, first, column, N, D, row_stride_a, column_stride_a).to(tl.float64)
    a_1 = tl.zeros((BR, BD), tl.float64)
    a_2 = tl.zeros((BR, BD), tl.float64)
    if CROSS is not None:
        b_0 = _load(z_b, first, column, N, D, row_stride_b, column_stride_b).to(tl.float64)
        b_1 = tl.zeros((BR, BD), tl.float64)
        b_2 = tl.zeros((BR, BD), tl.float64)
        cross = tl.zeros((BR, BD), tl.float64)
    for start in range(slot * BR, N, slots * BR):
        rows, columns = _tile(BR, BD, block, start)
        a = _load(z_a, rows, columns, N, D, row_stride_a, column_stride_a).to(tl.float64)
        x = tl.where(rows < N, a - a_0, 0.0)
        a_1 += x
        a_2 += x * x
        if CROSS is not None:
            b = _load(z_b, rows, columns, N, D, row_stride_b, column_stride_b).to(tl.float64)
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
def _sum_rows(sums, which, slots, d, D, SLOTS: tl.constexpr):
    """The `which`-th of the sums that a kernel left in slots."""
    slot = tl.arange(0, SLOTS)[:, None]
    parts = sums + (slot + which * slots).to(tl.int64) * D + d[None, :]
    return tl.sum(tl.load(parts, mask=(slot < slots) & (d < D)[None, :], other=0.0), 0)


@triton.jit
def _moments(sums, view, slots, d, N, D, SLOTS: tl.constexpr):
    """The sums over the rows of columns d: of z - z[0], and of squared deviations from the mean."""
    total = _sum_rows(sums, 2 * view, slots, d, D, SLOTS)
    squares = _sum_rows(sums, 2 * view + 1, slots, d, D, SLOTS)
    squares -= total * total / N
    return total, tl.where(squares < 0, 0.0, squares)


@triton.jit(do_not_specialize=COUNTS)
def _barlow_twins_columns(
    sums, offset, rstd, slope, terms, slots, N, D, M, eps, pull, SLOTS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """offset and rstd (2, D), terms (C_ii - 1)^2 (D), and, for the gradient, slope pull (C_ii - 1) (D)."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total_a, squares_a = _moments(sums, 0, slots, d, N, D, SLOTS)
    total_b, squares_b = _moments(sums, 1, slots, d, N, D, SLOTS)
    rstd_a = 1 / tl.sqrt(squares_a / M + eps)
    rstd_b = 1 / tl.sqrt(squares_b / M + eps)
    cross = _sum_rows(sums, 4, slots, d, D, SLOTS) - total_a * total_b / N
    c = cross * rstd_a * rstd_b / N
    tl.store(offset + d, (total_a / N).to(tl.float32), mask=d < D)
    tl.store(offset + D + d, (total_b / N).to(tl.float32), mask=d < D)
    tl.store(rstd + d, rstd_a.to(tl.float32), mask=d < D)
    tl.store(rstd + D + d, rstd_b.to(tl.float32), mask=d < D)
    tl.store(terms + d, (c - 1) * (c - 1), mask=d < D)
    tl.store(slope + d, (pull * (c - 1)).to(tl.float32), mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def _vicreg_columns(
    sums, offset, slope, terms, view, slots, N, D, M, eps, pull,
    CROSS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of a view: offset (D), terms relu(1 - std), var and (z_a - z_b)^2 (3, D), and, for the gradient,
    slope - pull [std < 1] / std (D)."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total, squares = _moments(sums, view, slots, d, N, D, SLOTS)
    variance = squares / M
    std = tl.sqrt(variance + eps)
    tl.store(offset + d, (total / N).to(tl.float32), mask=d < D)
    tl.store(terms + d, tl.where(std >= 1, 0.0, 1 - std), mask=d < D)
    tl.store(terms + D + d, variance, mask=d < D)
    if CROSS is not None:
        tl.store(terms + 2 * D + d, _sum_rows(sums, 4, slots, d, D, SLOTS), mask=d < D)
    tl.store(slope + d, tl.where(std >= 1, 0.0, -pull / std).to(tl.float32), mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def _standardise(
    z, offset, rstd, scale, out, N, D, row_stride, column_stride, padded,
    TF32: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write A (times `scale`), rounded to out's dtype and padded with zeros."""
    rows, columns = _tile(BR, BD, tl.program_id(1), tl.program_id(0) * BR)
    a = _centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride)
    if scale is not None:
        a *= tl.load(scale).to(tl.float32)
    tl.store(out + rows * padded + columns, _rounded(a, out.dtype.element_ty, TF32))


# Tuning repeats a call, which must not add to `out` then: the first one of a layout and precision, for the first panel,
# never does.
@autotune(
    multiply_needs,
    ["splits", "LAYOUT", "PRECISION"],  # splits: a power of two that falls as tiles grow in number
    configs(
        ({"BM": 128, "BN": 128, "BK": 64}, 8, 3),
        ({"BM": 128, "BN": 128, "BK": 32}, 8, 3),
        ({"BM": 128, "BN": 64, "BK": 64}, 4, 3),
        ({"BM": 64, "BN": 64, "BK": 64}, 4, 3),
        ({"BM": 128, "BN": 64, "BK": 16}, 8, 2),
        ({"BM": 64, "BN": 64, "BK": 16}, 8, 2),
    ),
)
@triton.jit(do_not_specialize=COUNTS)
def _multiply(
    left, right, out, rows, columns, K, splits, left_view, left_stride, right_view, right_stride,
    out_view, out_slot, out_stride, LAYOUT: tl.constexpr, LOWER: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of left right ("NN"), left right^T ("NT") or left^T right ("TN"), over one split of the K.

    LOWER leaves out the tiles above the diagonal; ADD adds to `out`.
    """
    pid, view = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split = pid % splits
    row_blocks, column_blocks = rows // BM, columns // BN
    row, column = tl.swizzle2d(
        pid // splits // column_blocks, pid // splits % column_blocks, row_blocks, column_blocks, 8
    )
    row, column = row * BM, column * BN
    if (not LOWER) | (column < row + BM):
        start, stop = span(split, splits, K)
        i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
        left += view * left_view
        right += view * right_view
        if LAYOUT == "TN":
            x_at = left + tl.cast(start, tl.int64) * left_stride + row + (k[:, None] * left_stride + i[None, :])
            x_step = BK * left_stride
        else:
            x_at = left + tl.cast(row, tl.int64) * left_stride + start + (i[:, None] * left_stride + k[None, :])
            x_step = BK
        if LAYOUT == "NT":
            y_at = right + tl.cast(column, tl.int64) * right_stride + start + (j[:, None] * right_stride + k[None, :])
            y_step = BK
        else:
            y_at = right + tl.cast(start, tl.int64) * right_stride + column + (k[:, None] * right_stride + j[None, :])
            y_step = BK * right_stride
        acc = tl.zeros((BM, BN), tl.float32)
        for _ in range(start, stop, BK):
            x, y = tl.load(x_at), tl.load(y_at)
            if LAYOUT == "TN":
                x = tl.trans(x)
            if LAYOUT == "NT":
                y = tl.trans(y)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
            x_at += x_step
            y_at += y_step
        to = out + view * out_view + split.to(tl.int64) * out_slot + tl.cast(row, tl.int64) * out_stride + column
        to += i[:, None] * out_stride + j[None, :]
        if ADD:
            acc += tl.load(to)
        tl.store(to, acc)


@triton.jit
def _sum_slots(products, slots, slot_stride):
    """The sum of a tile over the slots that `_multiply` left."""
    total = tl.load(products)
    for _ in range(1, slots):
        products += slot_stride
        total += tl.load(products)
    return total


@triton.jit
def _store_symmetric(gram, tile, row, column, N, T: tl.constexpr):
    """Store a tile of G and its transpose."""
    rows, columns = _tile(T, T, column // T, row)
    tl.store(gram + rows * N + columns, tile, mask=(rows < N) & (columns < N))
    rows, columns = _tile(T, T, row // T, column)
    tl.store(gram + rows * N + columns, tl.trans(tile), mask=(rows < N) & (columns < N))


@triton.jit(do_not_specialize=COUNTS)
def _gram(products_a, products_b, scale, gram_a, gram_b, inner, N, slot_stride, padded, slots, T: tl.constexpr):
    """From the lower tiles of A A^T: G, symmetric, and a tile's part of <G_a, G_b>, or <G_a, G_a> where b is None."""
    pid = tl.program_id(0)
    blocks = padded // T
    row, column = pid // blocks * T, pid % blocks * T
    if row >= column:
        rows, columns = _tile(T, T, column // T, row)
        g_a = _sum_slots(products_a + rows * padded + columns, slots, slot_stride)
        if scale is not None:
            factor = tl.load(scale)
            g_a *= (1 / (factor * factor)).to(tl.float32)
        g_b = g_a
        if products_b is not None:
            g_b = _sum_slots(products_b + rows * padded + columns, slots, slot_stride)
        total = tl.sum(tl.sum(g_a * g_b, 1), 0)
        tl.store(inner + pid, tl.where(row > column, 2 * total, total))
        if gram_a is not None:
            _store_symmetric(gram_a, g_a, row, column, N, T)
            if gram_b is not None:
                _store_symmetric(gram_b, g_b, row, column, N, T)
    else:
        tl.store(inner + pid, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def _diagonal(left, right, scale, dots, K, stride, BR: tl.constexpr, BD: tl.constexpr):
    """The diagonal of A^T B, of the operands as they are, over one slot of the rows."""
    block, slot = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(slot * BR, K, tl.num_programs(1) * BR):
        rows, columns = _tile(BR, BD, block, start)
        x = tl.load(left + rows * stride + columns).to(tl.float32)
        total += x * tl.load(right + rows * stride + columns).to(tl.float32)
    dot = tl.sum(total, 0)
    if scale is not None:
        factor = tl.load(scale)
        dot *= (1 / (factor * factor)).to(tl.float32)
    tl.store(dots + slot.to(tl.int64) * stride + block * BD + tl.arange(0, BD), dot)


@triton.jit(do_not_specialize=COUNTS)
def _weigh(
    products, scale, weights, squares, view_stride, slot_stride, stride, slots, first_row, first_column, last_column,
    reciprocal, SYMMETRIC: tl.constexpr, TF32: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """From a tile of a panel of C: W, and the sum of its squares. `reciprocal` is that of the number of rows.

    SYMMETRIC: the rows from `last_column` on stand for their transposes too.
    """
    pid, view = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = stride // T
    row, column = pid // blocks * T, pid % blocks * T
    rows, columns = _tile(T, T, column // T, row)
    c = _sum_slots(products + view * view_stride + rows * stride + columns, slots, slot_stride) * reciprocal
    c = tl.where(rows + first_row != columns + first_column, c, 0.0)
    if weights is not None:
        # There is one slot of weights, and as many elements in it.
        to = weights + (view * tl.num_programs(0) * T * T + rows * stride + columns)
        tl.store(to, _rounded(c * PEAK, weights.dtype.element_ty, TF32))
    if scale is not None:
        factor = tl.load(scale + view)
        c *= (1 / (factor * factor)).to(tl.float32)
    total = tl.sum(tl.sum(c * c, 1), 0)
    if SYMMETRIC:
        total = tl.where(row + first_row >= last_column, 2 * total, total)
    tl.store(squares + view * tl.num_programs(0) + pid, total)


@triton.jit(do_not_specialize=COUNTS)
def _round_gram(gram, peak, out, N, padded, TF32: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Write G without its diagonal, scaled to `PEAK`, in out's dtype, padded with zeros."""
    rows, columns = _tile(BR, BD, tl.program_id(1), tl.program_id(0) * BR)
    mask = (rows < N) & (columns < N) & (rows != columns)
    g = tl.load(gram + rows * N + columns, mask=mask, other=0.0) * (PEAK / tl.load(peak))
    tl.store(out + rows * padded + columns, _rounded(g, out.dtype.element_ty, TF32))


@triton.jit
def _gradient(
    y, slope, product, weight, gram, gram_weight, operand, other_operand, scale, dots, rows, columns, N, D, padded
):
    """A tile of dL/dA: the diagonal's part, the product's, and of a product with `_round_gram`'s matrix what that
    left out and what it should not contain, G_nn A_ni - N C_ii B_ni."""
    g = tl.load(slope + columns, mask=columns < D, other=0.0) * y
    if product is not None:
        g += tl.load(product + rows * padded + columns) * tl.load(weight).to(tl.float32)
    if gram is not None:
        x = tl.load(gram + rows * (N + 1), mask=rows < N, other=0.0)
        x *= tl.load(operand + rows * padded + columns).to(tl.float32)
        x -= tl.load(dots + columns) * tl.load(other_operand + rows * padded + columns).to(tl.float32)
        x *= gram_weight
        if scale is not None:
            x *= (1 / tl.load(scale)).to(tl.float32)
        g += x
    return g


@triton.jit(do_not_specialize=COUNTS)
def _gradient_sums(
    z, other, offset, rstd, other_offset, other_rstd, slope, product, weight, gram, gram_weight,
    operand, other_operand, scale, dots, sums, N, D,
    row_stride, column_stride, other_row_stride, other_column_stride, padded, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Column sums over one slot of the rows: of g = dL/dA, and of g A where the columns were divided by deviations."""
    block, slot = tl.program_id(0), tl.program_id(1)
    slots = tl.num_programs(1)
    g_1 = tl.zeros((BR, BD), tl.float32)
    g_a = tl.zeros((BR, BD), tl.float32)
    for start in range(slot * BR, N, slots * BR):
        rows, columns = _tile(BR, BD, block, start)
        a = _centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride)
        y = a
        if rstd is not None:
            y = _centred(other, other_offset, other_rstd, rows, columns, N, D, other_row_stride, other_column_stride)
        g = _gradient(
            y, slope, product, weight, gram, gram_weight, operand, other_operand, scale, dots,
            rows, columns, N, D, padded,
        )  # fmt: skip
        g_1 += g
        g_a += g * a
    d = block * BD + tl.arange(0, BD)
    to = sums + slot.to(tl.int64) * D + d
    tl.store(to, tl.sum(g_1, 0).to(tl.float64), mask=d < D)
    if rstd is not None:
        tl.store(to + slots.to(tl.int64) * D, tl.sum(g_a, 0).to(tl.float64), mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def _differentiate(
    z, other, offset, rstd, other_offset, other_rstd, slope, product, weight, gram, gram_weight,
    operand, other_operand, scale, dots, sums, grad_loss, out, N, D,
    row_stride, column_stride, other_row_stride, other_column_stride, padded, slots, M, apart,
    SLOTS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dL/dz from dL/dA and its sums. Without `rstd` the views are pulled together too: apart (z - other) is added."""
    block = tl.program_id(1)
    rows, columns = _tile(BR, BD, block, tl.program_id(0) * BR)
    d = block * BD + tl.arange(0, BD)
    a = _centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride)
    y = a
    if rstd is not None:
        y = _centred(other, other_offset, other_rstd, rows, columns, N, D, other_row_stride, other_column_stride)
    g = _gradient(
        y, slope, product, weight, gram, gram_weight, operand, other_operand, scale, dots, rows, columns, N, D, padded
    )
    g -= (_sum_rows(sums, 0, slots, d, D, SLOTS) / N).to(tl.float32)[None, :]
    if rstd is not None:
        g -= a * (_sum_rows(sums, 1, slots, d, D, SLOTS) / M).to(tl.float32)[None, :]
        g *= tl.load(rstd + columns, mask=columns < D, other=0.0)
    elif other is not None:
        x = _load(z, rows, columns, N, D, row_stride, column_stride)
        g += apart * (x - _load(other, rows, columns, N, D, other_row_stride, other_column_stride))
    if grad_loss is not None:
        g *= tl.load(grad_loss).to(tl.float32)
    tl.store(out + rows * D + columns, g.to(out.dtype.element_ty), mask=(rows < N) & (columns < D))


class _Columns(NamedTuple):
    """Of the columns of the views (V of them): what `_barlow_twins_columns` and `_vicreg_columns` leave."""

    offset: Tensor  # (V, D), the mean less the first row
    rstd: Tensor | None  # (V, D), Barlow Twins
    slope: Tensor  # (V, D)
    terms: Tensor  # summed over columns, float64
    scale: Tensor | None  # (V,), float64: by what the operands of products were multiplied


def _slots(rows: int, dim: int) -> int:
    """Into how many slots to divide the rows of a sum over columns."""
    return min(SLOTS, triton.cdiv(rows, 64), max(4 * PROGRAMS // triton.cdiv(dim, BLOCK["BD"]), 1))


def _column_sums(views: Sequence[Tensor], cross: str | None) -> Tensor:
    """(2 or 5, slots, D): of each view, of x and x^2; and the cross term."""
    (rows, dim), slots = views[0].shape, _slots(*views[0].shape)
    sums = views[0].new_empty((2 if cross is None else 5, slots, dim), dtype=torch.float64)
    first, last = views[0], views[-1]
    _statistics[(triton.cdiv(dim, BLOCK["BD"]), slots)](
        first, last, sums, rows, dim, *first.stride(), *last.stride(), CROSS=cross, **BLOCK, **OPTIONS
    )
    return sums


def _barlow_twins_statistics(views: Sequence[Tensor], M: int, eps: float, pull: float) -> _Columns:
    sums, (rows, dim) = _column_sums(views, "product"), views[0].shape
    offset, rstd = (sums.new_empty((2, dim), dtype=torch.float32) for _ in range(2))
    slope, terms = offset.new_empty(dim), sums.new_empty(dim)
    width = BLOCK["BD"]
    _barlow_twins_columns[(triton.cdiv(dim, width),)](
        sums, offset, rstd, slope, terms, sums.shape[1], rows, dim, M, eps, pull,
        SLOTS=SLOTS, BD=width, **OPTIONS,
    )  # fmt: skip
    return _Columns(offset, rstd, slope.expand(2, -1), terms.sum(), None)


def _vicreg_statistics(views: Sequence[Tensor], M: int, eps: float, pull: float, precision: str) -> _Columns:
    """The terms are (V, 3): of relu(1 - std), var, and (z_a - z_b)^2 where there are two views."""
    cross = None if len(views) == 1 else "difference"
    sums, (rows, dim) = _column_sums(views, cross), views[0].shape
    offset, slope = (sums.new_empty((len(views), dim), dtype=torch.float32) for _ in range(2))
    terms = sums.new_zeros((len(views), 3, dim))
    width = BLOCK["BD"]
    for view in range(len(views)):
        _vicreg_columns[(triton.cdiv(dim, width),)](
            sums, offset[view], slope[view], terms[view], view, sums.shape[1], rows, dim, M, eps, pull,
            CROSS=cross, SLOTS=SLOTS, BD=width, **OPTIONS,
        )  # fmt: skip
    scale = 1 / _power_of_two(terms[:, 1].amax(1).sqrt()) if precision == "float16" else None
    return _Columns(offset, None, slope, terms.sum(2), scale)


def _power_of_two(x: Tensor) -> Tensor:
    """A power of two from x to 2 x; 1 for 0."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent)


def _operands(views: Sequence[Tensor], columns: _Columns, precision: str) -> Tensor:
    """A of each view in the dtype of products: (V, N, D), N and D padded with zeros to multiples of `ROWS`."""
    rows, dim = views[0].shape
    padded_rows, padded = (triton.cdiv(size, ROWS) * ROWS for size in (rows, dim))
    out = views[0].new_empty((len(views), padded_rows, padded), dtype=DTYPES[precision])
    for view, z in enumerate(views):
        rstd, scale = (None if x is None else x[view] for x in (columns.rstd, columns.scale))
        _standardise[(padded_rows // BLOCK["BR"], padded // BLOCK["BD"])](
            z, columns.offset[view], rstd, scale, out[view], rows, dim, *z.stride(), padded,
            TF32=precision == "tf32", **BLOCK, **OPTIONS,
        )  # fmt: skip
    return out


def _product(
    left: Tensor,
    right: Tensor,
    layout: str,
    precision: str,
    out: Tensor | None = None,
    lower: bool = False,
    add: bool = False,
) -> Tensor:
    """`_multiply` of batches of matrices whose sizes are multiples of `ROWS`.

    Args:
        left: (V, M, K), or (V, K, M) for "TN".
        right: (V, K, N), or (V, N, K) for "NT".
        layout: "NN", "NT" or "TN".
        precision: of products.
        out: (V, M, N), float32; None for a new (V, slots, M, N).
        lower: whether only tiles on and below the diagonal are wanted.
        add: whether to add to `out`.
    """
    inner, rows = left.shape[1:] if layout == "TN" else left.shape[:0:-1]
    columns = right.shape[1] if layout == "NT" else right.shape[2]
    views, splits = left.shape[0], 1
    if out is None:
        tiles = views * (rows // ROWS) * (columns // ROWS)
        wanted = min(inner // ROWS // 2, PROGRAMS // (tiles // 2 + 1 if lower else tiles))
        splits = 1 << max(wanted.bit_length() - 1, 0)
        out = left.new_empty((views, splits, rows, columns), dtype=torch.float32)
    slot_stride = out.stride(1) if out.dim() == 4 else 0

    def grid(meta: dict) -> tuple[int, int]:
        return (rows // meta["BM"]) * (columns // meta["BN"]) * splits, views

    _multiply[grid](
        left, right, out, rows, columns, inner, splits, *left.stride()[:2], *right.stride()[:2],
        out.stride(0), slot_stride, out.stride(-2),
        LAYOUT=layout, LOWER=lower, ADD=add, PRECISION=input_precision(precision), **OPTIONS,
    )  # fmt: skip
    return out


def _diagonals(operands: Tensor, scale: Tensor | None, cross: bool) -> Tensor:
    """The diagonal of A^T B, (1, D), or of A^T A of each view, (V, D), of padded operands."""
    (views, padded_rows, padded), slots = operands.shape, _slots(*operands.shape[1:])
    dots = operands.new_empty((1 if cross else views, slots, padded), dtype=torch.float32)
    for view, dot in enumerate(dots):
        _diagonal[(padded // BLOCK["BD"], slots)](
            operands[view], operands[-1 if cross else view], None if scale is None else scale[view], dot, padded_rows,
            padded, **BLOCK, **OPTIONS,
        )  # fmt: skip
    return dots.sum(1)


def _dual(
    operands: Tensor, scale: Tensor | None, rows: int, cross: bool, derive: bool, precision: str
) -> tuple[Tensor, list[Tensor]]:
    """The sum of squares off the diagonal of A^T B, (1,), or of A^T A of each view, (V,), in float64; and the Gram
    matrices, (N, N), none without `derive`."""
    products = _product(operands, operands, "NT", precision, lower=True)
    views, slots, padded, _ = products.shape
    grams = [products.new_empty((rows, rows)) if derive else None for _ in range(views)]
    inner = products.new_empty((1 if cross else views, (padded // TILE) ** 2))
    for view in range(len(inner)):
        others = (products[1], grams[1]) if cross else (None, None)
        _gram[(inner.shape[1],)](
            products[view], others[0], None if scale is None else scale[view], grams[view], others[1], inner[view],
            rows, products.stride(1), padded, slots, T=TILE, **OPTIONS,
        )  # fmt: skip
    diagonal = _diagonals(operands, scale, cross).double().square().sum(1)
    squares = (inner.sum(1, dtype=torch.float64) - diagonal).clamp_min(0)
    return squares, [g if derive else products.new_empty((0, rows)) for g in grams]


class _Products(NamedTuple):
    """What `_gradient` makes of products: weight product, and if dual gram_weight (G_nn A_ni - N C_ii B_ni)."""

    product: Sequence[Tensor]  # of each view, (N, D), padded
    weight: Tensor  # (V,)
    grams: Sequence[Tensor | None] = (None, None)  # of each view, (N, N)
    gram_weight: float = 0.0
    operands: Sequence[Tensor | None] = (None, None)  # A of each view
    others: Sequence[Tensor | None] = (None, None)  # B
    dots: Sequence[Tensor | None] = (None, None)  # N C_ii, (D), padded


def _dual_products(
    operands: Tensor, scale: Tensor | None, grams: Sequence[Tensor], cross: bool, weight: float, precision: str
) -> _Products:
    """weight G A, G of `grams` and A of `operands`, in two parts: G without its diagonal, rounded, and the rest."""
    grams = [gram.contiguous() for gram in grams]
    peak = _power_of_two(torch.stack([g.diagonal().amax() for g in grams]))
    padded, rows = operands.shape[1], grams[0].shape[0]
    weights = operands.new_empty((len(grams), padded, padded))
    for view, gram in enumerate(grams):
        _round_gram[(padded // BLOCK["BR"], padded // BLOCK["BD"])](
            gram, peak[view], weights[view], rows, padded, TF32=precision == "tf32", **BLOCK, **OPTIONS
        )
    products = operands.new_empty(operands.shape, dtype=torch.float32)
    unit = peak.double() * (weight / PEAK.value)
    return _Products(
        _product(weights, operands, "NN", precision, products),
        unit if scale is None else unit / scale,
        grams,
        weight,
        operands,
        operands.flip(0) if cross else operands,
        _diagonals(operands, scale, cross).expand(len(grams), -1),
    )


def _primal(
    left: Tensor, right: Tensor, scale: Tensor | None, count: int, derive: bool, precision: str
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Sums of squares of C = left^T right / count off its diagonal, (V,), float64; right W^T and left W, of V each.

    Where left is right, C is symmetric, and the two are one.
    """
    symmetric = left is right
    (views, _, padded), squares, of_left, of_right = left.shape, [], None, None
    if derive:
        of_left = left.new_empty(left.shape, dtype=torch.float32)
        of_right = of_left if symmetric else torch.empty_like(of_left)
    for start in range(0, padded, PANEL):
        stop = min(start + PANEL, padded)
        first, below = (start, stop) if symmetric else (0, 0)
        x, y = left[:, :, first:], right[:, :, start:stop]
        products = _product(x, y, "TN", precision)
        _, slots, rows, width = products.shape
        weights = left.new_empty((views, rows, width)) if derive else None
        squares.append(products.new_empty((views, (rows // TILE) * (width // TILE))))
        _weigh[(squares[-1].shape[1], views)](
            products, scale, weights, squares[-1], *products.stride()[:2], width, slots, first, start, stop, 1 / count,
            SYMMETRIC=symmetric, TF32=precision == "tf32", T=TILE, **OPTIONS,
        )  # fmt: skip
        if derive:
            _product(x, weights, "NN", precision, of_right[:, :, start:stop], add=symmetric and start > 0)
            if below < padded:
                _product(y, weights[:, below - first :], "NT", precision, of_left[:, :, below:], add=start > 0)
    gradients = (of_left, of_right) if derive else None
    return torch.cat(squares, 1).sum(1, dtype=torch.float64), gradients


def _derivatives(
    views: Sequence[Tensor],
    columns: _Columns,
    products: _Products | None,
    M: int,
    apart: float,
    grad_loss: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """dL/dz of each view in `dtype`.

    Args:
        views: z.
        columns: of the views.
        products: if the loss has any.
        M: N, or N - 1 where variances are unbiased.
        apart: the derivative of VICReg's invariance is `apart` (z - other).
        grad_loss: what to multiply by.
        dtype: of the result.
    """
    rows, dim = views[0].shape
    slots, blocks = _slots(rows, dim), triton.cdiv(dim, BLOCK["BD"])
    sums = columns.terms.new_empty((2, slots, dim))
    gradients = []
    for view, z in enumerate(views):
        other = views[-1 - view]
        statistics = columns.offset[view], None, None, None
        if columns.rstd is not None:
            statistics = columns.offset[view], columns.rstd[view], columns.offset[1 - view], columns.rstd[1 - view]
        multiplied, padded = (None,) * 8, 0
        if products is not None:
            multiplied = (
                products.product[view], products.weight[view], products.grams[view], products.gram_weight,
                products.operands[view], products.others[view], None if columns.scale is None else columns.scale[view],
                products.dots[view],
            )  # fmt: skip
            padded = products.product[view].shape[1]
        shared = z, other if len(views) == 2 else None, *statistics, columns.slope[view], *multiplied, sums
        sizes = rows, dim, *z.stride(), *other.stride(), padded
        out = z.new_empty((rows, dim), dtype=dtype)
        _gradient_sums[(blocks, slots)](*shared, *sizes, **BLOCK, **OPTIONS)
        _differentiate[(triton.cdiv(rows, BLOCK["BR"]), blocks)](
            *shared, grad_loss, out, *sizes, slots, M, apart, SLOTS=SLOTS, **BLOCK, **OPTIONS
        )
        gradients.append(out)
    return gradients


def _no_sums(views: Sequence[Tensor], dual: bool, derive: bool) -> list[Tensor]:
    """What a forward pass keeps where its loss has no product, or where no gradient is wanted."""
    rows, dim = views[0].shape
    shape = (rows if derive else 0, rows if dual else dim)
    return [z.new_zeros(shape, dtype=torch.float32) for z in views]


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    invariance_param: float,
    lambda_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, invariance, redundancy, kept_a, kept_b) of `fastssl::barlow_twins` for CUDA tensors; see
    fastssl/ops/correlation.py."""
    views, rows = (z_a, z_b), z_a.shape[0]
    M = rows - unbiased
    with torch.cuda.device_of(z_a):
        columns = _barlow_twins_statistics(views, M, eps, 2 * invariance_param / rows)
        invariance, kept, products = columns.terms, None, None
        redundancy = torch.zeros_like(invariance)
        if lambda_param:
            operands = _operands(views, columns, precision)
            if dual:
                squares, kept = _dual(operands, None, rows, True, derive, precision)
                redundancy = squares[0] / rows**2
            else:
                squares, gradients = _primal(*operands.split(1), None, rows, derive, precision)
                redundancy = squares[0]
                if derive:
                    weight = redundancy.new_full((2,), 2 * lambda_param / rows / PEAK.value)
                    products = _Products([gradient[0] for gradient in gradients], weight)
        if derive and not dual:
            kept = _derivatives(views, columns, products, M, 0.0, None, torch.float32)
        loss = invariance_param * invariance + lambda_param * redundancy
        return *(x.to(torch.float32) for x in (loss, invariance, redundancy)), *(kept or _no_sums(views, dual, derive))


def barlow_twins_backward(
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    kept_a: Tensor,
    kept_b: Tensor,
    invariance_param: float,
    lambda_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(dz_a, dz_b) of `fastssl::barlow_twins_backward` for CUDA tensors; see fastssl/ops/correlation.py."""
    if not dual:
        return (grad_loss * kept_a).to(z_a.dtype), (grad_loss * kept_b).to(z_b.dtype)
    views, rows = (z_a, z_b), z_a.shape[0]
    M = rows - unbiased
    with torch.cuda.device_of(z_a):
        columns = _barlow_twins_statistics(views, M, eps, 2 * invariance_param / rows)
        products = None
        if lambda_param:
            operands = _operands(views, columns, precision)
            products = _dual_products(operands, None, (kept_b, kept_a), True, 2 * lambda_param / rows**2, precision)
        return tuple(_derivatives(views, columns, products, M, 0.0, grad_loss, z_a.dtype))


def _vicreg(
    views: Sequence[Tensor],
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    """(loss, mean squared difference of two views, variance, covariance, *kept), `mu_param` weighing each view's."""
    rows, dim = views[0].shape
    M = rows - unbiased
    with torch.cuda.device_of(views[0]):
        columns = _vicreg_statistics(views, M, eps, mu_param / (dim * M), precision)
        variance, invariance = columns.terms[:, 0].mean() / dim, columns.terms[0, 2] / (rows * dim)
        covariance, kept, products = torch.zeros_like(variance), None, None
        if nu_param:
            operands = _operands(views, columns, precision)
            if dual:
                squares, kept = _dual(operands, columns.scale, rows, False, derive, precision)
                squares = squares / M**2
            else:
                squares, gradients = _primal(operands, operands, columns.scale, M, derive, precision)
                if derive:
                    weight = squares.new_full((len(views),), 4 * nu_param / (dim * M) / PEAK.value)
                    weight = weight if columns.scale is None else weight / columns.scale**3
                    products = _Products(gradients[0], weight)
            covariance = squares.sum() / dim
        if derive and not dual:
            kept = _derivatives(views, columns, products, M, 2 * lambda_param / (rows * dim), None, torch.float32)
        loss = lambda_param * invariance + mu_param * len(views) * variance + nu_param * covariance
        parts = (x.to(torch.float32) for x in (loss, invariance, variance, covariance))
        return *parts, *(kept or _no_sums(views, dual, derive))


def _vicreg_backward(
    grad_loss: Tensor,
    views: Sequence[Tensor],
    kept: Sequence[Tensor],
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> list[Tensor]:
    """dL/dz of each view, `mu_param` weighing each view's variance."""
    if not dual:
        return [(grad_loss * gradient).to(z.dtype) for gradient, z in zip(kept, views, strict=True)]
    rows, dim = views[0].shape
    M = rows - unbiased
    with torch.cuda.device_of(views[0]):
        columns = _vicreg_statistics(views, M, eps, mu_param / (dim * M), precision)
        products = None
        if nu_param:
            operands, weight = _operands(views, columns, precision), 4 * nu_param / (dim * M**2)
            products = _dual_products(operands, columns.scale, kept, False, weight, precision)
        apart = 2 * lambda_param / (rows * dim)
        return _derivatives(views, columns, products, M, apart, grad_loss, views[0].dtype)


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, invariance, variance, covariance, kept_a, kept_b) of `fastssl::vicreg` for CUDA tensors; see
    fastssl/ops/correlation.py."""
    return _vicreg((z_a, z_b), lambda_param, mu_param / 2, nu_param, eps, unbiased, dual, derive, precision)


def vicreg_backward(
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    kept_a: Tensor,
    kept_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(dz_a, dz_b) of `fastssl::vicreg_backward` for CUDA tensors; see fastssl/ops/correlation.py."""
    options = lambda_param, mu_param / 2, nu_param, eps, unbiased, dual, precision
    return tuple(_vicreg_backward(grad_loss, (z_a, z_b), (kept_a, kept_b), *options))


def variance_covariance(
    z: Tensor, mu_param: float, nu_param: float, eps: float, unbiased: bool, dual: bool, derive: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, variance, covariance, kept) of `fastssl::variance_covariance` for CUDA tensors; see
    fastssl/ops/correlation.py."""
    loss, _, *rest = _vicreg((z,), 0.0, mu_param, nu_param, eps, unbiased, dual, derive, precision)
    return loss, *rest


def variance_covariance_backward(
    grad_loss: Tensor,
    z: Tensor,
    kept: Tensor,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> Tensor:
    """dz of `fastssl::variance_covariance_backward` for CUDA tensors; see fastssl/ops/correlation.py."""
    return _vicreg_backward(grad_loss, (z,), (kept,), 0.0, mu_param, nu_param, eps, unbiased, dual, precision)[0]
