"""The sigmoid contrastive loss (SigLIP, arXiv:2303.15343): schema, fake kernel, derivatives, and the portable code.

With S = scale x y^T + bias, and the column exclude[i] of row i left out,

    total = sum_ij softplus(S_ij),    W_ij = sigmoid(S_ij)
    dtotal/dx = scale W y,    dtotal/dy = scale W^T x,    dtotal/dscale = <x, W y>,    dtotal/dbias = sum_ij W_ij

A positive pair, whose loss is softplus(-S_ij) and whose weight -sigmoid(-S_ij), is left out here: there are only B.
siglip_loss adds those of the diagonal. There is no normaliser, so a tile's weights are known as soon as it is: the
forward pass takes the gradients too (`derive`), and the backward pass multiplies them by the gradient of total.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import row_blocks, second_derivative, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights


def _similarity_softplus_fake(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None, derive: bool, precision: str
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(x.dtype)
    (m, dim), n = x.shape, y.shape[0]
    gradients = [x.new_empty((rows if derive else 0, dim), dtype=dtype) for rows in (m, n)]
    return x.new_empty((), dtype=dtype), *gradients, scale.new_empty(()), bias.new_empty(())


def _similarity_softplus_portable(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None, derive: bool, precision: str
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(x.dtype)
    rounded_x, rounded_y = (round_operand(t.to(dtype), precision) for t in (x, y))
    dx, dy = (t.new_zeros((t.shape[0] if derive else 0, t.shape[1])) for t in (rounded_x, rounded_y))
    total, dbias = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
    for block in row_blocks(x.shape[0], y.shape[0]):
        S = similarity(block, rounded_x, rounded_y, scale, exclude) + bias
        total -= F.logsigmoid(-S).sum(dtype=torch.float64)  # F.softplus is linear above 20
        if derive:
            weight = S.sigmoid_()
            dbias += weight.sum(dtype=torch.float64)
            weight = round_weights(weight, precision)
            dx[block] = weight @ rounded_y
            dy.addmm_(weight.T, rounded_x[block])
    dscale = (dx * x).sum(dtype=torch.float64) if derive else torch.zeros_like(dbias)
    return total.to(dtype), dx.mul_(scale), dy.mul_(scale), dscale.to(scale.dtype), dbias.to(bias.dtype)


def _similarity_softplus_backward_fake(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    exclude: Tensor | None,
    dx: Tensor,
    dy: Tensor,
    dscale: Tensor,
    dbias: Tensor,
    precision: str,
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(()), bias.new_empty(())


def _similarity_softplus_backward_portable(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    exclude: Tensor | None,
    dx: Tensor,
    dy: Tensor,
    dscale: Tensor,
    dbias: Tensor,
    precision: str,
) -> tuple[Tensor, ...]:
    gradients = zip((dx, dy, dscale, dbias), (x, y, scale, bias), strict=True)
    return tuple((grad_total * gradient).to(t.dtype) for gradient, t in gradients)


def _similarity_softplus_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, y, scale, bias, exclude, _, ctx.precision = inputs
    ctx.save_for_backward(x, y, scale, bias, exclude, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _similarity_softplus_backward(ctx: Any, backward_op: Any, grad_total: Tensor, *_: Tensor) -> tuple:
    return *backward_op(grad_total, *ctx.saved_tensors, ctx.precision), None, None, None


def _similarity_softplus_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6])


def _backward_op(name: str, share: Callable[..., Tensor]) -> Op:
    """The backward operation of `name`, which multiplies its gradients, and has a second derivative: `share`, of a
    block of rows in the total, (rows, x, y, scale, bias, exclude) -> 0-d."""

    def double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
        grad_total, *point, exclude = ctx.saved_tensors

        def total(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
            return cotangents[0] * share(block, *point, exclude)

        blocks = row_blocks(point[0].shape[0], point[1].shape[0])
        gradients = second_derivative(total, blocks, [grad_total], point, directions, accumulate_dtype(point[0].dtype))
        return *gradients, None, None, None, None, None, None

    return Op(
        f"{name}_backward(Tensor grad_total, Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? exclude,"
        " Tensor dx, Tensor dy, Tensor dscale, Tensor dbias, str precision)"
        " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)",
        fake=_similarity_softplus_backward_fake,
        portable=_similarity_softplus_backward_portable,
        setup_context=_similarity_softplus_backward_setup_context,
        backward=double_backward,
    )


def _similarity_softplus_share(
    block: slice, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None
) -> Tensor:
    return -F.logsigmoid(-similarity(block, x, y, scale, exclude) - bias).sum()


similarity_softplus = Op(
    "similarity_softplus(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? exclude, bool derive, str precision)"
    " -> (Tensor total, Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)",
    fake=_similarity_softplus_fake,
    portable=_similarity_softplus_portable,
    setup_context=_similarity_softplus_setup_context,
    backward=_similarity_softplus_backward,
    backward_op=_backward_op("similarity_softplus", _similarity_softplus_share),
    cuda=triton_launcher("sigmoid", "similarity_softplus"),
)


def _siglip_loss_fake(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, derive: bool, precision: str
) -> tuple[Tensor, ...]:
    return _similarity_softplus_fake(x, y, scale, bias, None, derive, precision)


def _siglip_loss(
    softplus: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    derive: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    own = torch.arange(x.shape[0], device=x.device)
    total, dx, dy, dscale, dbias = softplus(x, y, scale, bias, own, derive, precision)
    wide_x, wide_y = x.to(total.dtype), y.to(total.dtype)
    aligned = torch.linalg.vecdot(wide_x, wide_y)
    opposite = -(aligned * scale + bias)
    total = total - F.logsigmoid(-opposite).sum()
    if derive:
        weight = -opposite.sigmoid()
        dscale, dbias = dscale + (weight * aligned).sum(), dbias + weight.sum()
        weight = (weight * scale)[:, None]
        dx, dy = dx + weight * wide_y, dy + weight * wide_x
    return total, dx, dy, dscale.to(scale.dtype), dbias.to(bias.dtype)


def _siglip_loss_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, derive, precision = inputs
    _similarity_softplus_setup_context(ctx, (*tensors, None, derive, precision), output)


def _siglip_loss_derivative(ctx: Any, backward_op: Any, grad_total: Tensor, *_: Tensor) -> tuple:
    return _similarity_softplus_backward(ctx, backward_op, grad_total)[:-1]


def _siglip_loss_share(block: slice, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: None) -> Tensor:
    own = torch.arange(x.shape[0], device=x.device)
    positives = -F.logsigmoid(torch.linalg.vecdot(x[block], y[block]) * scale + bias).sum()
    return _similarity_softplus_share(block, x, y, scale, bias, own) + positives


siglip_loss = Op(
    "siglip_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, bool derive, str precision)"
    " -> (Tensor total, Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)",
    fake=_siglip_loss_fake,
    portable=partial(_siglip_loss, _similarity_softplus_portable),
    setup_context=_siglip_loss_setup_context,
    backward=_siglip_loss_derivative,
    backward_op=_backward_op("siglip_loss", _siglip_loss_share),
    cuda=partial(_siglip_loss, torch.ops.fastssl.similarity_softplus),
)
