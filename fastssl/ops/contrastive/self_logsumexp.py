"""The log-sum-exp of each row of a set's similarities with itself, the diagonal left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import row_blocks, second_derivative, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights
from fastssl.ops.contrastive._shared import sums_of_exponentials


def _self_logsumexp_fake(z: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    return tuple(z.new_empty(z.shape[0], dtype=accumulate_dtype(z.dtype)) for _ in range(2))


def self_logsumexp_portable(z: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    z = round_operand(z.to(accumulate_dtype(z.dtype)), precision)
    rows = z.shape[0]
    total, shift = z.new_zeros(rows), z.new_zeros(rows)
    for block in row_blocks(rows, rows):
        S = (z[block] @ z.T).mul_(scale)
        S.diagonal(block.start).fill_(float("-inf"))
        total[block], shift[block] = sums_of_exponentials(S, 1)
    return total, shift


def _self_logsumexp_backward_fake(
    grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(())


def self_logsumexp_backward_portable(
    grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    rounded = round_operand(z.to(shift.dtype), precision)
    gradient = torch.zeros_like(rounded)
    for block in row_blocks(z.shape[0], z.shape[0]):
        S = (rounded[block] @ rounded.T).mul_(scale)
        weight = (S - shift[block, None]).exp_().mul_(grad_total[block, None])
        weight += S.sub_(shift).exp_().mul_(grad_total)
        weight.diagonal(block.start).zero_()
        gradient[block] = round_weights(weight, precision) @ rounded
    dscale = (z * gradient).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    return gradient.mul_(scale).to(z.dtype), dscale


def _self_logsumexp_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, scale, ctx.precision = inputs
    ctx.save_for_backward(z, scale, output[1])
    ctx.mark_non_differentiable(output[1])


def _self_logsumexp_backward(ctx: Any, backward_op: Any, grad_total: Tensor, _: Tensor) -> tuple:
    return *backward_op(grad_total, *ctx.saved_tensors, ctx.precision), None


def _self_logsumexp_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _self_logsumexp_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_total, *point, shift = ctx.saved_tensors
    rows = shift.shape[0]

    def total(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        z, scale = point
        S = similarity(block, z, z, scale, torch.arange(rows, device=z.device))
        return (cotangents[0][block] * (S - shift[block, None]).exp().sum(1)).sum()

    blocks = row_blocks(rows, rows)
    return *second_derivative(total, blocks, [grad_total], point, directions, shift.dtype), None, None


_self_logsumexp_backward_op = Op(
    "self_logsumexp_backward(Tensor grad_total, Tensor z, Tensor scale, Tensor shift, str precision)"
    " -> (Tensor grad_z, Tensor grad_scale)",
    fake=_self_logsumexp_backward_fake,
    portable=self_logsumexp_backward_portable,
    setup_context=_self_logsumexp_backward_setup_context,
    backward=_self_logsumexp_double_backward,
    cuda=triton_launcher("contrastive", "self_logsumexp_backward"),
)

self_logsumexp = Op(
    "self_logsumexp(Tensor z, Tensor scale, str precision) -> (Tensor total, Tensor shift)",
    fake=_self_logsumexp_fake,
    portable=self_logsumexp_portable,
    setup_context=_self_logsumexp_setup_context,
    backward=_self_logsumexp_backward,
    backward_op=_self_logsumexp_backward_op,
    cuda=triton_launcher("contrastive", "self_logsumexp"),
)
