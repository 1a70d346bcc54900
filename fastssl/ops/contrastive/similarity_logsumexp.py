"""The log-sum-exp of each row of similarities, with the weighted sum of the other rows beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import pair_blocks, row_blocks, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights, widen
from fastssl.ops.contrastive._shared import nothing_kept, sums_of_exponentials


def _fake(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, keep: int, precision: str
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(x.dtype)
    rows, dim = x.shape
    total, shift = (x.new_empty(rows, dtype=dtype) for _ in range(2))
    weighted = x.new_empty((rows if weigh else 0, dim), dtype=dtype)
    return total, shift, weighted, x.new_empty(keep, dtype=torch.uint8)


def row_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, keep: int, precision: str
) -> tuple[Tensor, ...]:
    x, y = (round_operand(widen(t), precision) for t in (x, y))
    rows, dim = x.shape
    total, shift, weighted = x.new_zeros(rows), x.new_zeros(rows), x.new_zeros(rows if weigh else 0, dim)
    for block in row_blocks(rows, y.shape[0]):
        S = similarity(block, x, y, scale, exclude)
        total[block], shift[block] = sums_of_exponentials(S, 1)
        if weigh:
            weighted[block] = round_weights(S.sub_(shift[block, None]).exp_(), precision) @ y
    return total, shift, weighted, nothing_kept(x, keep)


def row_sums_backward(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    shift: Tensor,
    weighted: Tensor,
    kept: Tensor,
    needs_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = (grad_total * scale)[:, None] * weighted
    grad_scale = (grad_total[:, None] * weighted * x).sum(dtype=torch.float64).to(scale.dtype)
    grad_y = weighted.new_zeros((y.shape[0] if needs_y else 0, y.shape[1]))
    if needs_y:
        rounded_x, rounded_y = (round_operand(t.to(grad_y.dtype), precision) for t in (x, y))
        for block in row_blocks(x.shape[0], y.shape[0]):
            S = similarity(block, rounded_x, rounded_y, scale, exclude)
            weight = S.sub_(shift[block, None]).exp_().mul_(grad_total[block, None])
            grad_y.addmm_(round_weights(weight, precision).T, rounded_x[block])
        grad_y *= scale
    return grad_x.to(x.dtype), grad_y.to(y.dtype), grad_scale


def _share(
    rows: slice, grad_total: Tensor, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, shift: Tensor
) -> Tensor:
    return (grad_total[rows] * (similarity(rows, x, y, scale, exclude) - shift[rows, None]).exp().sum(1)).sum()


similarity_logsumexp = Op(
    "similarity_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? exclude, bool weigh, SymInt keep,"
    " str precision) -> (Tensor total, Tensor shift, Tensor weighted, Tensor kept)",
    backward="(Tensor grad_total, Tensor x, Tensor y, Tensor scale, Tensor? exclude, Tensor shift, Tensor weighted,"
    " Tensor kept, bool needs_y, str precision) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_fake,
    portable=(row_sums, row_sums_backward),
    share=_share,
    blocks=pair_blocks,
    triton="contrastive",
)
