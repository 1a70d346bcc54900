"""Sinkhorn-Knopp on the GPU (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193), and the mean of logits.

The assignments of logits t (N, K) at temperature T are P = softmax((t - center) / T), where center (K) is found
iteratively:

    center_k = T log mean_i exp(t_ik / T),                at first (`column_logsumexp`)
    center_k = center_k + T log(K mean_i P_ik),           then     (`assignment_sums`)

Algorithm. Sums of columns: a program owns `BLOCK["BK"]` columns of every `slots`-th group of rows, and keeps for each
of its elements a sum of its own; it adds these up at the end, into its slot. PyTorch adds the slots. Of the first
iteration a sum is one of exponentials, relative to the maximum so far. For the others `normalise` goes first: a program
takes a row, and keeps for each of its threads a maximum and a sum of exponentials. They become the row's normaliser,
with which `sum_columns` weighs the row's exponentials.

Cost. In the first iteration one read of the logits, in the others two, one to normalise and one to add up, with one
exponential for each logit each time; in all of them 4 bytes for each column of each slot and 8 for each row. A row of
65,536 float32 logits is as large as all registers of a multiprocessor, and the rows in flight are larger than the
second-level cache, as are the columns' sums that each program would need if it took both steps for a row: they would
travel as far as the logits do a second time. There are no atomics: the bits are the same in every run.

Triton and not CUDA C++, since sums over tiles, along rows or columns, are all that there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PROGRAMS
from fastssl.kernels.distillation.logits import (
    LOWEST,
    add_exponential,
    inverse,
    load_centred,
    unite,
    with_dense_rows,
)

BLOCK = {"BR": 8, "BK": 256}  # the tile of the kernels over columns: 16 logits for each thread
WARPS = 4
ROW = {"BLOCK": 4096}  # logits of a row at a time: 16 for each thread
ROW_WARPS = 8


@triton.jit
def tile_of_slot(logits, start, columns, N, K, stride, BR: tl.constexpr):
    """Rows (BR, 1) from `start` on, and their logits (BR, BK); minus infinity outside."""
    rows = tl.cast(start, tl.int64) + tl.arange(0, BR)[:, None]
    inside = (rows < N) & (columns < K)
    return rows, tl.load(logits + rows * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def sum_exponentials(logits, tops, totals, scale, N, K, stride, BR: tl.constexpr, BK: tl.constexpr):
    """Of one slot's rows: `tops`, the largest logit of each column, and `totals`, its sum of exp(scale (t - top))."""
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    slot, slots = tl.program_id(1), tl.num_programs(1)
    top = tl.full((BR, BK), LOWEST, tl.float32)
    total = tl.zeros((BR, BK), tl.float32)
    for start in range(slot * BR, N, slots * BR):
        _, x = tile_of_slot(logits, start, columns[None, :], N, K, stride, BR)
        top, total = add_exponential(top, total, x, scale)
    top, total = unite(top, total, scale, 0)
    to = slot.to(tl.int64) * K + columns
    tl.store(tops + to, top, mask=columns < K)
    tl.store(totals + to, total, mask=columns < K)


@triton.jit
def normalise(logits, center, tops, inverses, output, scale, K, stride, BLOCK: tl.constexpr):
    """A row's P is exp(scale (t - center - top)) times `inverse`. These two are stored, or P itself in `output`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    block = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        top, total = add_exponential(top, total, load_centred(logits, center, start + block, K), scale)
    top, total = unite(top, total, scale, 0)
    if output is None:
        tl.store(tops + row, top)
        tl.store(inverses + row, 1 / total)
    else:
        output += row * K
        for start in range(0, K, BLOCK):
            columns = start + block
            x = load_centred(logits, center, columns, K)
            tl.store(output + columns, tl.exp((x - top) * scale) / total, mask=columns < K)


@triton.jit(do_not_specialize=["N"])
def sum_columns(
    logits, center, tops, inverses, sums, scale, N, K, stride, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The sums of columns over one slot's rows: of P with what `normalise` has found, of the logits without it."""
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    slot, slots = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((BR, BK), tl.float32)
    if tops is not None:
        c = tl.load(center + columns, mask=columns < K, other=0.0)[None, :]
    for start in range(slot * BR, N, slots * BR):
        rows, x = tile_of_slot(logits, start, columns[None, :], N, K, stride, BR)
        if tops is None:
            total += tl.where(rows < N, x, 0.0)
        else:
            top = tl.load(tops + rows, mask=rows < N, other=0.0)
            total += tl.exp((x - c - top) * scale) * tl.load(inverses + rows, mask=rows < N, other=0.0)
    tl.store(sums + slot.to(tl.int64) * K + columns, tl.sum(total, 0), mask=columns < K)


def column_logsumexp(logits: Sequence[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    parts = []
    for x in logits:
        tops, totals = _slots(x, 2)
        _over_columns(sum_exponentials, x, tops, tops, totals, inverse(temperature))
        parts.append((tops, totals))
    tops, totals = (_joined(x) for x in zip(*parts, strict=True))
    top = tops.amax(0)
    return (totals * ((tops - top) * inverse(temperature)).exp()).sum(0), top


def assignment_sums(logits: Sequence[Tensor], center: Tensor, temperature: float) -> Tensor:
    center, scale, sums = center.contiguous(), inverse(temperature), []
    for x in logits:
        normalisers = x.new_empty((2, len(x)), dtype=torch.float32)
        _normalise(x, center, *normalisers, None, scale)
        (of_slots,) = _slots(x, 1)
        _over_columns(sum_columns, x, of_slots, center, *normalisers, of_slots, scale)
        sums.append(of_slots)
    return _joined(sums).sum(0)


def assignments(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    output = logits.new_empty(logits.shape, dtype=torch.float32)
    _normalise(logits, center.contiguous(), None, None, output, inverse(temperature))
    return output


def column_sums(logits: Sequence[Tensor]) -> Tensor:
    sums = []
    for x in logits:
        (of_slots,) = _slots(x, 1)
        _over_columns(sum_columns, x, of_slots, None, None, None, of_slots, None)
        sums.append(of_slots)
    return _joined(sums).sum(0)


def _slots(x: Tensor, count: int) -> Tensor:
    """(count, slots, K), a row for each slot into which the rows of x are divided."""
    rows, columns = x.shape
    slots = min(triton.cdiv(rows, 4 * BLOCK["BR"]), 4 * PROGRAMS // triton.cdiv(columns, BLOCK["BK"]))
    return x.new_empty((count, max(slots, 1), columns), dtype=torch.float32)


def _joined(slots: Sequence[Tensor]) -> Tensor:
    """Those of all matrices."""
    return slots[0] if len(slots) == 1 else torch.cat(slots)


def _over_columns(kernel: Any, x: Tensor, slots: Tensor, *arguments: Any) -> None:
    (rows, columns), x = x.shape, with_dense_rows(x)
    grid = triton.cdiv(columns, BLOCK["BK"]), len(slots)
    kernel[grid](x, *arguments, rows, columns, x.stride(0), **BLOCK, num_warps=WARPS, **OPTIONS)


def _normalise(
    x: Tensor, center: Tensor, tops: Tensor | None, inverses: Tensor | None, output: Tensor | None, scale: float
) -> None:
    (rows, columns), x = x.shape, with_dense_rows(x)
    if rows:
        arguments = center, tops, inverses, output, scale, columns, x.stride(0)
        normalise[(rows,)](x, *arguments, **ROW, num_warps=ROW_WARPS, **OPTIONS)
