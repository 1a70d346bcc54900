"""NT-Xent (SimCLR, arXiv:2002.05709): the family's introduction has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import row_blocks, second_derivative, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights
from fastssl.ops.contrastive._shared import EPS, normalized_rows, through_norms


def _nt_xent_fake(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, ...]:
    return tuple(z1.new_empty(2 * z1.shape[0], dtype=accumulate_dtype(z1.dtype)) for _ in range(3))


def _nt_xent_portable(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, ...]:
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
    return loss, shift, total


def _nt_xent_backward_fake(
    grad_loss: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return z1.new_empty(z1.shape), z2.new_empty(z2.shape), scale.new_empty(())


def _nt_xent_backward_portable(
    grad_loss: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
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
    dz1, dz2 = gradient.to(z1.dtype).split(half) if half else (z1.clone(), z2.clone())
    return dz1.clone(), dz2.clone(), grad_scale


def _nt_xent_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z1, z2, scale, ctx.normalize, ctx.precision = inputs
    _, shift, total = output
    ctx.save_for_backward(z1, z2, scale, shift, total)
    ctx.mark_non_differentiable(shift, total)


def _nt_xent_backward(ctx: Any, backward_op: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    return *backward_op(grad_loss, *ctx.saved_tensors, ctx.normalize, ctx.precision), None, None


def _nt_xent_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_loss, z1, z2, scale, _, _, ctx.normalize, _ = inputs
    ctx.save_for_backward(grad_loss, z1, z2, scale)


def _nt_xent_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_loss, *point = ctx.saved_tensors
    rows = grad_loss.shape[0]

    def loss(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        z1, z2, scale = point
        z = torch.cat([z1, z2])
        z = F.normalize(z, dim=1, eps=EPS) if ctx.normalize else z
        own = torch.arange(rows, device=z.device)
        S = similarity(block, z, z, scale, own)
        aligned = S.gather(1, own.roll(rows // 2)[block, None]).squeeze(1)
        return (cotangents[0][block] * (S.logsumexp(1) - aligned)).sum()

    dtype = accumulate_dtype(point[0].dtype)
    blocks = row_blocks(rows, rows)
    return *second_derivative(loss, blocks, [grad_loss], point, directions, dtype), None, None, None, None


_backward = Op(
    "nt_xent_backward(Tensor grad_loss, Tensor z1, Tensor z2, Tensor scale, Tensor shift, Tensor total, bool normalize,"
    " str precision) -> (Tensor grad_z1, Tensor grad_z2, Tensor grad_scale)",
    fake=_nt_xent_backward_fake,
    portable=_nt_xent_backward_portable,
    setup_context=_nt_xent_backward_setup_context,
    backward=_nt_xent_double_backward,
    cuda=triton_launcher("contrastive", "nt_xent_backward"),
)

nt_xent = Op(
    "nt_xent(Tensor z1, Tensor z2, Tensor scale, bool normalize, str precision)"
    " -> (Tensor loss, Tensor shift, Tensor total)",
    fake=_nt_xent_fake,
    portable=_nt_xent_portable,
    setup_context=_nt_xent_setup_context,
    backward=_nt_xent_backward,
    backward_op=_backward,
    cuda=triton_launcher("contrastive", "nt_xent"),
)
