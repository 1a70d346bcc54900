"""Rows in the dtype of products: z = x / max(|x|, 1e-12), or x itself, rounded once.

The copy's rows and columns are padded with zeros, so that the kernels that multiply load whole tiles. A program takes a
tile of rows and reads them twice if it normalises them, once otherwise; norms are float64. Cost: O(N D).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import DTYPES, OPTIONS, ROWS, row_block
from fastssl.kernels.common.tiles import COUNTS, EPS


@triton.jit
def load_rows(z1, z2, rows, columns, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2):
    """Rows of [z1; z2], B in z1 and N in all, in float32, zero outside. `rows` (R, 1), `columns` (1, C) are int64."""
    first = (rows < B) & (columns < D)
    second = (rows >= B) & (rows < N) & (columns < D)
    x1 = tl.load(z1 + rows * row_stride1 + columns * column_stride1, mask=first, other=0.0)
    x2 = tl.load(z2 + (rows - B) * row_stride2 + columns * column_stride2, mask=second, other=0.0)
    return tl.where(rows < B, x1, x2).to(tl.float32)


@triton.jit
def unit(x, inverse):
    """x times its inverse norm, rounded once."""
    return (x.to(tl.float64) * inverse).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    z1, z2, z, inverse, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2, PADDED,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the (normalised) rows, rounded to z's dtype and padded with zeros, and their inverse norms (else 1)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    squares = tl.zeros((BR, BD), tl.float64)
    if NORMALIZE:
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
            x = load_rows(z1, z2, rows, columns, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2)
            squares += x.to(tl.float64) * x
        factor = 1 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), EPS)
    else:
        factor = tl.full((BR,), 1.0, tl.float64)
    tl.store(inverse + row, factor, mask=row < N)
    for start in range(0, PADDED, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = load_rows(z1, z2, rows, columns, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2)
        out = unit(x, factor[:, None]).to(z.dtype.element_ty)
        tl.store(z + rows * PADDED + columns, out, mask=columns < PADDED)


def pad_views(z1: Tensor, z2: Tensor, normalize: bool, precision: str) -> tuple[Tensor, Tensor]:
    """(z, inverse): the padded (normalised) rows of [z1; z2] in the dtype of the products, and 1 / norm in float64."""
    batch, dim = z1.shape
    rows = batch + z2.shape[0]
    padded = triton.cdiv(dim, 64) * 64
    z = z1.new_empty((triton.cdiv(rows, ROWS) * ROWS, padded), dtype=DTYPES[precision])
    inverse = z1.new_empty(rows, dtype=torch.float64)
    block = row_block(padded)
    prepare[(z.shape[0] // block["BR"],)](
        z1, z2, z, inverse, batch, rows, dim, *z1.stride(), *z2.stride(), padded, normalize, **block, **OPTIONS
    )
    return z, inverse


def pad(x: Tensor, precision: str) -> Tensor:
    """The padded rows of x in the dtype of the products: x itself, if that is what it already is."""
    rows, dim = x.shape
    whole = rows % ROWS == 0 and dim % 64 == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if whole and x.dtype == DTYPES[precision] else pad_views(x, x[:0], False, precision)[0]
