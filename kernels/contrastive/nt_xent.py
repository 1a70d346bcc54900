"""NT-Xent (SimCLR, arXiv:2002.05709) on the GPU.

With z the N = 2B (normalised) rows of [z1; z2], S = scale z z^T and pos(i) = (i + B) mod N:

    lse_i  = log sum_{j != i} exp(S_ij) = shift_i + log(total_i)
    loss_i = lse_i - S_{i, pos(i)}

and, given g_i = dL/dloss_i, with p_ij = exp(S_ij - lse_i):

    W_ij     = g_i p_ij + g_j p_ji - [j = pos(i)] (g_i + g_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G = W z,      dL/dscale = 1/2 sum_i <z_i, G_i>
    dL/dx_i  = (dL/dz_i - <dL/dz_i, z_i> z_i) / |x_i|    where rows were normalised, z = x / |x|

Algorithm and cost. Forward: sums.py, 1/2 U, in units U = 2 N N D floating-point operations. Backward: `accumulate`,
2 U, for wide rows 1.5 U, or 1 U with products that the forward pass has kept; `_project` adds the splits and the
positives, and applies scale and the derivative of the normalisation.

Numerics: norms and row products are float64. The positive's entry in W, g_i (p - 1), is where a confident model's
gradient cancels: it is left out of the rounded W, and `_project` adds it in float32, from the same S that the sums
contain.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.accumulate import accumulate
from fastssl.kernels.common.kept import kept_products, nothing_kept, room_for_products
from fastssl.kernels.common.launch import OPTIONS, PEAK, row_block
from fastssl.kernels.common.rows import load_rows, pad_views, unit
from fastssl.kernels.common.tiles import COUNTS, EPS
from fastssl.kernels.common.weights import Factors, Weights, load_factors, power_of_two
from fastssl.kernels.contrastive.sums import Positives, totals_and_shifts


@triton.jit
def _positive_weight(shift, coefficient, total, peak, x, i, inside, N):
    """The g_i (p - 1) of the positive, whose S is x, scaled like W."""
    shift_i, scaled = load_factors(shift, coefficient, PEAK / power_of_two(tl.load(peak)), i, N)
    denominator = tl.load(total + i, mask=inside, other=1.0)
    return scaled * (tl.exp(x - shift_i) - denominator)


@triton.jit
def _total_gradient(
    gradient, weight, partner, inverse_partner, rows, columns, z1, z2, B, D,
    row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A tile of G: the sum over the splits, and the positive's term."""
    x = load_rows(z1, z2, partner, columns, B, 2 * B, D, row_stride1, column_stride1, row_stride2, column_stride2)
    acc = weight * unit(x, inverse_partner)
    for split in range(splits):
        at = (rows + split * padded_rows) * PADDED + columns
        acc += tl.load(gradient + at, mask=(rows < 2 * B) & (columns < D), other=0.0)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _project(
    z1, z2, inverse, scale, shift, coefficient, total, pull, peak, aligned, gradient, grad_z1, grad_z2, grad_scale,
    B, D, row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradients of z1 and z2 from G, and each row's share of that of scale. `pull`, if there, is minus each row's
    gradient by its positive's S; else NT-Xent's is taken."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < 2 * B
    partner = tl.where(row < B, row + B, row - B)
    factor = tl.load(inverse + row, mask=inside, other=1.0)[:, None]
    factor_partner = tl.load(inverse + partner, mask=inside, other=1.0)[:, None]
    if pull is not None:
        weight = tl.load(pull + row, mask=inside, other=0.0) + tl.load(pull + partner, mask=inside, other=0.0)
        weight *= -PEAK / power_of_two(tl.load(peak))
    else:
        S = tl.load(aligned + tl.minimum(row, partner), mask=inside, other=0.0)
        weight = _positive_weight(shift, coefficient, total, peak, S, row, inside, 2 * B)
        weight += _positive_weight(shift, coefficient, total, peak, S, partner, inside, 2 * B)
    weight = weight[:, None]
    partner = tl.where(inside, partner, 2 * B)[:, None]
    shares = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = load_rows(z1, z2, rows, columns, B, 2 * B, D, row_stride1, column_stride1, row_stride2, column_stride2)
        g = _total_gradient(
            gradient, weight, partner, factor_partner, rows, columns, z1, z2, B, D,
            row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits, BR, BD,
        )  # fmt: skip
        shares += unit(x, factor).to(tl.float64) * g
    along = tl.sum(shares, 1)
    unscale = power_of_two(tl.load(peak)) / PEAK
    tl.store(grad_scale + row, 0.5 * unscale * along, mask=inside)
    along = tl.where(factor < 1 / EPS, along[:, None], 0.0).to(tl.float32)  # a clamped norm is a constant
    output_scale = tl.load(scale) * unscale
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        g = _total_gradient(
            gradient, weight, partner, factor_partner, rows, columns, z1, z2, B, D,
            row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits, BR, BD,
        )  # fmt: skip
        if NORMALIZE:
            x = load_rows(z1, z2, rows, columns, B, 2 * B, D, row_stride1, column_stride1, row_stride2, column_stride2)
            g = unit(g - along * unit(x, factor), factor)
        out = (g * output_scale).to(grad_z1.dtype.element_ty)
        tl.store(grad_z1 + rows * D + columns, out, mask=(rows < B) & (columns < D))
        tl.store(grad_z2 + (rows - B) * D + columns, out, mask=(rows >= B) & inside[:, None] & (columns < D))


def sums_and_kept(
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    normalize: bool,
    keep: int,
    precision: str,
    exclude_by: str,
    positives: Positives,
) -> tuple[Tensor, Tensor, Tensor]:
    """(shift, total, kept), and the losses, in `positives`, of at least one pair of rows."""
    rows = 2 * z1.shape[0]
    z, _ = pad_views(z1, z2, normalize, precision)
    kept, products = room_for_products(z1, keep, rows, rows, precision)
    [(total, shift)] = totals_and_shifts(
        z, z, (rows, rows), scale, precision, exclude_by, symmetric=True, positives=positives, kept=products
    )
    return shift, total, kept


def through_tiles(
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    factors: Factors,
    total: Tensor,
    pull: Tensor | None,
    kept: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z1, z2 and scale, from the factors of the rows' exponentials; `pull`: see `_project`."""
    batch, dim = z1.shape
    grad_z1, grad_z2 = z1.new_empty(z1.shape), z2.new_empty(z2.shape)
    z, inverse = pad_views(z1, z2, normalize, precision)
    aligned, grad_scale = torch.empty_like(total), torch.empty_like(inverse)
    pairs = Weights(z, z, (2 * batch, 2 * batch), scale, precision, "both", "partner", rows=factors, columns=factors)
    products = kept_products(kept, 2 * batch, 2 * batch, dim, precision)
    sums = accumulate(pairs, aligned=aligned, kept=products)
    splits, padded_rows, padded = sums.gradient.shape
    block = row_block(padded)
    of_positives = (*factors, total, None, sums.peak, aligned)
    if pull is not None:
        of_positives = (None, None, None, pull, sums.peak, None)
    _project[(triton.cdiv(2 * batch, block["BR"]),)](
        z1, z2, inverse, scale, *of_positives, sums.gradient, grad_z1, grad_z2, grad_scale, batch, dim,
        *z1.stride(), *z2.stride(), padded, padded_rows, splits, normalize, **block, **OPTIONS,
    )  # fmt: skip
    return grad_z1, grad_z2, grad_scale.sum().to(scale.dtype)


def nt_xent(
    z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, keep: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, shift, total, kept) of `fastssl::nt_xent` for CUDA tensors; see fastssl/ops/contrastive/."""
    loss, aligned = (z1.new_empty(2 * z1.shape[0], dtype=torch.float32) for _ in range(2))
    if z1.shape[0] == 0:
        return loss, loss.clone(), loss.clone(), nothing_kept(z1, keep)
    positives = Positives(loss, aligned, None)
    return loss, *sums_and_kept(z1, z2, scale, normalize, keep, precision, "diagonal", positives)


def nt_xent_backward(
    grad_loss: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    kept: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_z1, grad_z2, grad_scale) of `fastssl::nt_xent_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    if z1.shape[0] == 0:
        return z1.new_empty(z1.shape), z2.new_empty(z2.shape), scale.new_zeros(())
    total = total.contiguous()
    factors = Factors(shift.contiguous(), grad_loss / total)
    return through_tiles(z1, z2, scale, factors, total, None, kept, normalize, precision)
