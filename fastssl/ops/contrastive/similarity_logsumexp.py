"""The log-sum-exp of each row of similarities, with the weighted sum of the other rows beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import row_blocks, second_derivative, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights
from fastssl.ops.contrastive._shared import sums_of_exponentials


def _similarity_logsumexp_fake(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    rows, dim = x.shape
    return *(x.new_empty(rows, dtype=dtype) for _ in range(2)), x.new_empty((rows if weigh else 0, dim), dtype=dtype)


def _similarity_logsumexp_portable(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (round_operand(t.to(accumulate_dtype(t.dtype)), precision) for t in (x, y))
    rows, dim = x.shape
    total, shift, weighted = x.new_zeros(rows), x.new_zeros(rows), x.new_zeros(rows if weigh else 0, dim)
    for block in row_blocks(rows, y.shape[0]):
        S = similarity(block, x, y, scale, exclude)
        total[block], shift[block] = sums_of_exponentials(S, 1)
        if weigh:
            weighted[block] = round_weights(S.sub_(shift[block, None]).exp_(), precision) @ y
    return total, shift, weighted


def _similarity_logsumexp_backward_fake(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    shift: Tensor,
    weighted: Tensor,
    needs_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty((y.shape[0] if needs_y else 0, y.shape[1])), scale.new_empty(())


def _similarity_logsumexp_backward_portable(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    shift: Tensor,
    weighted: Tensor,
    needs_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = (grad_total * scale)[:, None] * weighted
    dscale = (grad_total[:, None] * weighted * x).sum(dtype=torch.float64).to(scale.dtype)
    dy = weighted.new_zeros((y.shape[0] if needs_y else 0, y.shape[1]))
    if needs_y:
        rounded_x, rounded_y = (round_operand(t.to(dy.dtype), precision) for t in (x, y))
        for block in row_blocks(x.shape[0], y.shape[0]):
            S = similarity(block, rounded_x, rounded_y, scale, exclude)
            weight = S.sub_(shift[block, None]).exp_().mul_(grad_total[block, None])
            dy.addmm_(round_weights(weight, precision).T, rounded_x[block])
        dy *= scale
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def _similarity_logsumexp_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, ctx.y, scale, exclude, _, ctx.precision = inputs
    _, shift, weighted = output
    # save_for_backward would refuse to go on once y has been overwritten, which harms nothing if y needs no gradient.
    ctx.y_version = ctx.y._version
    ctx.save_for_backward(x, scale, exclude, shift, weighted)
    ctx.mark_non_differentiable(shift, weighted)


def _similarity_logsumexp_backward(ctx: Any, backward_op: Any, grad_total: Tensor, *_: Tensor) -> tuple:
    x, scale, exclude, shift, weighted = ctx.saved_tensors
    needs_y = ctx.needs_input_grad[1]
    if (needs_y or torch.is_grad_enabled()) and ctx.y._version != ctx.y_version:
        what = "its gradient" if needs_y else "a second derivative"
        raise RuntimeError(
            f"y was modified in place after the forward pass, and {what} needs its values:"
            f" it is at version {ctx.y._version}, expected {ctx.y_version}"
        )
    dx, dy, dscale = backward_op(grad_total, x, ctx.y, scale, exclude, shift, weighted, needs_y, ctx.precision)
    return dx, dy if needs_y else None, dscale, None, None, None


def _similarity_logsumexp_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_total, x, y, scale, exclude, shift, _, ctx.needs_y, _ = inputs
    ctx.save_for_backward(grad_total, x, y, scale, exclude, shift)


def _similarity_logsumexp_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_total, *point, exclude, shift = ctx.saved_tensors
    if not ctx.needs_y:
        directions = directions[0], torch.zeros_like(point[1]), directions[2]

    def total(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        return (cotangents[0][block] * (similarity(block, *point, exclude) - shift[block, None]).exp().sum(1)).sum()

    blocks = row_blocks(point[0].shape[0], point[1].shape[0])
    gradients = second_derivative(total, blocks, [grad_total], point, directions, shift.dtype)
    return *gradients, None, None, None, None, None


_similarity_logsumexp_backward_op = Op(
    "similarity_logsumexp_backward(Tensor grad_total, Tensor x, Tensor y, Tensor scale, Tensor? exclude, Tensor shift,"
    " Tensor weighted, bool needs_y, str precision) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_similarity_logsumexp_backward_fake,
    portable=_similarity_logsumexp_backward_portable,
    setup_context=_similarity_logsumexp_backward_setup_context,
    backward=_similarity_logsumexp_double_backward,
    cuda=triton_launcher("contrastive", "similarity_logsumexp_backward"),
)

similarity_logsumexp = Op(
    "similarity_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? exclude, bool weigh, str precision)"
    " -> (Tensor total, Tensor shift, Tensor weighted)",
    fake=_similarity_logsumexp_fake,
    portable=_similarity_logsumexp_portable,
    setup_context=_similarity_logsumexp_setup_context,
    backward=_similarity_logsumexp_backward,
    backward_op=_similarity_logsumexp_backward_op,
    cuda=triton_launcher("contrastive", "similarity_logsumexp"),
)
