"""The nearest neighbours by similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._arithmetic import unit, without_autocast
from fastssl._checks import check_alike, check_features, check_flag, check_rows, check_size
from fastssl.ops._precision import accumulate_dtype, widen

_TOPK_COLUMNS, _TOPK_ELEMENTS = 1 << 14, 1 << 22  # of a block of similarities


@torch.no_grad()
def topk_similarity(query: Tensor, bank: Tensor, k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` most similar to each row of `query`, as k-nearest-neighbour evaluation needs them.

    The M x N similarities are never stored: memory is O(M k) and one block. There are no gradients. The products are in
    float32 for 16-bit inputs too, and follow `torch.set_float32_matmul_precision`.

    Args:
        query: (M, D) rows; float32, bfloat16, float16 or float64.
        bank: (N, D) rows, of query's dtype and device.
        k: how many, from 1 to N.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.

    Returns:
        (values, indices), each (M, k): the similarities, descending, in float32, in float64 for float64; and the rows
        of bank that have them, int64. Which of equal similarities are taken, and in which order, is unspecified, as
        in `torch.topk`. NaN counts as the largest, as there.

    Raises:
        TypeError: if query or bank is no tensor, or k no integer.
        ValueError: if shapes, dtypes or devices do not fit, or k is below 1 or above N.
    """
    check_rows("query", query, "(M, D)")
    check_rows("bank", bank, "(N, D)")
    check_features("query", query, "bank", bank)
    query, bank = check_alike("query", query, "bank", bank)
    normalize, k = check_flag("normalize", normalize), check_size("k", k)
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"k must be from 1 to the number of rows of bank, {bank.shape[0]}, got {k}")
    columns = max(k, _TOPK_COLUMNS)
    step = max(1, _TOPK_ELEMENTS // columns)
    values = query.new_empty((query.shape[0], k), dtype=accumulate_dtype(query.dtype))
    indices = query.new_empty((query.shape[0], k), dtype=torch.int64)
    for column in range(0, bank.shape[0], columns):
        keys = _operand(bank[column : column + columns], normalize)  # of a block once, not for each block of queries
        for row in range(0, query.shape[0], step):
            rows = slice(row, row + step)
            with without_autocast(query):
                S = _operand(query[rows], normalize) @ keys.T
            best = S.topk(min(k, S.shape[1]), dim=1)
            found = best.indices + column
            if column:
                best = torch.cat([values[rows], best.values], 1).topk(k, dim=1)
                found = torch.cat([indices[rows], found], 1).gather(1, best.indices)
            values[rows], indices[rows] = best.values, found
    return values, indices


def _operand(x: Tensor, normalize: bool) -> Tensor:
    """In the dtype of sums."""
    return unit(x) if normalize else widen(x)
