"""The supervised contrastive loss (arXiv:2004.11362), over self_logsumexp."""

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
from fastssl.ops.contrastive._shared import EPS, normalized_rows, through_norms
from fastssl.ops.contrastive.self_logsumexp import self_logsumexp_backward_portable, self_logsumexp_portable


def class_sums(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x the sum of the rows of its label, in the dtype of sums, and their number."""
    labels = labels.contiguous()
    order = labels.sort().values
    first = torch.searchsorted(order, labels)
    count = torch.searchsorted(order, labels, right=True) - first
    x = x.to(accumulate_dtype(x.dtype))
    # As many sums as rows, most of them empty, so that nobody need wait for the number of labels.
    return torch.zeros_like(x).index_add(0, first, x).index_select(0, first), count


def _sup_con_fake(
    z: Tensor, labels: Tensor, scale: Tensor, normalize: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(z.new_empty(z.shape[0], dtype=accumulate_dtype(z.dtype)) for _ in range(3))


def _sup_con(
    logsumexp: Callable[..., Any], z: Tensor, labels: Tensor, scale: Tensor, normalize: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    z, _ = normalized_rows(z, normalize)
    total, shift = logsumexp(z, scale, precision)
    sums, count = class_sums(z, labels)
    aligned = torch.linalg.vecdot(z, sums - z) / (count - 1)
    return (total.log() + (shift - aligned * scale)).where(count > 1, 0), shift, total


def _sup_con_backward_fake(
    grad_loss: Tensor,
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(())


def _sup_con_backward(
    logsumexp_backward: Callable[..., Any],
    grad_loss: Tensor,
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    rows, norms = normalized_rows(z, normalize)
    sums, count = class_sums(rows, labels)
    grad_total, share = ((grad_loss / x).where(count > 1, 0) for x in (total, count - 1))
    gradient, dscale = logsumexp_backward(grad_total, rows, scale, shift, precision)
    share = share[:, None]
    positives = share * (sums - 2 * rows) + class_sums(share * rows, labels)[0]
    dscale = dscale - (rows * positives).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    return through_norms(gradient - scale * positives, rows, norms).to(z.dtype), dscale


def _sup_con_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normalize, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _sup_con_derivative(ctx: Any, backward_op: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    dz, dscale = backward_op(grad_loss, *ctx.saved_tensors, ctx.normalize, ctx.precision)
    return dz, None, dscale, None, None


def _sup_con_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, _, ctx.normalize, _ = inputs
    ctx.save_for_backward(*tensors)


def _sup_con_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_loss, z, labels, scale = ctx.saved_tensors
    rows = z.shape[0]

    def loss(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        z, scale = point
        z = F.normalize(z, dim=1, eps=EPS) if ctx.normalize else z
        own = torch.arange(rows, device=z.device)
        S = similarity(block, z, z, scale, own)
        positive = (labels[block, None] == labels) & (own[block, None] != own)
        count = positive.sum(1)
        losses = S.logsumexp(1) - S.where(positive, 0).sum(1) / count.clamp_min(1)
        return (cotangents[0][block] * losses.where(count > 0, 0)).sum()

    dtype = accumulate_dtype(z.dtype)
    dgrad, dz, dscale = second_derivative(loss, row_blocks(rows, rows), [grad_loss], (z, scale), directions, dtype)
    return dgrad, dz, None, dscale, None, None, None, None


_sup_con_backward_op = Op(
    "sup_con_backward(Tensor grad_loss, Tensor z, Tensor labels, Tensor scale, Tensor shift, Tensor total,"
    " bool normalize, str precision) -> (Tensor grad_z, Tensor grad_scale)",
    fake=_sup_con_backward_fake,
    portable=partial(_sup_con_backward, self_logsumexp_backward_portable),
    setup_context=_sup_con_backward_setup_context,
    backward=_sup_con_double_backward,
    cuda=partial(_sup_con_backward, torch.ops.fastssl.self_logsumexp_backward),
)

sup_con = Op(
    "sup_con(Tensor z, Tensor labels, Tensor scale, bool normalize, str precision)"
    " -> (Tensor loss, Tensor shift, Tensor total)",
    fake=_sup_con_fake,
    portable=partial(_sup_con, self_logsumexp_portable),
    setup_context=_sup_con_setup_context,
    backward=_sup_con_derivative,
    backward_op=_sup_con_backward_op,
    cuda=partial(_sup_con, torch.ops.fastssl.self_logsumexp),
)
