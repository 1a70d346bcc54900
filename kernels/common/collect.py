"""What `accumulate` has left in splits s: added up, and multiplied by the factors that all weights of a row share.

    G_i = sum_s exp(top_is - top_i) G_is,    total_i = sum_s exp(top_is - top_i) total_is,    out_i = scale G_i

where top_i is the largest top_is for softmax weights and 0 for sigmoid weights; where weights are not relative to tops,
the exponentials are 1. For softmax weights out is G itself, and only they have totals here. A program takes a tile of
rows and reads each split once. Cost: O(splits M D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PEAK, row_block
from fastssl.kernels.common.tiles import COUNTS, finite
from fastssl.kernels.common.weights import Sums, power_of_two


@triton.jit(do_not_specialize=COUNTS)
def collect(
    x, scale, gradient, peak, tops, totals, out, shift, total, share, M, D, row_stride, column_stride,
    PADDED, padded_rows, splits,
    WEIGHT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """From the sums of the splits: scale G (for softmax, G itself), <x_i, G_i>, and the totals and shifts of rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < M
    highest = tl.zeros((BR,), tl.float32)
    if WEIGHT == "softmax":
        highest = tl.full((BR,), float("-inf"), tl.float32)
        for split in tl.range(splits, loop_unroll_factor=4):
            top = tl.load(tops + split * M + row, mask=inside, other=float("-inf"))
            highest = tl.maximum(highest, top)
        highest = finite(highest)
    correction = tl.full((BR,), 1 / PEAK, tl.float32)
    if WEIGHT == "softmax":
        acc = tl.zeros((BR,), tl.float32)
        for split in tl.range(splits, loop_unroll_factor=4):
            to = split * M + row
            top = tl.load(tops + to, mask=inside, other=float("-inf"))
            acc += tl.load(totals + to, mask=inside, other=0.0) * tl.exp(top - highest)
        tl.store(shift + row, tl.where(acc == acc, highest, acc), mask=inside)
        tl.store(total + row, acc, mask=inside)
    elif tops is None:
        correction *= power_of_two(tl.load(peak))
    output_scale = 1.0
    if WEIGHT != "softmax":
        output_scale = tl.load(scale).to(tl.float32)
    shares = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        mask = inside[:, None] & (columns < D)
        g = tl.zeros((BR, BD), tl.float32)
        for split in tl.range(splits, loop_unroll_factor=4):
            from_ = gradient + (rows + split * padded_rows) * PADDED + columns
            part = tl.load(from_, mask=mask, other=0.0)
            if tops is not None:
                top = tl.load(tops + split * M + row, mask=inside, other=float("-inf"))
                part *= tl.exp(top - highest)[:, None]
            g += part
        g *= correction[:, None]
        if share is not None:
            shares += tl.load(x + rows * row_stride + columns * column_stride, mask=mask, other=0.0).to(tl.float64) * g
        tl.store(out + rows * D + columns, (g * output_scale).to(out.dtype.element_ty), mask=mask)
    if share is not None:
        tl.store(share + row, tl.sum(shares, 1), mask=inside)


class Collected(NamedTuple):
    gradient: Tensor
    shift: Tensor | None
    total: Tensor | None
    share: Tensor | None


def collect_sums(sums: Sums, x: Tensor, scale: Tensor, dtype: torch.dtype, share: bool = False) -> Collected:
    """scale G (for softmax, G itself) in `dtype`; the shifts and totals of rows; and <x_i, G_i> in float64."""
    (count, dim), (splits, padded_rows, padded) = x.shape, sums.gradient.shape
    out = Collected(
        x.new_empty((count, dim), dtype=dtype),
        x.new_empty(count, dtype=torch.float32) if sums.weight == "softmax" else None,
        x.new_empty(count, dtype=torch.float32) if sums.weight == "softmax" else None,
        x.new_empty(count, dtype=torch.float64) if share else None,
    )
    block, totals = row_block(padded), sums.total if sums.weight == "softmax" else None
    collect[(triton.cdiv(count, block["BR"]),)](
        x, scale, sums.gradient, sums.peak, sums.top, totals, *out, count, dim, *x.stride(), padded, padded_rows,
        splits, WEIGHT=sums.weight, **block, num_warps=8, **OPTIONS,
    )  # fmt: skip
    return out
