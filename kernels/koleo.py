"""KoLeo's search for nearest rows on the GPU: for rows i from `first` on, the topk rows j != i of the same group of
`size` consecutive rows that have the largest <z_i, z_j>.

Algorithm. Z Z^T is symmetric. It is cut into T x T tiles; tile (b, d) is that of row block b and column block b + d,
modulo their number: the distances d = 0 ... blocks // 2 cover every pair once. A program computes one tile, and enters
the largest product of each of its rows and of its columns into `best`, by an atomic maximum of one 64-bit number: the
product's order in the upper half, the row's number counted down in the lower. A maximum does not depend on the order
that programs run in, so the bits are the same every time, and of equal products the first row's wins. The next
neighbours are found by another pass each, which leaves out those already found.

Cost: topk U / 2, in units U = 2 N N D floating-point operations. Memory: the padded rows, and a number for each row.

Numerics: products are float32, without TF32. NaN counts as the largest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.rows import pad
from fastssl.kernels.common.tiles import products

TILE = {"T": 64, "BK": 16}  # float32 products have no tensor cores: see `suits_units`
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _leave_out(x, best, own, inside, others, found, TOPK: tl.constexpr, AXIS: tl.constexpr):
    """x, minus infinity where `others`, along the other axis, were found for rows `own` before."""
    for t in range(found):
        before = ~tl.load(best + own.to(tl.int64) * TOPK + t, mask=inside, other=0).to(tl.int32) & _LAST
        x = tl.where(tl.expand_dims(before, AXIS) == tl.expand_dims(others, 1 - AXIS), float("-inf"), x)
    return x


@triton.jit
def _enter(x, best, own, inside, start, found, TOPK: tl.constexpr, AXIS: tl.constexpr):
    """The largest of x along an axis, whose first row is `start`, and the first that has it, into `best` of `own`."""
    top, place = tl.max(x, AXIS, return_indices=True)
    at = start + place
    bits = top.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & _LAST)  # as integers, negative floats come in descending order
    key = (order.to(tl.int64) << 32) | (~at & _LAST).to(tl.int64)
    tl.atomic_max(best + own.to(tl.int64) * TOPK + found, key, mask=inside & (top > float("-inf")))


@triton.jit(do_not_specialize=["N", "first", "count", "size", "found", "blocks"])
def nearest_tile(
    z, best, N, first, count, size, found, blocks, D, TOPK: tl.constexpr, T: tl.constexpr, BK: tl.constexpr
):
    """The largest product of each row and column of a tile, with rows not found before: into best[:, found]."""
    block = tl.program_id(0) % blocks
    distance = tl.program_id(0) // blocks
    if (2 * distance == blocks) & (block >= distance):
        return  # its transpose is another program's
    row = block * T
    column = ((block + distance) % blocks) * T
    apart = (row // size > (column + T - 1) // size) | (column // size > (row + T - 1) // size)
    end = first + count
    others = ((row >= end) | (row + T <= first)) & ((column >= end) | (column + T <= first))
    if apart | others:
        return
    i = row + tl.arange(0, T)
    j = column + tl.arange(0, T)
    x = products(z, z, row, column, D, T, T, BK, "ieee")
    x = tl.where(x == x, x, float("inf"))
    together = ((i // size)[:, None] == (j // size)[None, :]) & (i[:, None] != j[None, :])
    x = tl.where(together & (i < N)[:, None] & (j < N)[None, :], x, float("-inf"))
    own = i - first
    inside = (own >= 0) & (own < count)
    _enter(_leave_out(x, best, own, inside, j, found, TOPK, 1), best, own, inside, column, found, TOPK, 1)
    if distance > 0:
        own = j - first
        inside = (own >= 0) & (own < count)
        _enter(_leave_out(x, best, own, inside, i, found, TOPK, 0), best, own, inside, row, found, TOPK, 0)


def nearest_rows(z: Tensor, first: int, rows: int, topk: int, group_size: int) -> Tensor:
    """(rows, topk) of `fastssl::koleo_loss` for CUDA tensors, from float32 z; see fastssl/ops/koleo.py."""
    count = z.shape[0]
    best = z.new_full((rows, topk), torch.iinfo(torch.int64).min, dtype=torch.int64)
    if rows == 0:
        return best
    padded = pad(z, "float32")
    blocks = triton.cdiv(count, TILE["T"])
    for found in range(topk):
        nearest_tile[(blocks * (blocks // 2 + 1),)](
            padded, best, count, first, rows, group_size, found, blocks, padded.shape[1], TOPK=topk, **TILE, **OPTIONS
        )
    return best.bitwise_not_().bitwise_and_(_LAST.value)
