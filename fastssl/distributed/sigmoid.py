"""The sum of softplus over the rows of all processes.

Forward, y travels and takes along its gradient. Backward is a multiplication; where the processes' losses have unequal
gradients, it is the forward pass once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastssl.distributed.processes import all_gather, uncompiled
from fastssl.distributed.ring import Ring, Tensors, add, check_first_derivative


@uncompiled
def similarity_softplus(
    ring: Ring, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None, precision: str
) -> Tensor:
    """The sum of softplus(scale x y^T + bias), with all processes' y."""
    derive = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale, bias))
    return _SimilaritySoftplus.apply(ring, x, y, scale, bias, exclude, derive, precision)


class _SimilaritySoftplus(Function):
    @staticmethod
    def forward(
        ctx: Any,
        ring: Ring,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        exclude: Tensor | None,
        derive: bool,
        precision: str,
    ) -> Tensor:
        total, *gradients = _softplus_ring(ring, x, y, scale, bias, exclude, derive, precision)
        ctx.ring, ctx.precision = ring, precision
        ctx.save_for_backward(x, y, scale, bias, exclude, *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple:
        check_first_derivative()
        x, y, scale, bias, exclude, *gradients = ctx.saved_tensors
        inputs = x, y, scale, bias
        dx, dy, dscale, dbias = (grad_total * g for g in gradients)
        everyone = grad_total.new_empty(ctx.ring.size)
        all_gather(everyone, grad_total.reshape(1), ctx.ring.group)
        first, *others = everyone.tolist()  # the host waits for them: whether to go round again is for it to say
        if any(g != first for g in others):
            dy = _softplus_ring(ctx.ring, *inputs, exclude, True, ctx.precision, grad_total)[2]
        gradients = (g.to(t.dtype) for g, t in zip((dx, dy, dscale, dbias), inputs, strict=True))
        return None, *gradients, None, None, None


def _softplus_ring(
    ring: Ring,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    exclude: Tensor | None,
    derive: bool,
    precision: str,
    weight: Tensor | None = None,
) -> Tensors:
    """(total, dx, dy, dscale, dbias), dy being the sum of every process's, times its weight."""
    own: Tensors = ()

    def visit(step: int, y: Tensor) -> Tensors:
        nonlocal own
        total, dx, dy, dscale, dbias = ring.op("similarity_softplus")(
            x, y, scale, bias, None if step else exclude, derive, precision
        )
        share = total, dx, dscale, dbias
        own = add(own, share) if own else share
        return (dy if weight is None else weight * dy,) if derive else ()

    luggage = ring.travel((y,), visit, add)
    total, dx, dscale, dbias = own
    return total, dx, luggage[0] if derive else torch.empty_like(dx), dscale, dbias
