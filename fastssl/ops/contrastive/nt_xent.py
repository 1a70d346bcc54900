"""NT-Xent (SimCLR, arXiv:2002.05709): the family's introduction has the formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._norms import EPS, normalized_rows, through_norms
from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights
from fastssl.ops.contrastive._shared import nothing_kept


def _fake(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, keep: int, precision: str) -> tuple[Tensor, ...]:
    rows = (z1.new_empty(2 * z1.shape[0], dtype=accumulate_dtype(z1.dtype)) for _ in range(3))
    return *rows, z1.new_empty(keep, dtype=torch.uint8)


def _portable(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, keep: int, precision: str) -> tuple[Tensor, ...]:
    z = round_operand(normalized_rows(torch.cat([z1, z2]), normalize)[0], precision)
    rows = z.shape[0]
    loss, shift, total = z.new_empty(rows), z.new_empty(rows), z.new_empty(rows)
    positive = torch.arange(rows, device=z.device).roll(rows // 2)
    for block in row_blocks(rows, rows):
        S = (z[block] @ z.T).mul_(scale)
        S.diagonal(block.start).fill_(float("-inf"))
        aligned = S.gather(1, positive[block, None]).squeeze(1)
        shift[block] = S.amax(1)
        total[block] = S.sub_(shift[block, None]).exp_().sum(1)
        loss[block] = total[block].log() + (shift[block] - aligned)
    return loss, shift, total, nothing_kept(z, keep)


def _portable_backward(
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
    z, norms = normalized_rows(torch.cat([z1, z2]), normalize)
    rounded = round_operand(z, precision)
    rows = z.shape[0]
    gradient, coefficient = torch.empty_like(z), grad_loss / total
    for block in row_blocks(rows, rows):
        S = (rounded[block] @ rounded.T).mul_(scale)
        weight = (S - shift[block, None]).exp_().mul_(coefficient[block, None])
        weight += S.sub_(shift).exp_().mul_(coefficient)
        weight.diagonal(block.start).zero_()
        gradient[block] = round_weights(weight, precision) @ rounded
    half = rows // 2
    gradient -= (grad_loss + grad_loss.roll(half))[:, None] * z.roll(half, 0)
    grad_scale = (z * gradient).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    gradient = through_norms(gradient.mul_(scale), z, norms)
    grad_z1, grad_z2 = gradient.to(z1.dtype).split(half) if half else (z1.clone(), z2.clone())
    return grad_z1.clone(), grad_z2.clone(), grad_scale


def _share(rows: slice, grad_loss: Tensor, z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    z = torch.cat([z1, z2])
    z = F.normalize(z, dim=1, eps=EPS) if normalize else z
    own = torch.arange(z.shape[0], device=z.device)
    S = similarity(rows, z, z, scale, own)
    aligned = S.gather(1, own.roll(z1.shape[0])[rows, None]).squeeze(1)
    return (grad_loss[rows] * (S.logsumexp(1) - aligned)).sum()


nt_xent = Op(
    "nt_xent(Tensor z1, Tensor z2, Tensor scale, bool normalize, SymInt keep, str precision)"
    " -> (Tensor loss, Tensor shift, Tensor total, Tensor kept)",
    backward="(Tensor grad_loss, Tensor z1, Tensor z2, Tensor scale, Tensor shift, Tensor total, Tensor kept,"
    " bool normalize, str precision) -> (Tensor grad_z1, Tensor grad_z2, Tensor grad_scale)",
    fake=_fake,
    portable=(_portable, _portable_backward),
    share=_share,
    blocks=lambda grad_loss: row_blocks(grad_loss.shape[0], grad_loss.shape[0]),
    triton="contrastive",
)
