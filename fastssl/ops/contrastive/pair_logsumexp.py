"""The log-sum-exps of each row and of each column of similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import row_blocks, second_derivative, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights
from fastssl.ops.contrastive._shared import sums_of_exponentials


def _pair_logsumexp_fake(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    return tuple(t.new_empty(t.shape[0], dtype=dtype) for t in (x, x, y, y))


def pair_logsumexp_portable(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = (round_operand(t.to(accumulate_dtype(t.dtype)), precision) for t in (x, y))
    row_total, row_shift = (x.new_zeros(x.shape[0]) for _ in range(2))
    column_total, largest = y.new_zeros(y.shape[0]), y.new_full((y.shape[0],), float("-inf"))
    column_shift = torch.zeros_like(column_total)
    for block in row_blocks(x.shape[0], y.shape[0]):
        S = similarity(block, x, y, scale, exclude)
        row_total[block], row_shift[block] = sums_of_exponentials(S, 1)
        largest = torch.maximum(largest, S.amax(0))
        shift = largest.where(largest != float("-inf"), 0)
        # The shift may fall where it was 0 because nothing had been seen: the total, 0, is then not to be moved.
        moved = column_total * (column_shift - shift).exp()
        column_total = moved.where(column_total != 0, 0) + S.sub_(shift).exp_().sum(0)
        column_shift = shift
    return row_total, row_shift, column_total, column_shift


def _pair_logsumexp_backward_fake(
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(())


def pair_logsumexp_backward_portable(
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rounded_x, rounded_y = (round_operand(t.to(row_shift.dtype), precision) for t in (x, y))
    dx, dy = torch.zeros_like(rounded_x), torch.zeros_like(rounded_y)
    for block in row_blocks(x.shape[0], y.shape[0]):
        S = similarity(block, rounded_x, rounded_y, scale, exclude)
        weight = (S - row_shift[block, None]).exp_().mul_(grad_row_total[block, None])
        weight += S.sub_(column_shift).exp_().mul_(grad_column_total)
        weight = round_weights(weight, precision)
        dx[block] = weight @ rounded_y
        dy.addmm_(weight.T, rounded_x[block])
    dscale = (dx * x).sum(dtype=torch.float64).to(scale.dtype)
    return dx.mul_(scale).to(x.dtype), dy.mul_(scale).to(y.dtype), dscale


def _pair_logsumexp_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, y, scale, exclude, ctx.precision = inputs
    _, row_shift, _, column_shift = output
    ctx.save_for_backward(x, y, scale, exclude, row_shift, column_shift)
    ctx.mark_non_differentiable(row_shift, column_shift)


def _pair_logsumexp_backward(
    ctx: Any, backward_op: Any, grad_row_total: Tensor, _: Tensor, grad_column_total: Tensor, __: Tensor
) -> tuple:
    return *backward_op(grad_row_total, grad_column_total, *ctx.saved_tensors, ctx.precision), None, None


def _pair_logsumexp_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _pair_logsumexp_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_row_total, grad_column_total, *point, exclude, row_shift, column_shift = ctx.saved_tensors

    def total(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        S = similarity(block, *point, exclude)
        rows = cotangents[0][block] * (S - row_shift[block, None]).exp().sum(1)
        return rows.sum() + (cotangents[1] * (S - column_shift).exp()).sum()

    blocks = row_blocks(point[0].shape[0], point[1].shape[0])
    cotangents = grad_row_total, grad_column_total
    gradients = second_derivative(total, blocks, cotangents, point, directions, row_shift.dtype)
    return *gradients, None, None, None, None


_pair_logsumexp_backward_op = Op(
    "pair_logsumexp_backward(Tensor grad_row_total, Tensor grad_column_total, Tensor x, Tensor y, Tensor scale,"
    " Tensor? exclude, Tensor row_shift, Tensor column_shift, str precision)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_pair_logsumexp_backward_fake,
    portable=pair_logsumexp_backward_portable,
    setup_context=_pair_logsumexp_backward_setup_context,
    backward=_pair_logsumexp_double_backward,
    cuda=triton_launcher("contrastive", "pair_logsumexp_backward"),
)

pair_logsumexp = Op(
    "pair_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? exclude, str precision)"
    " -> (Tensor row_total, Tensor row_shift, Tensor column_total, Tensor column_shift)",
    fake=_pair_logsumexp_fake,
    portable=pair_logsumexp_portable,
    setup_context=_pair_logsumexp_setup_context,
    backward=_pair_logsumexp_backward,
    backward_op=_pair_logsumexp_backward_op,
    cuda=triton_launcher("contrastive", "pair_logsumexp"),
)
