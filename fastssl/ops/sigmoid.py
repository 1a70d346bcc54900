"""The sigmoid contrastive loss (SigLIP, arXiv:2303.15343): schema, fake kernel, derivatives, and the portable code.

With S = scale x y^T + bias, and the column exclude[i] of row i left out,

    total = sum_ij softplus(S_ij),    W_ij = sigmoid(S_ij)
    dtotal/dx = scale W y,    dtotal/dy = scale W^T x,    dtotal/dscale = <x, W y>,    dtotal/dbias = sum_ij W_ij

A positive pair, whose loss is softplus(-S_ij) and whose weight -sigmoid(-S_ij), is left out here: there are only B.
siglip_loss adds those of the diagonal. There is no normaliser, so a tile's weights are known as soon as it is: the
forward pass takes the gradients too (`derive`), and the backward pass multiplies them by the gradient of total.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import pair_blocks, row_blocks, similarity
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
    grad_x, grad_y = (t.new_zeros((t.shape[0] if derive else 0, t.shape[1])) for t in (rounded_x, rounded_y))
    total, grad_bias = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
    for block in row_blocks(x.shape[0], y.shape[0]):
        S = similarity(block, rounded_x, rounded_y, scale, exclude) + bias
        total -= F.logsigmoid(-S).sum(dtype=torch.float64)  # F.softplus is linear above 20
        if derive:
            weight = S.sigmoid_()
            grad_bias += weight.sum(dtype=torch.float64)
            weight = round_weights(weight, precision)
            grad_x[block] = weight @ rounded_y
            grad_y.addmm_(weight.T, rounded_x[block])
    grad_scale = (grad_x * x).sum(dtype=torch.float64) if derive else torch.zeros_like(grad_bias)
    return total.to(dtype), grad_x.mul_(scale), grad_y.mul_(scale), grad_scale.to(scale.dtype), grad_bias.to(bias.dtype)


def _backward(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    kept_x: Tensor,
    kept_y: Tensor,
    kept_scale: Tensor,
    kept_bias: Tensor,
    exclude: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Of both operations: the forward pass has taken the gradients."""
    pairs = zip((kept_x, kept_y, kept_scale, kept_bias), (x, y, scale, bias), strict=True)
    return tuple((grad_total * kept).to(t.dtype) for kept, t in pairs)


def _similarity_softplus_share(
    rows: slice, grad_total: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None
) -> Tensor:
    return -grad_total * F.logsigmoid(-similarity(rows, x, y, scale, exclude) - bias).sum()


similarity_softplus = Op(
    "similarity_softplus(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? exclude, bool derive, str precision)"
    " -> (Tensor total, Tensor kept_x, Tensor kept_y, Tensor kept_scale, Tensor kept_bias)",
    backward="(Tensor grad_total, Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor kept_x, Tensor kept_y,"
    " Tensor kept_scale, Tensor kept_bias, Tensor? exclude)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)",
    fake=_similarity_softplus_fake,
    portable=(_similarity_softplus_portable, _backward),
    share=_similarity_softplus_share,
    blocks=pair_blocks,
    cuda=(triton_launcher("sigmoid", "similarity_softplus"), None),
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
    total, grad_x, grad_y, grad_scale, grad_bias = softplus(x, y, scale, bias, own, derive, precision)
    wide_x, wide_y = x.to(total.dtype), y.to(total.dtype)
    aligned = torch.linalg.vecdot(wide_x, wide_y)
    opposite = -(aligned * scale + bias)
    total = total - F.logsigmoid(-opposite).sum()
    if derive:
        weight = -opposite.sigmoid()
        grad_scale, grad_bias = grad_scale + (weight * aligned).sum(), grad_bias + weight.sum()
        weight = (weight * scale)[:, None]
        grad_x, grad_y = grad_x + weight * wide_y, grad_y + weight * wide_x
    return total, grad_x, grad_y, grad_scale.to(scale.dtype), grad_bias.to(bias.dtype)


def _siglip_loss_share(rows: slice, grad_total: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    own = torch.arange(x.shape[0], device=x.device)
    positives = F.logsigmoid(torch.linalg.vecdot(x[rows], y[rows]) * scale + bias).sum()
    return _similarity_softplus_share(rows, grad_total, x, y, scale, bias, own) - grad_total * positives


siglip_loss = Op(
    "siglip_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, bool derive, str precision)"
    " -> (Tensor total, Tensor kept_x, Tensor kept_y, Tensor kept_scale, Tensor kept_bias)",
    backward="(Tensor grad_total, Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor kept_x, Tensor kept_y,"
    " Tensor kept_scale, Tensor kept_bias) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)",
    fake=_siglip_loss_fake,
    portable=(partial(_siglip_loss, _similarity_softplus_portable), _backward),
    share=_siglip_loss_share,
    blocks=pair_blocks,
    cuda=(partial(_siglip_loss, torch.ops.fastssl.similarity_softplus), None),
)
