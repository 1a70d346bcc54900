"""The decoupled contrastive loss (DCL, arXiv:2110.06848) on the GPU: NT-Xent whose sums leave out the positive.

With z the N = 2B (normalised) rows of [z1; z2], S = scale z z^T, pos(i) = (i + B) mod N and weights w_i:

    n_i    = log sum_{j != i, pos(i)} exp(S_ij) = shift_i + log(total_i)
    loss_i = n_i - w_i S_{i, pos(i)}

and, given g_i = dL/dloss_i, with a_i = g_i / total_i:

    W_ij     = a_i exp(S_ij - shift_i) + a_j exp(S_ij - shift_j) - [j = pos(i)] (g_i w_i + g_j w_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G = W z,      dL/dscale = 1/2 sum_i <z_i, G_i>,      dL/dw_i = -g_i S_{i, pos(i)}

Algorithm, cost and numerics are NT-Xent's (nt_xent.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.kept import nothing_kept
from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.tiles import COUNTS
from fastssl.kernels.common.weights import Factors
from fastssl.kernels.contrastive.nt_xent import sums_and_kept, through_tiles
from fastssl.kernels.contrastive.sums import Positives

ROWS_OF_FACTORS = 256  # of a program that computes them


@triton.jit(do_not_specialize=COUNTS)
def _factors(gradient, weight, positive, total, factor, pull, grad_weight, N, BR: tl.constexpr):
    """a_i, g_i w_i, and the gradient of w_i."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < N
    g = tl.load(gradient + i, mask=inside, other=0.0)
    acc = tl.load(total + i, mask=inside, other=1.0)
    tl.store(factor + i, tl.where(acc == 0, 0.0, g / acc), mask=inside)
    tl.store(pull + i, g * tl.load(weight + i, mask=inside, other=0.0), mask=inside)
    tl.store(grad_weight + i, -g * tl.load(positive + i, mask=inside, other=0.0), mask=inside)


def dcl(
    z1: Tensor, z2: Tensor, weight: Tensor, scale: Tensor, normalize: bool, keep: int, precision: str
) -> tuple[Tensor, ...]:
    """`fastssl::dcl` for CUDA tensors; see fastssl/ops/contrastive/."""
    loss, positive = (z1.new_empty(2 * z1.shape[0], dtype=torch.float32) for _ in range(2))
    if z1.shape[0] == 0:
        return *(loss.clone() for _ in range(4)), nothing_kept(z1, keep)
    positives = Positives(loss, positive, weight.contiguous())
    shift, total, kept = sums_and_kept(z1, z2, scale, normalize, keep, precision, "partner", positives)
    return loss, positive, shift, total, kept


def dcl_backward(
    grad_loss: Tensor,
    z1: Tensor,
    z2: Tensor,
    weight: Tensor,
    scale: Tensor,
    positive: Tensor,
    shift: Tensor,
    total: Tensor,
    kept: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastssl::dcl_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    if z1.shape[0] == 0:
        return z1.new_empty(z1.shape), z2.new_empty(z2.shape), torch.empty_like(weight), scale.new_zeros(())
    total = total.contiguous()
    factor, pull, grad_weight = (torch.empty_like(total) for _ in range(3))
    _factors[(triton.cdiv(len(total), ROWS_OF_FACTORS),)](
        grad_loss.contiguous(), weight.contiguous(), positive.contiguous(), total, factor, pull, grad_weight,
        len(total), BR=ROWS_OF_FACTORS, **OPTIONS,
    )  # fmt: skip
    factors = Factors(shift.contiguous(), factor)
    grad_z1, grad_z2, grad_scale = through_tiles(z1, z2, scale, factors, total, pull, kept, normalize, precision)
    return grad_z1, grad_z2, grad_weight, grad_scale
