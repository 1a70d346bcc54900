"""The log-sum-exps of each row and of each column of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import pair_blocks, row_blocks, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights, widen
from fastssl.ops.contrastive._shared import nothing_kept, sums_of_exponentials


def _fake(x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, keep: int, precision: str) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(x.dtype)
    return *(t.new_empty(t.shape[0], dtype=dtype) for t in (x, x, y, y)), x.new_empty(keep, dtype=torch.uint8)


def pair_logsumexp_portable(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, keep: int, precision: str
) -> tuple[Tensor, ...]:
    x, y = (round_operand(widen(t), precision) for t in (x, y))
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
    return row_total, row_shift, column_total, column_shift, nothing_kept(x, keep)


def pair_logsumexp_portable_backward(
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    kept: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rounded_x, rounded_y = (round_operand(t.to(row_shift.dtype), precision) for t in (x, y))
    grad_x, grad_y = torch.zeros_like(rounded_x), torch.zeros_like(rounded_y)
    for block in row_blocks(x.shape[0], y.shape[0]):
        S = similarity(block, rounded_x, rounded_y, scale, exclude)
        weight = (S - row_shift[block, None]).exp_().mul_(grad_row_total[block, None])
        weight += S.sub_(column_shift).exp_().mul_(grad_column_total)
        weight = round_weights(weight, precision)
        grad_x[block] = weight @ rounded_y
        grad_y.addmm_(weight.T, rounded_x[block])
    grad_scale = (grad_x * x).sum(dtype=torch.float64).to(scale.dtype)
    return grad_x.mul_(scale).to(x.dtype), grad_y.mul_(scale).to(y.dtype), grad_scale


def _share(
    rows: slice,
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
) -> Tensor:
    S = similarity(rows, x, y, scale, exclude)
    of_rows = grad_row_total[rows] * (S - row_shift[rows, None]).exp().sum(1)
    return of_rows.sum() + (grad_column_total * (S - column_shift).exp()).sum()


pair_logsumexp = Op(
    "pair_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? exclude, SymInt keep, str precision)"
    " -> (Tensor row_total, Tensor row_shift, Tensor column_total, Tensor column_shift, Tensor kept)",
    backward="(Tensor grad_row_total, Tensor grad_column_total, Tensor x, Tensor y, Tensor scale, Tensor? exclude,"
    " Tensor row_shift, Tensor column_shift, Tensor kept, str precision)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_fake,
    portable=(pair_logsumexp_portable, pair_logsumexp_portable_backward),
    share=_share,
    blocks=pair_blocks,
    triton="contrastive",
)
