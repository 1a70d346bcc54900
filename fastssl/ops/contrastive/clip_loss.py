"""CLIP's loss (arXiv:2103.00020), over pair_logsumexp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks, second_derivative, similarity
from fastssl.ops._precision import accumulate_dtype
from fastssl.ops.contrastive.pair_logsumexp import pair_logsumexp_backward_portable, pair_logsumexp_portable


def _margin(total: Tensor, shift: Tensor, positive: Tensor) -> Tensor:
    """n - positive, n the log-sum-exp of the negatives: the cross-entropy is its softplus."""
    return total.log() + (shift - positive)


def _clip_loss_fake(x: Tensor, y: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype)) for _ in range(6))


def _clip_loss(pair: Callable[..., Any], x: Tensor, y: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, ...]:
    dtype, own = accumulate_dtype(x.dtype), torch.arange(x.shape[0], device=x.device)
    positive = torch.linalg.vecdot(x.to(dtype), y.to(dtype)) * scale
    sums = pair(x, y, scale, own, precision)
    margins = _margin(*sums[:2], positive), _margin(*sums[2:], positive)
    loss = -(F.logsigmoid(-margins[0]) + F.logsigmoid(-margins[1])) / 2
    return loss, positive, *sums


def _clip_loss_backward_fake(
    grad_loss: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    row_total: Tensor,
    row_shift: Tensor,
    column_total: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(())


def _clip_loss_backward(
    pair_backward: Callable[..., Any],
    grad_loss: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    row_total: Tensor,
    row_shift: Tensor,
    column_total: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, own = positive.dtype, torch.arange(x.shape[0], device=x.device)
    slopes, grad_totals = [], []
    for total, shift in ((row_total, row_shift), (column_total, column_shift)):
        slopes.append(_margin(total, shift, positive).sigmoid() * grad_loss / 2)
        grad_totals.append((slopes[-1] / total).where(total != 0, 0))
    # In the dtype of sums, where the positives' terms are still to be added.
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    dx, dy, dscale = pair_backward(*grad_totals, wide_x, wide_y, scale, own, row_shift, column_shift, precision)
    weight = -(slopes[0] + slopes[1])
    dscale = dscale + (weight * torch.linalg.vecdot(wide_x, wide_y)).sum()
    weight = (weight * scale)[:, None]
    return (dx + weight * wide_y).to(x.dtype), (dy + weight * wide_x).to(y.dtype), dscale


def _clip_loss_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _clip_loss_derivative(ctx: Any, backward_op: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    return *backward_op(grad_loss, *ctx.saved_tensors, ctx.precision), None


def _clip_loss_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _clip_loss_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_loss, *point = ctx.saved_tensors
    count = grad_loss.shape[0]

    def loss(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        x, y, scale = point
        target = torch.arange(count, device=x.device)[block]
        sides = [similarity(block, a, b, scale, None) for a, b in ((x, y), (y, x))]
        losses = [S.logsumexp(1) - S.gather(1, target[:, None]).squeeze(1) for S in sides]
        return (cotangents[0][block] * (losses[0] + losses[1]) / 2).sum()

    dtype = accumulate_dtype(point[0].dtype)
    gradients = second_derivative(loss, row_blocks(count, count), [grad_loss], point, directions, dtype)
    return *gradients, None, None, None, None, None, None


_clip_loss_backward_op = Op(
    "clip_loss_backward(Tensor grad_loss, Tensor x, Tensor y, Tensor scale, Tensor positive, Tensor row_total,"
    " Tensor row_shift, Tensor column_total, Tensor column_shift, str precision)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_clip_loss_backward_fake,
    portable=partial(_clip_loss_backward, pair_logsumexp_backward_portable),
    setup_context=_clip_loss_backward_setup_context,
    backward=_clip_loss_double_backward,
    cuda=partial(_clip_loss_backward, torch.ops.fastssl.pair_logsumexp_backward),
)

clip_loss = Op(
    "clip_loss(Tensor x, Tensor y, Tensor scale, str precision) -> (Tensor loss, Tensor positive, Tensor row_total,"
    " Tensor row_shift, Tensor column_total, Tensor column_shift)",
    fake=_clip_loss_fake,
    portable=partial(_clip_loss, pair_logsumexp_portable),
    setup_context=_clip_loss_setup_context,
    backward=_clip_loss_derivative,
    backward_op=_clip_loss_backward_op,
    cuda=partial(_clip_loss, torch.ops.fastssl.pair_logsumexp),
)
