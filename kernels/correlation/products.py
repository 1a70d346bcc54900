"""Operands of products, rounded once and padded with zeros to whole tiles; and `_multiply`, which computes the products

    left right,    left right^T    or    left^T right.

A program computes one tile of the product. If there are too few tiles to fill the GPU, the contracted dimension K is
split between programs, each with a slot of its own, which the next kernel sums. Cost: 2 M N K floating-point
operations, about half where only tiles on and below the diagonal are wanted.

Operands are rounded to TF32 beforehand, to nearest: tensor cores would truncate them, an error that adds up where all
terms are positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import (
    DTYPES,
    OPTIONS,
    PROGRAMS,
    ROWS,
    autotune,
    configs,
    input_precision,
    suits_units,
)
from fastssl.kernels.common.tiles import span
from fastssl.kernels.correlation.columns import BLOCK, COUNTS, Columns, centred, tile_at

TILE = 32  # rows and columns of a tile in the kernels that read products


def multiply_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    if not suits_units(c, named):
        return None
    layout, tile = named["LAYOUT"], (c["BM"], c["BN"], c["BK"])
    spilled = False  # whether the assembler spills registers: the tests compile every configuration
    if capability // 10 == 8:
        spilled = (layout, tile) == ("TN", (128, 64, 16))
    if capability // 10 == 9:
        spilled = size == 4 and (layout, tile) == ("TN", (128, 64, 64))
    if capability // 10 == 10:
        spilled = (layout, tile) == ("TN", (128, 64, 16))
    if capability // 10 == 12:
        spilled = (layout, tile) == ("NT", (64, 64, 64))
        spilled |= size == 2 and layout == "NN" and tile in ((128, 128, 32), (64, 64, 64))
    return None if spilled else c["stages"] * (c["BM"] + c["BN"]) * c["BK"] * size


@triton.jit
def rounded(x, dtype: tl.constexpr, TF32: tl.constexpr):
    """x in the dtype of products; for TF32 rounded to nearest, because tensor cores would truncate."""
    if TF32:
        bits = (x.to(tl.int32, bitcast=True) + 4096) & -8192
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit(do_not_specialize=COUNTS)
def _standardise(
    z, offset, rstd, scale, out, N, D, row_stride, column_stride, padded,
    TF32: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write A (times `scale`), rounded to out's dtype and padded with zeros."""
    rows, columns = tile_at(BR, BD, tl.program_id(1), tl.program_id(0) * BR)
    a = centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride)
    if scale is not None:
        a *= tl.load(scale).to(tl.float32)
    tl.store(out + rows * padded + columns, rounded(a, out.dtype.element_ty, TF32))


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two above x; 1 for 0."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent)


def operands_of(views: Sequence[Tensor], columns: Columns, precision: str) -> Tensor:
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


# Tuning repeats a call, so a call that adds to `out` must not be tuned: the first call for each layout and precision,
# that of the first panel, does not add.
@autotune(
    multiply_needs,
    ["splits", "LAYOUT", "PRECISION"],  # splits is a power of two that falls as the number of tiles grows
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
    """A tile of left right ("NN"), left right^T ("NT") or left^T right ("TN"), over one split of the K dimension.

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


def matrix_product(
    left: Tensor,
    right: Tensor,
    layout: str,
    precision: str,
    out: Tensor | None = None,
    lower: bool = False,
    add: bool = False,
) -> Tensor:
    """Products of batches of matrices whose sizes are multiples of `ROWS`.

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


@triton.jit
def sum_slots(products, slots, slot_stride):
    """The sum of a tile over the slots that `_multiply` left."""
    total = tl.load(products)
    for _ in range(1, slots):
        products += slot_stride
        total += tl.load(products)
    return total
