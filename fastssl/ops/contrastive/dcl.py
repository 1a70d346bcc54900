"""The decoupled contrastive loss (DCL, arXiv:2110.06848), over pair_logsumexp and self_logsumexp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._norms import EPS, normalized_rows, through_norms
from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks, similarity
from fastssl.ops._precision import accumulate_dtype
from fastssl.ops.contrastive.pair_logsumexp import pair_logsumexp_portable, pair_logsumexp_portable_backward
from fastssl.ops.contrastive.self_logsumexp import self_logsumexp_portable, self_logsumexp_portable_backward

Launchers = tuple[Callable[..., Any], Callable[..., Any]]  # of pair_logsumexp and self_logsumexp


def _fake(
    z1: Tensor, z2: Tensor, weight: Tensor, scale: Tensor, normalize: bool, keep: int, precision: str
) -> tuple[Tensor, ...]:
    rows = (z1.new_empty(2 * z1.shape[0], dtype=accumulate_dtype(z1.dtype)) for _ in range(4))
    return *rows, z1.new_empty(keep, dtype=torch.uint8)


def _forward(
    sums_of: Launchers,
    z1: Tensor,
    z2: Tensor,
    weight: Tensor,
    scale: Tensor,
    normalize: bool,
    keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    of_pair, of_self = sums_of
    views = x, y = [normalized_rows(z, normalize)[0] for z in (z1, z2)]
    own = torch.arange(x.shape[0], device=x.device)
    *across, kept = of_pair(x, y, scale, own, keep, precision)
    within = [of_self(z, scale, 0, precision)[:2] for z in views]
    # Each row's sums over both views, about the larger of their shifts.
    totals, shifts = ([torch.cat(across[i::2]), torch.cat([sums[i] for sums in within])] for i in range(2))
    shift = torch.maximum(*shifts)
    total = sum(t * (s - shift).exp() for t, s in zip(totals, shifts, strict=True))
    positive = (torch.linalg.vecdot(x, y) * scale).repeat(2)
    return total.log() + (shift - weight * positive), positive, shift, total, kept


def _backward(
    derive: Launchers,
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
    of_pair, of_self = derive
    (x, norms_x), (y, norms_y) = (normalized_rows(z, normalize) for z in (z1, z2))
    own = torch.arange(x.shape[0], device=x.device)
    grad_totals = (grad_loss / total).where(total != 0, 0).tensor_split(2)
    shifts = shift.tensor_split(2)
    grad_x, grad_y, grad_scale = of_pair(*grad_totals, x, y, scale, own, *shifts, kept, precision)
    pull = (grad_loss * weight).view(2, -1).sum(0)
    grad_scale = grad_scale - (pull * torch.linalg.vecdot(x, y)).sum()
    pull = (pull * scale)[:, None]
    gradients = []
    nothing = kept[:0]
    for i, (z, other, norms, gradient) in enumerate(((x, y, norms_x, grad_x), (y, x, norms_y, grad_y))):
        within, of_scale = of_self(grad_totals[i], z, scale, shifts[i], nothing, precision)
        grad_scale = grad_scale + of_scale
        gradients.append(through_norms(gradient + within - pull * other, z, norms).to(z1.dtype))
    return *gradients, -grad_loss * positive, grad_scale


def _share(
    rows: slice, grad_loss: Tensor, z1: Tensor, z2: Tensor, weight: Tensor, scale: Tensor, normalize: bool
) -> Tensor:
    z = torch.cat([z1, z2])
    z = F.normalize(z, dim=1, eps=EPS) if normalize else z
    own = torch.arange(z.shape[0], device=z.device)
    partner = own.roll(z1.shape[0])[rows, None]
    S = similarity(rows, z, z, scale, own)
    negatives = S.masked_fill(own == partner, float("-inf")).logsumexp(1)
    return (grad_loss[rows] * (negatives - weight[rows] * S.gather(1, partner).squeeze(1))).sum()


dcl = Op(
    "dcl(Tensor z1, Tensor z2, Tensor weight, Tensor scale, bool normalize, SymInt keep, str precision)"
    " -> (Tensor loss, Tensor positive, Tensor shift, Tensor total, Tensor kept)",
    backward="(Tensor grad_loss, Tensor z1, Tensor z2, Tensor weight, Tensor scale, Tensor positive, Tensor shift,"
    " Tensor total, Tensor kept, bool normalize, str precision)"
    " -> (Tensor grad_z1, Tensor grad_z2, Tensor grad_weight, Tensor grad_scale)",
    fake=_fake,
    portable=(
        partial(_forward, (pair_logsumexp_portable, self_logsumexp_portable)),
        partial(_backward, (pair_logsumexp_portable_backward, self_logsumexp_portable_backward)),
    ),
    share=_share,
    blocks=lambda grad_loss: row_blocks(grad_loss.shape[0], grad_loss.shape[0]),
    triton="contrastive",
)
