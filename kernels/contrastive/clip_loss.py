"""CLIP's loss (arXiv:2103.00020), InfoNCE in both directions, on the GPU.

With x and y the (normalised) rows of both sides, S = scale x y^T, and n_i and m_j the log-sum-exps of row i and of
column j without their positives, S_ii and S_jj:

    loss_i = 1/2 (softplus(n_i - S_ii) + softplus(m_i - S_ii))

and, given g_i = dL/dloss_i, with r_i = 1/2 g_i sigmoid(n_i - S_ii) and c_j = 1/2 g_j sigmoid(m_j - S_jj):

    W_ij = r_i exp(S_ij - n_i) + c_j exp(S_ij - m_j) - [i = j] (r_i + c_i)
    dL/dx = scale W y,    dL/dy = scale W^T x,    dL/dscale = sum_i <x_i, (W y)_i>

Forward: sums.py, 1 U, in units U = 2 N N D floating-point operations; `_losses` computes the positives. Backward:
`accumulate_both` without the positives, 4 U, for wide rows 3 U, or 2 U with products that the forward pass has kept;
positives.py adds them and goes back through the norms. Label smoothing, O(N D), is left to PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl._label_smoothing import gradient_of_leads, lead
from fastssl._norms import normalized_rows
from fastssl._reductions import gradient_of_rows, reduce
from fastssl.kernels.common.accumulate import accumulate_both
from fastssl.kernels.common.kept import kept_products, nothing_kept, room_for_products
from fastssl.kernels.common.launch import OPTIONS, row_block
from fastssl.kernels.common.tiles import COUNTS, softplus
from fastssl.kernels.common.weights import Factors, Weights
from fastssl.kernels.contrastive.positives import (
    WARPS,
    load_factors_of_positive,
    load_inverse,
    margin_and_slope,
    projected,
    rows_of_products,
    unit_rows,
)
from fastssl.kernels.contrastive.sums import totals_and_shifts

ROWS_OF_FACTORS = 256  # of a program that computes them


@triton.jit(do_not_specialize=COUNTS)
def _losses(
    z1, z2, inverse1, inverse2, scale, row_total, row_shift, column_total, column_shift, loss, positive, B, D,
    row_stride1, column_stride1, row_stride2, column_stride2,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """S_ii, and the losses."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < B
    factor_x = load_inverse(inverse1, row, inside, BR)
    factor_y = load_inverse(inverse2, row, inside, BR)
    dots = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = unit_rows(z1, factor_x, rows, columns, B, D, row_stride1, column_stride1)
        y = unit_rows(z2, factor_y, rows, columns, B, D, row_stride2, column_stride2)
        dots += x.to(tl.float64) * y
    p = tl.sum(dots, 1).to(tl.float32) * tl.load(scale).to(tl.float32)
    n, _ = margin_and_slope(
        tl.load(row_total + row, mask=inside, other=1.0), tl.load(row_shift + row, mask=inside, other=0.0), p
    )
    m, _ = margin_and_slope(
        tl.load(column_total + row, mask=inside, other=1.0), tl.load(column_shift + row, mask=inside, other=0.0), p
    )
    tl.store(loss + row, 0.5 * (softplus(n) + softplus(m)), mask=inside)
    tl.store(positive + row, p, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _factors(
    gradient, positive, row_total, row_shift, column_total, column_shift, row_factor, column_factor, weight, N,
    BR: tl.constexpr,
):  # fmt: skip
    """r_i / total_i and c_j / total_j, 0 past the last; and -(r_i + c_i), the weight of the positive."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < N
    half = 0.5 * tl.load(gradient + i, mask=inside, other=0.0)
    p = tl.load(positive + i, mask=inside, other=0.0)
    of_row, r = load_factors_of_positive(half, row_total, row_shift, p, i, inside)
    of_column, c = load_factors_of_positive(half, column_total, column_shift, p, i, inside)
    tl.store(row_factor + i, of_row)
    tl.store(column_factor + i, of_column)
    tl.store(weight + i, -(r + c), mask=inside)


def clip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
    keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    """`fastssl::clip_loss` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows, dim = x.shape
    loss, positive = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows == 0:
        return reduce(loss, reduction), *(loss.clone() for _ in range(5)), nothing_kept(x, keep)
    (left, inverse_x), (right, inverse_y) = (rows_of_products(z, normalize, precision) for z in (x, y))
    kept, products = room_for_products(x, keep, rows, rows, precision)
    of_rows, of_columns = totals_and_shifts(
        left, right, (rows, rows), scale, precision, "diagonal", columns=True, kept=products
    )
    block = row_block(left.shape[1])
    _losses[(triton.cdiv(rows, block["BR"]),)](
        x, y, inverse_x, inverse_y, scale, *of_rows, *of_columns, loss, positive, rows, dim, *x.stride(),
        *y.stride(), **block, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    if label_smoothing:
        wide_x, wide_y = (normalized_rows(z, normalize)[0] for z in (x, y))
        loss += label_smoothing / 2 * scale * (lead(wide_x, wide_y) + lead(wide_y, wide_x))
    return reduce(loss, reduction), positive, *of_rows, *of_columns, kept


def clip_loss_backward(
    grad_loss: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    row_total: Tensor,
    row_shift: Tensor,
    column_total: Tensor,
    column_shift: Tensor,
    kept: Tensor,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastssl::clip_loss_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_zeros(())
    grad_loss = gradient_of_rows(grad_loss, reduction, rows)
    (left, inverse_x), (right, inverse_y) = (rows_of_products(z, normalize, precision) for z in (x, y))
    shifts = row_shift.contiguous(), column_shift.contiguous()
    factors = x.new_empty((2, triton.cdiv(rows, ROWS_OF_FACTORS) * ROWS_OF_FACTORS), dtype=torch.float32)
    of_rows, of_columns = (Factors(*pair) for pair in zip(shifts, factors, strict=True))
    weight = torch.empty_like(of_rows.shift)
    _factors[(triton.cdiv(rows, ROWS_OF_FACTORS),)](
        grad_loss.contiguous(), positive.contiguous(), row_total.contiguous(), of_rows.shift,
        column_total.contiguous(), of_columns.shift, of_rows.factor, of_columns.factor, weight, rows,
        BR=ROWS_OF_FACTORS, **OPTIONS,
    )  # fmt: skip
    pairs = Weights(left, right, (rows, rows), scale, precision, "both", "diagonal", rows=of_rows, columns=of_columns)
    sums_x, sums_y = accumulate_both(pairs, kept=kept_products(kept, rows, rows, x.shape[1], precision))
    share = x.new_empty(rows, dtype=torch.float64)
    of_x = of_y = None  # what label smoothing adds
    if label_smoothing:
        wide_x, wide_y = (normalized_rows(z, normalize)[0] for z in (x, y))
        pull = grad_loss * (label_smoothing / 2)
        of_x, of_y = (gradient_of_leads(z, pull, pull) for z in (wide_y, wide_x))
    grad_x = projected(x, y, (inverse_x, inverse_y), scale, sums_x, weight, share, of_x)
    grad_y = projected(y, x, (inverse_y, inverse_x), scale, sums_y, weight, None, of_y)
    return grad_x, grad_y, share.sum().to(scale.dtype)
