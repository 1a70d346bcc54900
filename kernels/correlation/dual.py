"""The dual algorithm, where N is well below D, by the N x N Gram matrices G_a = A A^T and G_b = B B^T:

    sum_{i != j} (A^T B)_ij^2 = <G_a, G_b> - sum_i (A^T B)_ii^2

Algorithm. cuBLAS multiplies; `_gram` takes the tiles of G on and below the diagonal, which stand for the others, too,
and the inner product, from which the squares of the diagonal are subtracted. Backward: N B C^T = G_b A, minus
N C_ii B_ni for the diagonal of C.

Cost, in units U = 2 N N D floating-point operations: for each view 1 U forward, 1 U backward.

Numerics: what is subtracted for the diagonal is computed from the same rounded operands as what it is subtracted from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PEAK
from fastssl.kernels.correlation.columns import BLOCK, COUNTS, slots_for, tile_at
from fastssl.kernels.correlation.derivatives import Products
from fastssl.kernels.correlation.products import TILE, matrix_product, power_of_two_above, rounded


@triton.jit
def _store_symmetric(gram, tile, row, column, N, T: tl.constexpr):
    """Store a tile of G and its transpose."""
    rows, columns = tile_at(T, T, column // T, row)
    tl.store(gram + rows * N + columns, tile, mask=(rows < N) & (columns < N))
    rows, columns = tile_at(T, T, row // T, column)
    tl.store(gram + rows * N + columns, tl.trans(tile), mask=(rows < N) & (columns < N))


@triton.jit(do_not_specialize=COUNTS)
def _gram(products_a, products_b, scale, gram_a, gram_b, inner, N, padded, T: tl.constexpr):
    """From the lower tiles of A A^T: all of G, and each tile's part of <G_a, G_b>, or of <G_a, G_a> if b is None."""
    pid = tl.program_id(0)
    blocks = padded // T
    row, column = pid // blocks * T, pid % blocks * T
    if row >= column:
        rows, columns = tile_at(T, T, column // T, row)
        g_a = tl.load(products_a + rows * padded + columns)
        if scale is not None:
            factor = tl.load(scale)
            g_a *= (1 / (factor * factor)).to(tl.float32)
        g_b = g_a
        if products_b is not None:
            g_b = tl.load(products_b + rows * padded + columns)
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
    """The diagonal of A^T B, from the rounded operands, over one slot of the rows."""
    block, slot = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(slot * BR, K, tl.num_programs(1) * BR):
        rows, columns = tile_at(BR, BD, block, start)
        x = tl.load(left + rows * stride + columns).to(tl.float32)
        total += x * tl.load(right + rows * stride + columns).to(tl.float32)
    dot = tl.sum(total, 0)
    if scale is not None:
        factor = tl.load(scale)
        dot *= (1 / (factor * factor)).to(tl.float32)
    tl.store(dots + slot.to(tl.int64) * stride + block * BD + tl.arange(0, BD), dot)


@triton.jit(do_not_specialize=COUNTS)
def _round_gram(gram, peak, out, N, padded, TF32: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Write G without its diagonal, scaled to `PEAK`, in out's dtype, padded with zeros."""
    rows, columns = tile_at(BR, BD, tl.program_id(1), tl.program_id(0) * BR)
    mask = (rows < N) & (columns < N) & (rows != columns)
    g = tl.load(gram + rows * N + columns, mask=mask, other=0.0) * (PEAK / tl.load(peak))
    tl.store(out + rows * padded + columns, rounded(g, out.dtype.element_ty, TF32))


def diagonals(operands: Tensor, scale: Tensor | None, cross: bool) -> Tensor:
    """The diagonal of A^T B, (1, D), or that of A^T A for each view, (V, D), from padded operands."""
    (views, padded_rows, padded), slots = operands.shape, slots_for(*operands.shape[1:])
    dots = operands.new_empty((1 if cross else views, slots, padded), dtype=torch.float32)
    for view, dot in enumerate(dots):
        _diagonal[(padded // BLOCK["BD"], slots)](
            operands[view], operands[-1 if cross else view], None if scale is None else scale[view], dot, padded_rows,
            padded, **BLOCK, **OPTIONS,
        )  # fmt: skip
    return dots.sum(1)


def dual_forward(
    operands: Tensor, scale: Tensor | None, rows: int, cross: bool, derive: bool
) -> tuple[Tensor, list[Tensor]]:
    """The sum of squares off the diagonal of A^T B, (1,), or of A^T A for each view, (V,), in float64; and the Gram
    matrices, (N, N), which are empty without `derive`."""
    products = matrix_product(operands, operands.mT)
    views, padded, _ = products.shape
    grams = [products.new_empty((rows, rows)) if derive else None for _ in range(views)]
    inner = products.new_empty((1 if cross else views, (padded // TILE) ** 2))
    for view in range(len(inner)):
        others = (products[1], grams[1]) if cross else (None, None)
        _gram[(inner.shape[1],)](
            products[view], others[0], None if scale is None else scale[view], grams[view], others[1], inner[view],
            rows, padded, T=TILE, **OPTIONS,
        )  # fmt: skip
    diagonal = diagonals(operands, scale, cross).double().square().sum(1)
    squares = inner.sum(1, dtype=torch.float64)
    squares = squares.where(squares.isinf(), squares - diagonal).clamp_min(0)
    return squares, [g if derive else products.new_empty((0, rows)) for g in grams]


def dual_products(
    operands: Tensor, scale: Tensor | None, grams: Sequence[Tensor], cross: bool, weight: float, precision: str
) -> Products:
    """weight G A for G of `grams` and A of `operands`, in two parts: G without its diagonal, rounded, and the rest."""
    grams = [gram.contiguous() for gram in grams]
    peak = power_of_two_above(torch.stack([g.diagonal().amax() for g in grams]))
    padded, rows = operands.shape[1], grams[0].shape[0]
    weights = operands.new_empty((len(grams), padded, padded))
    for view, gram in enumerate(grams):
        _round_gram[(padded // BLOCK["BR"], padded // BLOCK["BD"])](
            gram, peak[view], weights[view], rows, padded, TF32=precision == "tf32", **BLOCK, **OPTIONS
        )
    unit = peak.double() * (weight / PEAK.value)
    return Products(
        matrix_product(weights, operands),
        unit if scale is None else unit / scale,
        grams,
        weight,
        operands,
        operands.flip(0) if cross else operands,
        diagonals(operands, scale, cross).expand(len(grams), -1),
    )
