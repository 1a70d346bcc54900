"""Sums of rows that have the same id, and the rows that ids name: schemas, derivatives, portable code.

    sum_rows    out[i] = sum of rows[n] with ids[n] = i, in the dtype of sums
    take_rows   out[n] = x[ids[n]]

They are each other's derivatives. Ids are int64, and not checked. PyTorch's own derivative of indexing adds the rows of
an id one after another, in x's dtype: where few ids are named often, a GPU waits for one of its warps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import add_rows_
from fastssl.ops._precision import accumulate_dtype


def _sum_rows_fake(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    return rows.new_empty((count, rows.shape[1]), dtype=accumulate_dtype(rows.dtype))


def _sum_rows_portable(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    sums = _sum_rows_fake(rows, ids, count).zero_()
    return add_rows_(sums, ids, rows.to(sums.dtype))


def _sum_rows_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rows, ids, _ = inputs
    ctx.save_for_backward(ids)
    ctx.dtype = rows.dtype


def _sum_rows_backward(ctx: Any, variant: str, grad: Tensor) -> tuple:
    return getattr(take_rows, variant)(grad, *ctx.saved_tensors).to(ctx.dtype), None, None


def _take_rows_fake(x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty((ids.shape[0], x.shape[1]))


def _take_rows_portable(x: Tensor, ids: Tensor) -> Tensor:
    return x.index_select(0, ids)


def _take_rows_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.count = x.shape[0]


def _take_rows_backward(ctx: Any, variant: str, grad: Tensor) -> tuple:
    return getattr(sum_rows, variant)(grad, *ctx.saved_tensors, ctx.count).to(grad.dtype), None


sum_rows = Op(
    "sum_rows(Tensor rows, Tensor ids, SymInt count) -> Tensor",
    fake=_sum_rows_fake,
    portable=_sum_rows_portable,
    derivative=(_sum_rows_setup_context, _sum_rows_backward),
    triton="row_sums",
)
take_rows = Op(
    "take_rows(Tensor x, Tensor ids) -> Tensor",
    fake=_take_rows_fake,
    portable=_take_rows_portable,
    derivative=(_take_rows_setup_context, _take_rows_backward),
)
