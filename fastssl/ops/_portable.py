"""Shared by the portable code of several families: blocks of rows, their sums, similarities, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastssl.ops._precision import device_type_of

_BLOCK_ELEMENTS = 1 << 22  # of a matrix at a time: 16 MiB in float32


def row_blocks(rows: int, columns: int) -> list[slice]:
    """The rows of a matrix in blocks of bounded size; no blocks for an empty matrix."""
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows if columns else 0, step)]


def pair_blocks(x: Tensor, y: Tensor) -> list[slice]:
    """The rows of x y^T in blocks of bounded size."""
    return row_blocks(x.shape[0], y.shape[0])


# Where `index_add` adds one row after the other. On CUDA it adds atomically, in an order that changes from run to run,
# while `index_put` sorts the ids first; on a CPU, it is `index_put` whose threads add atomically.
_ADDS_IN_ORDER = {"cpu"}


def add_rows_(sums: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Adds rows[n] to sums[ids[n]], in the same order in every run. Returns sums. `row_sums` has a kernel for it."""
    if device_type_of(sums) in _ADDS_IN_ORDER:
        return sums.index_add_(0, ids, rows)
    return sums.index_put_((ids,), rows, accumulate=True)


def similarity(rows: slice, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None) -> Tensor:
    """scale x[rows] y^T, minus infinity where a column is excluded."""
    product = x[rows] @ y.T * scale
    if exclude is None:
        return product
    return product.masked_fill(torch.arange(y.shape[0], device=y.device) == exclude[rows, None], float("-inf"))


def second_derivative(
    function: Callable[[slice, Sequence[Tensor], Sequence[Tensor]], Tensor],
    blocks: Iterable[slice],
    cotangents: Sequence[Tensor],
    point: Sequence[Tensor],
    directions: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The derivative of a first derivative: of <directions, dL/dpoint> by the cotangents, then by the point.

    That product is the derivative of L along the directions. L is a sum over blocks of rows, which are taken one at a
    time.

    Args:
        function: (rows, cotangents, point) -> the rows' share of L, a 0-d tensor linear in the cotangents.
        blocks: the rows of each share.
        cotangents: what L's values were multiplied by.
        point: where L was differentiated.
        directions: the cotangents of the first derivative, shaped as the point.
        dtype: of the computation.
    """
    inputs = [x.to(dtype).contiguous() for x in (*cotangents, *point)]  # jvp refuses expanded tensors
    directions = tuple(u.to(dtype) for u in directions)
    count = len(cotangents)

    def along(rows: slice, *inputs: Tensor) -> Tensor:
        share = partial(function, rows, inputs[:count])
        return torch.func.jvp(lambda *point: share(point), inputs[count:], directions)[1]

    sums = [torch.zeros_like(x) for x in inputs]
    for rows in blocks:
        gradients = torch.func.grad(partial(along, rows), argnums=tuple(range(len(inputs))))(*inputs)
        sums = [s + g for s, g in zip(sums, gradients, strict=True)]
    return [s.to(x.dtype) for s, x in zip(sums, (*cotangents, *point), strict=True)]
