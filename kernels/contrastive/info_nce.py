"""InfoNCE within a batch (CPC, arXiv:1807.03748) on the GPU.

With q and k the (normalised) rows of queries and keys, S = scale q k^T, and n_i = shift_i + log(total_i) the
log-sum-exp of row i without its positive S_ii:

    loss_i = softplus(n_i - S_ii),    slope_i = sigmoid(n_i - S_ii)

and, given g_i = dL/dloss_i, with E_ij = exp(S_ij - shift_i), E_ii = 0:

    dloss_i/dq_i = scale slope_i (sum_j E_ij k_j / total_i - k_i)
    dL/dk_j      = scale (sum_i g_i slope_i / total_i E_ij q_i - g_j slope_j q_j)
    dL/dx_i      = (dL/dq_i - <dL/dq_i, q_i> q_i) / |x_i|    where rows were normalised, q = x / |x|

Forward: `accumulate` of E k, 2 U, in units U = 2 N N D floating-point operations; `_finish` adds the splits and leaves
each row's loss and its derivatives, so that nothing remains for the backward pass of the queries. Without gradients
sums.py, 1 U. Backward, for the keys: `accumulate` of E^T q, 2 U; `_project` adds the splits and the positives.

Numerics: as in nt_xent.py, norms and row products are float64, and the positive, whose weight does not average out,
takes no part in rounded products: it is added in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.accumulate import Factors, accumulate, largest, power_of_two
from fastssl.kernels.common.kept import nothing_kept
from fastssl.kernels.common.launch import OPTIONS, PEAK, row_block
from fastssl.kernels.common.rows import pad_views, unit
from fastssl.kernels.common.tiles import COUNTS, EPS, finite, softplus
from fastssl.kernels.contrastive.sums import totals_and_shifts

ROWS_OF_FACTORS = 256  # of a program that computes them


@triton.jit
def _unit_rows(z, inverse, rows, columns, B, D, row_stride, column_stride):
    x = tl.load(z + rows * row_stride + columns * column_stride, mask=(rows < B) & (columns < D), other=0.0)
    return unit(x.to(tl.float32), inverse)


@triton.jit
def _slope(total, shift, positive):
    """n - S_ii, NaN where the positive is infinite, and its sigmoid."""
    n = tl.log(total) + (shift - positive) + 0 * positive
    return n, tl.where(n < 0, tl.exp(n), 1.0) / (1 + tl.exp(-tl.abs(n)))


@triton.jit
def _sum_of_splits(
    gradient, tops, highest, rows, columns, inside, B, D, PADDED, padded_rows, splits,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """G for a tile of rows and columns, relative to exp(highest) where there are `tops`."""
    acc = tl.zeros((BR, BD), tl.float32)
    for split in range(splits):
        from_ = gradient + (rows[:, None] + split * padded_rows) * PADDED + columns
        part = tl.load(from_, mask=inside[:, None] & (columns < D), other=0.0)
        if tops is not None:
            top = tl.load(tops + split * B + rows, mask=inside, other=float("-inf"))
            part *= tl.exp(top - highest)[:, None]
        acc += part
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _finish(
    z1, z2, inverse1, inverse2, scale, gradient, tops, totals, loss, positive, total, shift, query_slope, scale_slope,
    B, D, row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Losses of queries z1 with keys z2; and, given G, their derivatives by rows (but for scale) and by scale."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < B
    factor = tl.load(inverse1 + row, mask=inside, other=1.0)[:, None]
    factor_key = tl.load(inverse2 + row, mask=inside, other=1.0)[:, None]
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
        q = _unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
        k = _unit_rows(z2, factor_key, rows, columns, B, D, row_stride2, column_stride2)
        dots += q.to(tl.float64) * k
        if gradient is not None:
            g = _sum_of_splits(gradient, tops, highest, row, columns, inside, B, D, PADDED, padded_rows, splits, BR, BD)
            alongs += q.to(tl.float64) * g
    aligned = tl.sum(dots, 1)
    p = aligned.to(tl.float32) * tl.load(scale).to(tl.float32)
    n, weight = _slope(acc, highest, p)
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
            q = _unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
            k = _unit_rows(z2, factor_key, rows, columns, B, D, row_stride2, column_stride2)
            g = _sum_of_splits(gradient, tops, highest, row, columns, inside, B, D, PADDED, padded_rows, splits, BR, BD)
            out = weight[:, None] * (g * mean[:, None] - k)
            if NORMALIZE:
                out = unit(out - along * q, factor)
            tl.store(query_slope + rows * D + columns, out, mask=inside[:, None] & (columns < D))


@triton.jit(do_not_specialize=COUNTS)
def _factors(gradient, positive, total, shift, coefficient, weight, N, BR: tl.constexpr):
    """g_i slope_i / total_i, and -g_i slope_i, the positive's weight."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < N
    acc = tl.load(total + i, mask=inside, other=1.0)
    p = tl.load(positive + i, mask=inside, other=0.0)
    _, slope = _slope(acc, tl.load(shift + i, mask=inside, other=0.0), p)
    slope *= tl.load(gradient + i, mask=inside, other=0.0)
    tl.store(coefficient + i, tl.where(acc == 0, 0.0, slope / acc), mask=inside)
    tl.store(weight + i, -slope, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _project(
    z1, z2, inverse1, inverse2, scale, gradient, peak, weight, out, B, D,
    row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of keys z1 from G and their queries z2."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < B
    factor = tl.load(inverse1 + row, mask=inside, other=1.0)[:, None]
    factor_query = tl.load(inverse2 + row, mask=inside, other=1.0)[:, None]
    of_positive = tl.load(weight + row, mask=inside, other=0.0)[:, None]
    unscale = power_of_two(tl.load(peak)) / PEAK
    output_scale = tl.load(scale).to(tl.float32)
    alongs = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        k = _unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
        q = _unit_rows(z2, factor_query, rows, columns, B, D, row_stride2, column_stride2)
        g = _sum_of_splits(gradient, None, None, row, columns, inside, B, D, PADDED, padded_rows, splits, BR, BD)
        alongs += k.to(tl.float64) * (g * unscale + of_positive * q)
    along = tl.where(factor < 1 / EPS, tl.sum(alongs, 1)[:, None], 0.0).to(tl.float32)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        k = _unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
        q = _unit_rows(z2, factor_query, rows, columns, B, D, row_stride2, column_stride2)
        g = _sum_of_splits(gradient, None, None, row, columns, inside, B, D, PADDED, padded_rows, splits, BR, BD)
        g = g * unscale + of_positive * q
        if NORMALIZE:
            g = unit(g - along * k, factor)
        g = (g * output_scale).to(out.dtype.element_ty)
        tl.store(out + rows * D + columns, g, mask=inside[:, None] & (columns < D))


def info_nce(
    query: Tensor, positive_key: Tensor, scale: Tensor, normalize: bool, weigh: bool, keep: int, precision: str
) -> tuple[Tensor, ...]:
    """`fastssl::info_nce` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows, dim = query.shape
    loss, positive, total, shift = (query.new_empty(rows, dtype=torch.float32) for _ in range(4))
    query_slope = query.new_empty((rows if weigh else 0, dim), dtype=torch.float32)
    scale_slope = query.new_empty(rows if weigh else 0, dtype=torch.float32)
    results = loss, positive, total, shift, query_slope, scale_slope
    if rows == 0:
        return *results, nothing_kept(query, keep)
    with torch.cuda.device_of(query):
        (q, inverse_q), (k, inverse_k) = (pad_views(z, z[:0], normalize, precision) for z in (query, positive_key))
        own = torch.arange(rows, device=query.device)
        inputs = q, k, (rows, rows), scale, precision
        if weigh:
            sums = accumulate(*inputs, "softmax", "row", exclude=own)
            gradient, tops, totals = sums.gradient, sums.top, sums.total
            splits, padded_rows, padded = gradient.shape
        else:
            [(totals, tops)] = totals_and_shifts(*inputs, "row", exclude=own)
            gradient, splits, (padded_rows, padded) = None, 1, q.shape
        block = row_block(padded)
        _finish[(triton.cdiv(rows, block["BR"]),)](
            query, positive_key, inverse_q, inverse_k, scale, gradient, tops, totals, *results, rows, dim,
            *query.stride(), *positive_key.stride(), padded, padded_rows, splits, normalize, **block,
            num_warps=8, **OPTIONS,
        )  # fmt: skip
    return *results, nothing_kept(query, keep)


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
    needs_positive_key: bool,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastssl::info_nce_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    grad_query = ((grad_loss * scale)[:, None] * query_slope).to(query.dtype)
    grad_scale = (grad_loss * scale_slope).sum(dtype=torch.float64).to(scale.dtype)
    rows, dim = query.shape
    grad_key = positive_key.new_empty((rows if needs_positive_key else 0, dim))
    if grad_key.shape[0] == 0:
        return grad_query, grad_key, grad_scale
    with torch.cuda.device_of(query):
        (q, inverse_q), (k, inverse_k) = (pad_views(z, z[:0], normalize, precision) for z in (query, positive_key))
        shift = shift.contiguous()
        factors, weight = Factors(shift, torch.empty_like(shift)), torch.empty_like(shift)
        _factors[(triton.cdiv(rows, ROWS_OF_FACTORS),)](
            grad_loss.contiguous(), positive.contiguous(), total.contiguous(), shift, factors.factor, weight, rows,
            BR=ROWS_OF_FACTORS, **OPTIONS,
        )  # fmt: skip
        peak, own = largest(factors), torch.arange(rows, device=query.device)
        G = accumulate(
            k, q, (rows, rows), scale, precision, "column", "column", exclude=own, columns=factors, peak=peak
        ).gradient
        splits, padded_rows, padded = G.shape
        block = row_block(padded)
        _project[(triton.cdiv(rows, block["BR"]),)](
            positive_key, query, inverse_k, inverse_q, scale, G, peak, weight, grad_key, rows, dim,
            *positive_key.stride(), *query.stride(), padded, padded_rows, splits, normalize, **block,
            num_warps=8, **OPTIONS,
        )  # fmt: skip
    return grad_query, grad_key, grad_scale
