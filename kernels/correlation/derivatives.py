"""From the gradient of standardised columns, g = dL/dA, to that of the views, with r = 1 / sqrt(var + eps):

    Barlow Twins:  dL/dz = r (g - mean g - A sum_n(g A) / M)         VICReg:  dL/dz = g - mean g + apart (z - other)

`_gradient_sums` takes the sums over rows, `_differentiate` applies them; both compute g from its product and from the
parts that need none. Cost: O(N D); each reads the views and the product once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.correlation.columns import (
    BLOCK,
    COUNTS,
    SLOTS,
    Columns,
    centred,
    load,
    slots_for,
    sum_rows,
    tile_at,
)


class Products(NamedTuple):
    """The products' part of g: weight product, and for dual gram_weight (G_nn A_ni - N C_ii B_ni) in addition."""

    product: Sequence[Tensor]  # of each view, (N, D), padded
    weight: Tensor  # (V,)
    grams: Sequence[Tensor | None] = (None, None)  # of each view, (N, N)
    gram_weight: float = 0.0
    operands: Sequence[Tensor | None] = (None, None)  # A of each view
    others: Sequence[Tensor | None] = (None, None)  # B
    dots: Sequence[Tensor | None] = (None, None)  # N C_ii, (D), padded


@triton.jit
def _gradient(
    y, slope, product, weight, gram, gram_weight, operand, other_operand, scale, dots, rows, columns, N, D, padded
):
    """A tile of dL/dA: the diagonal's part and the product's. A product with the matrix of `_round_gram` lacks the
    diagonal of G, and contains that of C, which it should not: G_nn A_ni - N C_ii B_ni corrects both."""
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
    """Column sums over one slot of the rows: of g, and of g A where the columns were divided by their deviations."""
    block, slot = tl.program_id(0), tl.program_id(1)
    slots = tl.num_programs(1)
    g_1 = tl.zeros((BR, BD), tl.float32)
    g_a = tl.zeros((BR, BD), tl.float32)
    for start in range(slot * BR, N, slots * BR):
        rows, columns = tile_at(BR, BD, block, start)
        a = centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride)
        y = a
        if rstd is not None:
            y = centred(other, other_offset, other_rstd, rows, columns, N, D, other_row_stride, other_column_stride)
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
    """dL/dz from dL/dA and its sums. Without `rstd`, apart (z - other) is added, which pulls the views together."""
    block = tl.program_id(1)
    rows, columns = tile_at(BR, BD, block, tl.program_id(0) * BR)
    d = block * BD + tl.arange(0, BD)
    a = centred(z, offset, rstd, rows, columns, N, D, row_stride, column_stride)
    y = a
    if rstd is not None:
        y = centred(other, other_offset, other_rstd, rows, columns, N, D, other_row_stride, other_column_stride)
    g = _gradient(
        y, slope, product, weight, gram, gram_weight, operand, other_operand, scale, dots, rows, columns, N, D, padded
    )
    g -= (sum_rows(sums, 0, slots, d, D, SLOTS) / N).to(tl.float32)[None, :]
    if rstd is not None:
        g -= a * (sum_rows(sums, 1, slots, d, D, SLOTS) / M).to(tl.float32)[None, :]
        g *= tl.load(rstd + columns, mask=columns < D, other=0.0)
    elif other is not None:
        x = load(z, rows, columns, N, D, row_stride, column_stride)
        g += apart * (x - load(other, rows, columns, N, D, other_row_stride, other_column_stride))
    if grad_loss is not None:
        g *= tl.load(grad_loss).to(tl.float32)
    tl.store(out + rows * D + columns, g.to(out.dtype.element_ty), mask=(rows < N) & (columns < D))


def derivatives(
    views: Sequence[Tensor],
    columns: Columns,
    products: Products | None,
    M: int,
    apart: float,
    grad_loss: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """dL/dz of each view in `dtype`.

    Args:
        views: the z.
        columns: the statistics of their columns.
        products: those of the gradient, if it has any.
        M: N, or N - 1 where variances are unbiased.
        apart: the derivative of VICReg's invariance is `apart` (z - other).
        grad_loss: a factor of the result, or None.
        dtype: of the result.
    """
    rows, dim = views[0].shape
    slots, blocks = slots_for(rows, dim), triton.cdiv(dim, BLOCK["BD"])
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


def no_sums(views: Sequence[Tensor], dual: bool, derive: bool) -> list[Tensor]:
    """The tensors that a forward pass keeps if its loss has no product, or if no gradient is wanted."""
    rows, dim = views[0].shape
    shape = (rows if derive else 0, rows if dual else dim)
    return [z.new_zeros(shape, dtype=torch.float32) for z in views]
