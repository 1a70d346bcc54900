"""Sums of rows that have the same id, on the GPU: sums[i] = the sum of z[n], or of weight[n] z[n], with ids[n] = i.

Algorithm. A stable sort lists the rows in the order of their ids, and that order is cut into pieces of `PIECE`.
`_pieces` adds up the rows of each id within a piece. What goes on from the piece before is that piece's head; `_join`
adds the heads to the sum of the piece where their id begins, `PIECE` at a time. So an id that everybody has takes
N / PIECE^2 steps one after another, not N. There are no atomics: the bits are the same in every run.

Cost. A sort; the rows are read once, the sums written once.

Numerics: sums are float32, of rows that are not rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.rows import unit
from fastssl.kernels.common.tiles import COUNTS

PIECE = 32  # rows of a program, or heads
ALONG, ACROSS = {"WIDTH": 256, "num_warps": 2}, {"WIDTH": 64, "num_warps": 4}  # features of a program, by kernel


@triton.jit
def _id_at(place, ids, order, inside):
    """The id at places of the order; -1, which none has, where these are not inside."""
    return tl.load(ids + tl.load(order + place, mask=inside, other=0), mask=inside, other=-1)


@triton.jit(do_not_specialize=COUNTS)
def _pieces(
    z, inverse, weight, order, ids, sums, weighted, N, M, D, row_stride, column_stride,
    PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums of (normalised) rows, and of weighted ones where they are wanted, for each id in a piece of the order.
    `sums` has a row for each of M ids, and behind them one for the head of each piece."""
    piece = tl.program_id(0).to(tl.int64)
    start = piece * PIECE
    stop = tl.minimum(start + PIECE, N)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    of_weighted = tl.zeros((WIDTH,), tl.float32)
    id = tl.load(ids + tl.load(order + start))
    to = tl.where(id == _id_at(start - 1, ids, order, start > 0), M + piece, id)
    for place in range(start, stop):
        row = tl.load(order + place)
        x = tl.load(z + row * row_stride + d * column_stride, mask=d < D, other=0.0).to(tl.float32)
        if inverse is not None:
            x = unit(x, tl.load(inverse + row))
        total += x
        if weight is not None:
            of_weighted += x * tl.load(weight + row)
        next = _id_at(place + 1, ids, order, place + 1 < stop)
        ends = next != id
        mask = d < tl.where(ends, D, 0)
        tl.store(sums + to * D + d, total, mask=mask)
        total = tl.where(ends, 0.0, total)
        if weight is not None:
            tl.store(weighted + to * D + d, of_weighted, mask=mask)
            of_weighted = tl.where(ends, 0.0, of_weighted)
        to = tl.where(ends, next, to)
        id = next


@triton.jit(do_not_specialize=COUNTS)
def _join(order, ids, sums, weighted, N, M, D, PIECE: tl.constexpr, WIDTH: tl.constexpr):
    """Adds to the sum of an id that begins in this piece and goes on after it the heads of the pieces that begin with
    it. Nobody else reads or writes these."""
    piece = tl.program_id(0).to(tl.int64)
    start = piece * PIECE
    next = start + PIECE
    id = _id_at(next, ids, order, next < N)
    ends_here = id != _id_at(next - 1, ids, order, next < N)
    began_before = id == _id_at(start - 1, ids, order, (start > 0) & (next < N))
    going = (ends_here | began_before) == 0
    if going:
        d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :].to(tl.int64)
        total = tl.zeros((PIECE, WIDTH), tl.float32)
        of_weighted = tl.zeros((PIECE, WIDTH), tl.float32)
        stop = piece + 1
        while going:  # and only then for the heads: Triton 3.6 does not compile a tile that `while` changes
            stop += PIECE
            going = _id_at(stop * PIECE, ids, order, stop * PIECE < N) == id
        for first in range(piece + 1, stop, PIECE):
            pieces = first + tl.arange(0, PIECE)
            same = _id_at(pieces * PIECE, ids, order, pieces * PIECE < N) == id
            head = (M + pieces)[:, None] * D + d
            mask = same[:, None] & (d < D)
            total += tl.load(sums + head, mask=mask, other=0.0)
            if weighted is not None:
                of_weighted += tl.load(weighted + head, mask=mask, other=0.0)
        to = id * D + d
        tl.store(sums + to, tl.load(sums + to, mask=d < D, other=0.0) + tl.sum(total, 0, True), mask=d < D)
        if weighted is not None:
            more = tl.load(weighted + to, mask=d < D, other=0.0) + tl.sum(of_weighted, 0, True)
            tl.store(weighted + to, more, mask=d < D)


def room_for_sums(z: Tensor, count: int) -> Tensor:
    """The sums of z's rows for `count` ids, and the heads behind them; float32, with no values yet."""
    return z.new_empty((count + triton.cdiv(z.shape[0], PIECE), z.shape[1]), dtype=torch.float32)


def sum_into(
    sums: Tensor, count: int, z: Tensor, ids: Tensor, order: Tensor, inverse: Tensor | None = None,
    weight: Tensor | None = None, weighted: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes into `sums` (`room_for_sums`) those of the (normalised) rows with each of the `count` ids that there are,
    which `order` sorts, and nothing for the others; into `weighted` likewise those of rows times their weights."""
    rows, dim = z.shape
    pieces = triton.cdiv(rows, PIECE)
    _pieces[(pieces, triton.cdiv(dim, ALONG["WIDTH"]))](
        z, inverse, weight, order, ids, sums, weighted, rows, count, dim, *z.stride(), PIECE=PIECE, **ALONG, **OPTIONS
    )
    _join[(pieces, triton.cdiv(dim, ACROSS["WIDTH"]))](
        order, ids, sums, weighted, rows, count, dim, PIECE=PIECE, **ACROSS, **OPTIONS
    )


def sum_rows(rows: Tensor, ids: Tensor, count: int) -> Tensor:
    """`fastssl::sum_rows` for CUDA tensors; see fastssl/ops/row_sums.py."""
    sums = room_for_sums(rows, count)
    sums[:count] = 0
    if rows.numel():
        sum_into(sums, count, rows, ids.contiguous(), ids.argsort(stable=True))
    return sums[:count]
