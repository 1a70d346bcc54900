"""InfoNCE within a batch (CPC, arXiv:1807.03748) on the GPU.

With q and k the (normalised) rows of queries and keys, S = scale q k^T, and n_i = shift_i + log(total_i) the
log-sum-exp of row i without its positive S_ii:

    loss_i = softplus(n_i - S_ii),    slope_i = sigmoid(n_i - S_ii)

and, given g_i = dL/dloss_i, with E_ij = exp(S_ij - shift_i), E_ii = 0:

    dloss_i/dq_i = scale slope_i (sum_j E_ij k_j / total_i - k_i)
    dL/dk_j      = scale (sum_i g_i slope_i / total_i E_ij q_i - g_j slope_j q_j)
    dL/dx_i      = (dL/dq_i - <dL/dq_i, q_i> q_i) / |x_i|    where rows were normalised, q = x / |x|

Forward: `softmax_sums` of E k, 2 U, in units U = 2 N N D floating-point operations, or 3 U for wide rows; `_finish`
adds the splits and leaves each row's loss and its derivatives, so that nothing remains for the backward pass of the
queries. Without gradients sums.py, 1 U. Backward, for the keys: `accumulate` of E^T q, 2 U; positives.py adds the
positives. With products that the forward pass has kept, 2 U and 1 U. Label smoothing, O(N D), is left to PyTorch.

Numerics: as in positives.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl._label_smoothing import centered, gradient_of_leads, lead
from fastssl._norms import normalized_rows, through_norms
from fastssl._reductions import gradient_of_rows, reduce
from fastssl.kernels.common.accumulate import accumulate
from fastssl.kernels.common.kept import kept_products, nothing_kept, room_for_products
from fastssl.kernels.common.launch import OPTIONS, PEAK, row_block
from fastssl.kernels.common.rows import unit
from fastssl.kernels.common.tiles import COUNTS, EPS, finite, softplus
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
from fastssl.kernels.contrastive.sums import softmax_sums, totals_and_shifts

ROWS_OF_FACTORS = 256  # of a program that computes them


@triton.jit
def _sum_of_splits(
    gradient, tops, highest, row, columns, inside, B, D, PADDED, padded_rows, splits,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """G for a tile of rows and columns, relative to exp(highest)."""
    acc = tl.zeros((BR, BD), tl.float32)
    for split in range(splits):
        from_ = gradient + (row[:, None] + split * padded_rows) * PADDED + columns
        part = tl.load(from_, mask=inside[:, None] & (columns < D), other=0.0)
        top = tl.load(tops + split * B + row, mask=inside, other=float("-inf"))
        acc += part * tl.exp(top - highest)[:, None]
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _finish(
    z1, z2, inverse1, inverse2, scale, gradient, tops, totals, loss, positive, total, shift, query_slope, scale_slope,
    B, D, row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Losses of queries z1 with keys z2; and, given G, their derivatives by rows (but for scale) and by scale."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < B
    factor = load_inverse(inverse1, row, inside, BR)
    factor_key = load_inverse(inverse2, row, inside, BR)
    highest = tl.full((BR,), float("-inf"), tl.float32)
    for split in range(splits):
        highest = tl.maximum(highest, tl.load(tops + split * B + row, mask=inside, other=float("-inf")))
    highest = finite(highest)
    acc = tl.zeros((BR,), tl.float32)
    for split in range(splits):
        top = tl.load(tops + split * B + row, mask=inside, other=float("-inf"))
        acc += tl.load(totals + split * B + row, mask=inside, other=0.0) * tl.exp(top - highest)
    dots = tl.zeros((BR, BD), tl.float64)
    alongs = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        q = unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
        k = unit_rows(z2, factor_key, rows, columns, B, D, row_stride2, column_stride2)
        dots += q.to(tl.float64) * k
        if gradient is not None:
            g = _sum_of_splits(gradient, tops, highest, row, columns, inside, B, D, PADDED, padded_rows, splits, BR, BD)
            alongs += q.to(tl.float64) * g
    aligned = tl.sum(dots, 1)
    p = aligned.to(tl.float32) * tl.load(scale).to(tl.float32)
    n, weight = margin_and_slope(acc, highest, p)
    tl.store(loss + row, softplus(n), mask=inside)
    tl.store(positive + row, p, mask=inside)
    tl.store(total + row, acc, mask=inside)
    tl.store(shift + row, tl.where(acc == acc, highest, acc), mask=inside)
    if gradient is not None:
        mean = tl.where(acc == 0, 0.0, 1 / (acc * PEAK))
        along = weight * (tl.sum(alongs, 1) * mean - aligned)
        tl.store(scale_slope + row, along.to(tl.float32), mask=inside)
        along = tl.where(factor < 1 / EPS, along[:, None], 0.0).to(tl.float32)  # a clamped norm is a constant
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
            q = unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
            k = unit_rows(z2, factor_key, rows, columns, B, D, row_stride2, column_stride2)
            g = _sum_of_splits(gradient, tops, highest, row, columns, inside, B, D, PADDED, padded_rows, splits, BR, BD)
            out = weight[:, None] * (g * mean[:, None] - k)
            if inverse1 is not None:
                out = unit(out - along * q, factor)
            tl.store(query_slope + rows * D + columns, out, mask=inside[:, None] & (columns < D))


@triton.jit(do_not_specialize=COUNTS)
def _factors(gradient, positive, total, shift, factor, weight, N, BR: tl.constexpr):
    """g_i slope_i / total_i, and -g_i slope_i, the weight of the positive."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < N
    g = tl.load(gradient + i, mask=inside, other=0.0)
    p = tl.load(positive + i, mask=inside, other=0.0)
    of_negatives, slope = load_factors_of_positive(g, total, shift, p, i, inside)
    tl.store(factor + i, of_negatives, mask=inside)
    tl.store(weight + i, -slope, mask=inside)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    scale: Tensor,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
    weigh: bool,
    keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    """`fastssl::info_nce` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows, dim = query.shape
    loss, positive, total, shift = (query.new_empty(rows, dtype=torch.float32) for _ in range(4))
    query_slope = query.new_empty((rows if weigh else 0, dim), dtype=torch.float32)
    scale_slope = query.new_empty(rows if weigh else 0, dtype=torch.float32)
    results = loss, positive, total, shift, query_slope, scale_slope
    if rows == 0:
        return reduce(loss, reduction), *results[1:], nothing_kept(query, keep)
    (q, inverse_q), (k, inverse_k) = (rows_of_products(z, normalize, precision) for z in (query, positive_key))
    kept, products = room_for_products(query, keep, rows, rows, precision)
    inputs = q, k, (rows, rows), scale, precision
    if weigh:
        sums = softmax_sums(*inputs, "diagonal", kept=products)
        gradient, tops, totals = sums.gradient, sums.top, sums.total
        splits, padded_rows, padded = gradient.shape
    else:
        [(totals, tops)] = totals_and_shifts(*inputs, "diagonal", kept=products)
        gradient, splits, (padded_rows, padded) = None, 1, q.shape
    block = row_block(padded)
    _finish[(triton.cdiv(rows, block["BR"]),)](
        query, positive_key, inverse_q, inverse_k, scale, gradient, tops, totals, *results, rows, dim,
        *query.stride(), *positive_key.stride(), padded, padded_rows, splits, **block,
        num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    if label_smoothing:
        (wide_q, norms), (wide_k, _) = (normalized_rows(z, normalize) for z in (query, positive_key))
        leads = lead(wide_q, wide_k)
        loss += label_smoothing * scale * leads
        if weigh:
            query_slope += through_norms(label_smoothing * centered(wide_k), wide_q, norms)
            scale_slope += label_smoothing * leads
    return reduce(loss, reduction), *results[1:], kept


def info_nce_backward(
    grad_loss: Tensor,
    query: Tensor,
    positive_key: Tensor,
    scale: Tensor,
    positive: Tensor,
    total: Tensor,
    shift: Tensor,
    query_slope: Tensor,
    scale_slope: Tensor,
    kept: Tensor,
    label_smoothing: float,
    reduction: str,
    needs_positive_key: bool,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastssl::info_nce_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    grad_loss = gradient_of_rows(grad_loss, reduction, query.shape[0])
    grad_query = ((grad_loss * scale)[:, None] * query_slope).to(query.dtype)
    grad_scale = (grad_loss * scale_slope).sum(dtype=torch.float64).to(scale.dtype)
    rows = query.shape[0]
    if rows == 0 or not needs_positive_key:
        return grad_query, positive_key.new_empty((0, positive_key.shape[1])), grad_scale
    (q, inverse_q), (k, inverse_k) = (rows_of_products(z, normalize, precision) for z in (query, positive_key))
    shift = shift.contiguous()
    factors, weight = Factors(shift, torch.empty_like(shift)), torch.empty_like(shift)
    _factors[(triton.cdiv(rows, ROWS_OF_FACTORS),)](
        grad_loss.contiguous(), positive.contiguous(), total.contiguous(), shift, factors.factor, weight, rows,
        BR=ROWS_OF_FACTORS, **OPTIONS,
    )  # fmt: skip
    products = kept_products(kept, rows, rows, query.shape[1], precision)
    pairs = Weights(k, q, (rows, rows), scale, precision, "column", "diagonal", columns=factors)
    sums = accumulate(pairs, kept=None if products is None else products.T)
    of_key = None  # what label smoothing adds
    if label_smoothing:
        of_key = gradient_of_leads(normalized_rows(query, normalize)[0], None, grad_loss * label_smoothing)
    grad_key = projected(positive_key, query, (inverse_k, inverse_q), scale, sums, weight, None, of_key)
    return grad_query, grad_key, grad_scale
