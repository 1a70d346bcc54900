"""Maxima and sums of exponentials over the rows of S = scale x y^T, and over its columns:

    shift_i = max_j S_ij,    total_i = sum_j exp(S_ij - shift_i).

Algorithm. S is cut into T x T tiles; tile (b, d) is that of row block b and column block b + d, modulo the number of
column blocks. A program computes a tile, and stores the maximum and the sum of exponentials of each of its rows
and, where they are wanted, of its columns. For rows of block b, what comes from column block c goes to slot
(c - b) mod blocks, where no other program writes; likewise for columns. `_merge` reduces the slots. Distances d are
taken in bands, so the slots need O(M + N) memory. Columns are wanted for CLIP, where the shorter side becomes the rows;
and for a symmetric S, where they stand for rows: there the distances d = 0 ... blocks // 2 cover every pair once.
Where registers allow it, a program takes two tiles, which have their rows in common: 3/4 of the bytes from the
second-level cache, and the same numbers.

Cost, in units U = 2 M N D floating-point operations: 1 U, about U / 2 for a symmetric S. Memory: at most 512 bytes per
row and per column for the slots, up to 2,048 per row where rows are few.

Numerics: a row's maximum is taken before its exponentials, so any scale and any lengths of rows are safe. A NaN in S
makes the totals of its row and column NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.accumulate import accumulate
from fastssl.kernels.common.launch import OPTIONS, autotune, configs, input_precision, is_wide, suits_units
from fastssl.kernels.common.tiles import (
    COUNTS,
    exponents,
    finite,
    kept_tile,
    load_excluded,
    load_scale,
    products,
    products_of_two,
)
from fastssl.kernels.common.weights import Factors, Sums, Weights

_BAND = 64  # distances per forward launch


def _forward_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    if not suits_units(c, named) or 16 * c["warps"] != named["T"]:
        return None
    if c["TILES"] == 2 and (size != 2 or capability // 10 not in (9, 10)):  # others have no room in registers
        return None
    return c["stages"] * (1 + c["TILES"]) * named["T"] * c["BK"] * size


@triton.jit
def _maximum_and_sum(x, AXIS: tl.constexpr):
    """max x and sum exp(x - max x) along an axis; (-inf, 0) where all is masked."""
    top = tl.max(x, AXIS)
    return top, tl.sum(tl.exp(x - tl.expand_dims(finite(top), AXIS)), AXIS)


@triton.jit
def _reduce_tile(
    product, scale, excluded, exclude, row_tops, row_sums, column_tops, column_sums, aligned, kept, step_i, step_j,
    row, column, distance, slot, M, N, blocks, band, EXCLUDE: tl.constexpr, SYMMETRIC: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of the rows and columns of a tile, from its products."""
    i = row + tl.arange(0, T)
    j = column + tl.arange(0, T)
    if kept is not None:
        if SYMMETRIC:  # first: stored last, it takes more registers than sm_80 has
            tl.store(kept_tile(kept, column, row, step_i, step_j, T, T), tl.trans(product))
        tl.store(kept_tile(kept, row, column, step_i, step_j, T, T), product)
    x = exponents(
        product, load_scale(scale), None, excluded, exclude, None,
        row, column, M, N, "diagonal" if EXCLUDE == "partner" else EXCLUDE, T, T,
    )  # fmt: skip
    if row + T > M:
        x = tl.where(i[:, None] < M, x, float("-inf"))
    # Whether no other program computes the transpose of this tile; always so where S is not symmetric.
    once = (not SYMMETRIC) | ((distance > 0) & (2 * distance < blocks))
    if aligned is not None:
        half = N // 2
        if tl.abs(tl.abs(row - column) - half) < T:
            partner = tl.where(i < half, i + half, i - half)
            found = tl.sum(tl.where(partner[:, None] == j[None, :], x, 0.0), 1)
            tl.store(aligned + i, found, mask=(partner >= column) & (partner < column + T) & (i < N))
            if once:
                partner = tl.where(j < half, j + half, j - half)
                found = tl.sum(tl.where(partner[None, :] == i[:, None], x, 0.0), 0)
                tl.store(aligned + j, found, mask=(partner >= row) & (partner < row + T) & (j < N))
            if EXCLUDE == "partner":
                x = tl.where(tl.abs(i[:, None] - j[None, :]) != half, x, float("-inf"))
    top, total = _maximum_and_sum(x, 1)
    to = slot.to(tl.int64) * M + i
    tl.store(row_tops + to, top, mask=i < M)
    tl.store(row_sums + to, total, mask=i < M)
    if column_tops is not None:
        if once:
            top, total = _maximum_and_sum(x, 0)
            to = (slot + (band if SYMMETRIC else 0)).to(tl.int64) * N + j
            tl.store(column_tops + to, top, mask=j < N)
            tl.store(column_sums + to, total, mask=j < N)


@autotune(
    _forward_needs,
    ["D", "T", "PRECISION"],
    configs(
        ({"BK": 64, "TILES": 2}, 8, 3),
        ({"BK": 64, "TILES": 1}, 8, 3),
        ({"BK": 32, "TILES": 1}, 8, 3),
        ({"BK": 64, "TILES": 1}, 4, 3),
        ({"BK": 32, "TILES": 1}, 4, 3),
        ({"BK": 16, "TILES": 1}, 4, 3),
    ),
)
@triton.jit(do_not_specialize=COUNTS)
def _forward_tile(
    left, right, scale, exclude, row_tops, row_sums, column_tops, column_sums, aligned, kept, step_i, step_j,
    M, N, D, blocks, start, band,
    EXCLUDE: tl.constexpr, SYMMETRIC: tl.constexpr, T: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of the rows and columns of tile (block, distance), start <= distance < start + band; with two
    `TILES` of that of the next distance too, if there is one, whose rows are the same."""
    pid = tl.program_id(0)
    programs = tl.cdiv(band, TILES)
    block = pid // programs
    slot = pid % programs * TILES
    distance = start + slot
    row = block * T
    column = ((block + distance) % blocks) * T
    i = row + tl.arange(0, T)
    excluded = i
    if EXCLUDE == "row":
        excluded = load_excluded(exclude, i, M, N)
    if TILES == 1:
        product = products(left, right, row, column, D, T, T, BK, PRECISION)
    else:
        column_after = ((block + distance + 1) % blocks) * T
        product, after = products_of_two(left, right, row, column, column_after, D, T, BK, PRECISION)
    _reduce_tile(
        product, scale, excluded, exclude, row_tops, row_sums, column_tops, column_sums, aligned, kept, step_i, step_j,
        row, column, distance, slot, M, N, blocks, band, EXCLUDE, SYMMETRIC, T,
    )  # fmt: skip
    if TILES == 2:
        if slot + 1 < band:
            _reduce_tile(
                after, scale, excluded, exclude, row_tops, row_sums, column_tops, column_sums, aligned, kept,
                step_i, step_j, row, column_after, distance + 1, slot + 1, M, N, blocks, band, EXCLUDE, SYMMETRIC, T,
            )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _merge(
    tops, sums, aligned, weight, loss, shift, total, N, row_blocks, blocks, start, band, distances,
    SYMMETRIC: tl.constexpr, T: tl.constexpr, SLOTS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Fold a band's maxima and sums of N rows (or columns) into (shift, total); after the last band, finish."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < N
    top = tl.full((BR,), float("-inf"), tl.float32)
    acc = tl.zeros((BR,), tl.float32)
    if start > 0:
        top = tl.load(shift + i, mask=inside, other=0.0)
        acc = tl.load(total + i, mask=inside, other=0.0)
    slot = tl.arange(0, SLOTS)
    distance = start + slot % band
    if SYMMETRIC:
        # A tile at distance 0, or half way round, stored nothing for its columns: they are rows of the same or another
        # tile.
        written = (slot < band) | ((slot < 2 * band) & (distance > 0) & (2 * distance < blocks))
        written = written[:, None] & inside[None, :]
    else:
        # Columns of block c have an entry from row block c - d, if there is one; rows, for which row_blocks = blocks,
        # have one from every distance.
        block = (i // T + blocks)[None, :] - distance[:, None]
        written = (slot < band)[:, None] & (block % blocks < row_blocks) & inside[None, :]
    at = slot[:, None].to(tl.int64) * N + i[None, :]
    tops_ = tl.load(tops + at, mask=written, other=float("-inf"))
    sums_ = tl.load(sums + at, mask=written, other=0.0)
    highest = tl.maximum(top, tl.max(tops_, 0))
    base = finite(highest)
    acc = acc * tl.exp(top - base) + tl.sum(sums_ * tl.exp(tops_ - base[None, :]), 0)
    if start + band == distances:
        if loss is not None:
            positive = tl.load(aligned + i, mask=inside, other=0.0)
            if weight is not None:
                positive *= tl.load(weight + i, mask=inside, other=0.0)
            tl.store(loss + i, tl.log(acc) + (base - positive), mask=inside)
        tl.store(shift + i, tl.where(acc == acc, base, acc), mask=inside)
    else:
        tl.store(shift + i, highest, mask=inside)
    tl.store(total + i, acc, mask=inside)


class Positives(NamedTuple):
    """Row i's is (i + N / 2) mod N. `aligned` receives its S; `loss` the log-sum-exp minus weight (None: 1) times S.
    Sums have the positive but where EXCLUDE is "partner"."""

    loss: Tensor
    aligned: Tensor
    weight: Tensor | None


def totals_and_shifts(
    left: Tensor,
    right: Tensor,
    sizes: tuple[int, int],
    scale: Tensor,
    precision: str,
    exclude_by: str | None,
    *,
    exclude: Tensor | None = None,
    symmetric: bool = False,
    columns: bool = False,
    positives: Positives | None = None,
    kept: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """[(total, shift)] of the rows of S, then of its columns if wanted.

    Args:
        left: x, padded.
        right: y, padded.
        sizes: M and N, neither of them 0; with `columns`, M is at most N.
        scale: of S, 0-d.
        precision: of products.
        exclude_by: EXCLUDE in common/tiles.py; "partner" with `positives` only.
        exclude: the column that a row leaves out, or the row that a column does.
        symmetric: whether S is, x and y being the same rows.
        columns: whether the columns' sums are wanted.
        positives: of NT-Xent.
        kept: receives all products <x_i, y_j>, see common/kept.py.
    """
    rows, others = sizes
    tile = 64 if precision == "float32" or max(sizes) <= 2048 else 128
    row_blocks, blocks = triton.cdiv(rows, tile), triton.cdiv(others, tile)
    distances = blocks // 2 + 1 if symmetric else blocks
    limit = _BAND if symmetric or columns else _BAND * max(1, min(4, 16 // row_blocks))  # few rows fill no GPU
    band = triton.cdiv(distances, triton.cdiv(distances, limit))

    def new(*shape: int) -> Tensor:
        return left.new_empty(shape, dtype=torch.float32)

    # For rows, then for columns: slots of maxima and of sums, the number of blocks that they come from, shift, total.
    slots = 2 * band if symmetric else band
    sides = [(new(slots, rows), new(slots, rows), blocks, new(rows), new(rows))]
    if columns:
        sides.append((new(slots, others), new(slots, others), row_blocks, new(others), new(others)))
    column_slots = sides[-1][:2] if symmetric or columns else (None, None)
    loss, aligned, weight = positives or (None, None, None)
    for start in range(0, distances, band):
        width = min(band, distances - start)
        _forward_tile[lambda meta, width=width: (row_blocks * triton.cdiv(width, meta["TILES"]),)](
            left, right, scale, exclude, *sides[0][:2], *column_slots, aligned, kept,
            *((None, None) if kept is None else kept.stride()), *sizes, left.shape[1], blocks, start, width,
            EXCLUDE=exclude_by, SYMMETRIC=symmetric, T=tile, PRECISION=input_precision(precision), **OPTIONS,
        )  # fmt: skip
        for tops, sums, heard, shift, total in sides:
            count = shift.shape[0]
            _merge[(triton.cdiv(count, 16),)](
                tops, sums, aligned, weight, loss, shift, total, count, heard, blocks, start, width, distances,
                SYMMETRIC=symmetric, T=tile, SLOTS=max(triton.next_power_of_2(slots), 8), BR=16, **OPTIONS,
            )  # fmt: skip
    return [(total, shift) for _, _, _, shift, total in sides]


def softmax_sums(
    left: Tensor,
    right: Tensor,
    sizes: tuple[int, int],
    scale: Tensor,
    precision: str,
    exclude_by: str | None,
    *,
    exclude: Tensor | None = None,
    kept: Tensor | None = None,
) -> Sums:
    """The sums of exponentials times y, and of exponentials, relative to the rows' maxima; arguments as above."""
    pairs = Weights(left, right, sizes, scale, precision, "softmax", exclude_by, exclude=exclude)
    if not is_wide(left.shape[1], precision):
        return accumulate(pairs)
    [(total, shift)] = totals_and_shifts(left, right, sizes, scale, precision, exclude_by, exclude=exclude, kept=kept)
    sums = accumulate(pairs._replace(rows=Factors(shift, None)), kept=kept)
    return sums._replace(top=shift[None], total=total[None])
