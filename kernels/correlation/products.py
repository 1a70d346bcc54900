"""Operands of products, rounded once and padded with zeros to whole tiles; and their products, which are cuBLAS's.

Operands are rounded to TF32 beforehand, to nearest: tensor cores would truncate them, an error that adds up where all
terms are positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common import blocks
from fastssl.kernels.common.launch import DTYPES, OPTIONS, ROWS
from fastssl.kernels.correlation.columns import BLOCK, COUNTS, Columns, centred, tile_at

TILE = 32  # rows and columns of a tile in the kernels that read products


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


def matrix_product(left: Tensor, right: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Of each view, (V, M, K) and (V, K, N) -> (V, M, N), in float32; into `out` if it is given, or added to it."""
    if out is None:
        out = left.new_empty((*left.shape[:2], right.shape[2]), dtype=torch.float32)
    for to, x, y in zip(out, left, right, strict=True):
        blocks.add_product(to, x, y, first=not add)
    return out
