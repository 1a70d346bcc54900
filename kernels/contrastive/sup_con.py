"""The supervised contrastive loss (SupCon, arXiv:2004.11362) on the GPU.

With z the N (normalised) rows, S = scale z z^T, and s_i the sum of the n_i rows of row i's label:

    loss_i = log sum_{j != i} exp(S_ij) - scale <z_i, s_i - z_i> / (n_i - 1),    or 0 where n_i = 1

and, given g_i = dL/dloss_i, with a_i = g_i / total_i and b_i = g_i / (n_i - 1), both 0 where n_i = 1, and t_i the sum
of b_j z_j over the rows of row i's label:

    W_ij     = a_i exp(S_ij - shift_i) + a_j exp(S_ij - shift_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G_i = (W z)_i - b_i s_i - t_i + 2 b_i z_i,      dL/dscale = 1/2 sum_i <z_i, G_i>
    dL/dx_i  = (dL/dz_i - <dL/dz_i, z_i> z_i) / |x_i|    where rows were normalised, z = x / |x|

Algorithm. The log-sum-exps and W z are NT-Xent's (sums.py, common/accumulate.py), positives.py goes back through the
norms. The sums of labels are those of row_sums.py, where a label is named by the place of its first row in the order of
a stable sort. There are no atomics: the bits are the same in every run.

Cost. Forward 1/2 U, backward 2 U, or 1.5 U for wide rows, in units U = 2 N N D floating-point operations; O(N D) and a
sort of the labels for the rest.

Numerics: norms and row products are float64; sums of labels are float32, of rows that are not rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.accumulate import accumulate
from fastssl.kernels.common.kept import kept_products, nothing_kept, room_for_products
from fastssl.kernels.common.launch import OPTIONS, row_block
from fastssl.kernels.common.tiles import COUNTS
from fastssl.kernels.common.weights import Factors, Weights
from fastssl.kernels.contrastive.positives import WARPS, load_inverse, projected, rows_of_products, unit_rows
from fastssl.kernels.contrastive.sums import totals_and_shifts
from fastssl.kernels.row_sums import room_for_sums, sum_into

ROWS_OF_FACTORS = 256  # of a program that computes them


@triton.jit(do_not_specialize=COUNTS)
def _losses(
    z, inverse, first, last, sums, scale, total, shift, loss, N, D, row_stride, column_stride,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < N
    factor = load_inverse(inverse, row, inside, BR)
    begin = tl.load(first + row, mask=inside, other=0)
    others = tl.load(last + row, mask=inside, other=1) - begin - 1
    dots = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = unit_rows(z, factor, rows, columns, N, D, row_stride, column_stride)
        s = tl.load(sums + begin[:, None] * D + columns, mask=inside[:, None] & (columns < D), other=0.0)
        dots += x.to(tl.float64) * (s - x)
    aligned = (tl.sum(dots, 1) / tl.maximum(others, 1)).to(tl.float32) * tl.load(scale).to(tl.float32)
    lse = tl.log(tl.load(total + row, mask=inside, other=1.0))
    lse += tl.load(shift + row, mask=inside, other=0.0) - aligned
    tl.store(loss + row, tl.where(others > 0, lse, 0.0), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _factors(gradient, total, first, last, factor, per_positive, weight, N, BR: tl.constexpr):
    """a_i, b_i, and 2 b_i, the weight of z_i itself."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < N
    g = tl.load(gradient + i, mask=inside, other=0.0)
    others = (tl.load(last + i, mask=inside, other=1) - tl.load(first + i, mask=inside, other=0) - 1).to(tl.float32)
    b = tl.where(others > 0, g / others, 0.0)
    acc = tl.load(total + i, mask=inside, other=1.0)
    tl.store(factor + i, tl.where(others > 0, g / acc, 0.0), mask=inside)
    tl.store(per_positive + i, b, mask=inside)
    tl.store(weight + i, 2 * b, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _positives(first, per_positive, sums, weighted, out, N, D, BR: tl.constexpr, BD: tl.constexpr):
    """-(b_i s_i + t_i)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < N
    begin = tl.load(first + row, mask=inside, other=0)[:, None]
    b = tl.load(per_positive + row, mask=inside, other=0.0)[:, None]
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        mask = inside[:, None] & (columns < D)
        s = tl.load(sums + begin * D + columns, mask=mask, other=0.0)
        t = tl.load(weighted + begin * D + columns, mask=mask, other=0.0)
        tl.store(out + row[:, None] * D + columns, -(b * s + t), mask=mask)


def places(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows in the order of their labels; and for each row where its label begins and ends there."""
    labels = labels.contiguous()
    named, order = labels.sort(stable=True)
    return order, torch.searchsorted(named, labels), torch.searchsorted(named, labels, right=True)


def sup_con(
    z: Tensor, labels: Tensor, scale: Tensor, normalize: bool, keep: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, shift, total, kept) of `fastssl::sup_con` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows, dim = z.shape
    loss = z.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return loss, loss.clone(), loss.clone(), nothing_kept(z, keep)
    padded, inverse = rows_of_products(z, normalize, precision)
    kept, products = room_for_products(z, keep, rows, rows, precision)
    [(total, shift)] = totals_and_shifts(
        padded, padded, (rows, rows), scale, precision, "diagonal", symmetric=True, kept=products
    )
    of_labels = places(labels)
    sums = room_for_sums(z, rows)
    sum_into(sums, rows, z, of_labels[1], of_labels[0], inverse)
    block = row_block(padded.shape[1])
    _losses[(triton.cdiv(rows, block["BR"]),)](
        z, inverse, *of_labels[1:], sums, scale, total, shift, loss, rows, dim, *z.stride(), **block,
        num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return loss, shift, total, kept


def sup_con_backward(
    grad_loss: Tensor,
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    kept: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(grad_z, grad_scale) of `fastssl::sup_con_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows, dim = z.shape
    if rows == 0:
        return z.new_empty(z.shape), scale.new_zeros(())
    padded, inverse = rows_of_products(z, normalize, precision)
    order, first, last = places(labels)
    shift = shift.contiguous()
    factor, per_positive, weight = (torch.empty_like(shift) for _ in range(3))
    _factors[(triton.cdiv(rows, ROWS_OF_FACTORS),)](
        grad_loss.contiguous(), total.contiguous(), first, last, factor, per_positive, weight, rows,
        BR=ROWS_OF_FACTORS, **OPTIONS,
    )  # fmt: skip
    sums, weighted = room_for_sums(z, rows), room_for_sums(z, rows)
    sum_into(sums, rows, z, first, order, inverse, per_positive, weighted)
    positives, block = sums.new_empty(z.shape), row_block(padded.shape[1])
    _positives[(triton.cdiv(rows, block["BR"]),)](
        first, per_positive, sums, weighted, positives, rows, dim, **block, **OPTIONS
    )
    factors = Factors(shift, factor)
    pairs = Weights(padded, padded, (rows, rows), scale, precision, "both", "diagonal", rows=factors, columns=factors)
    products = accumulate(pairs, kept=kept_products(kept, rows, rows, dim, precision))
    share = z.new_empty(rows, dtype=torch.float64)
    grad_z = projected(z, z, (inverse, inverse), scale, products, weight, share, positives)
    return grad_z, share.sum().mul(0.5).to(scale.dtype)
