"""The log-sum-exp of each row of a set's similarities with itself, the diagonal left out."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights, widen
from fastssl.ops.contrastive._shared import nothing_kept, sums_of_exponentials


def _fake(z: Tensor, scale: Tensor, keep: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    total, shift = (z.new_empty(z.shape[0], dtype=accumulate_dtype(z.dtype)) for _ in range(2))
    return total, shift, z.new_empty(keep, dtype=torch.uint8)


def self_logsumexp_portable(z: Tensor, scale: Tensor, keep: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    z = round_operand(widen(z), precision)
    rows = z.shape[0]
    total, shift = z.new_zeros(rows), z.new_zeros(rows)
    for block in row_blocks(rows, rows):
        S = (z[block] @ z.T).mul_(scale)
        S.diagonal(block.start).fill_(float("-inf"))
        total[block], shift[block] = sums_of_exponentials(S, 1)
    return total, shift, nothing_kept(z, keep)


def self_logsumexp_portable_backward(
    grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor, kept: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    rounded = round_operand(z.to(shift.dtype), precision)
    gradient = torch.zeros_like(rounded)
    for block in row_blocks(z.shape[0], z.shape[0]):
        S = (rounded[block] @ rounded.T).mul_(scale)
        weight = (S - shift[block, None]).exp_().mul_(grad_total[block, None])
        weight += S.sub_(shift).exp_().mul_(grad_total)
        weight.diagonal(block.start).zero_()
        gradient[block] = round_weights(weight, precision) @ rounded
    grad_scale = (z * gradient).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    return gradient.mul_(scale).to(z.dtype), grad_scale


def _share(rows: slice, grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    S = similarity(rows, z, z, scale, torch.arange(z.shape[0], device=z.device))
    return (grad_total[rows] * (S - shift[rows, None]).exp().sum(1)).sum()


self_logsumexp = Op(
    "self_logsumexp(Tensor z, Tensor scale, SymInt keep, str precision) -> (Tensor total, Tensor shift, Tensor kept)",
    backward="(Tensor grad_total, Tensor z, Tensor scale, Tensor shift, Tensor kept, str precision)"
    " -> (Tensor grad_z, Tensor grad_scale)",
    fake=_fake,
    portable=(self_logsumexp_portable, self_logsumexp_portable_backward),
    share=_share,
    blocks=lambda z: row_blocks(z.shape[0], z.shape[0]),
    triton="contrastive",
)
