"""Products W y with weights W of similarities S, which the softmax and the sigmoid losses share on the GPU.

For M rows x_i and N rows y_j let S = scale x y^T + bias. Every gradient here, and some of the losses, is a product

    G_i = sum_j W_ij y_j

whose weights W_ij are a function of S_ij (weights.py), and S_ij of rows i that leave out a column has none (tiles.py).
Neither S nor W is stored as a whole.

Algorithm
  1. `pad` (normalises and) rounds rows to the dtype of the products, once, into a copy whose rows and columns are
     padded with zeros, so that the loops below load whole tiles.
  2. While D <= 128, a program of `accumulate_narrow` owns a block of rows of G, in registers, and walks over the
     columns: it computes a tile of S, from it a tile of W, and adds W y to G. If there are too few rows to fill the
     GPU, the columns are split between programs, each with a G of its own. G_j = sum_i W_ij x_i is the same pass with
     x and y exchanged. For a wider D, and where there are no tensor cores, blocks.py stores W, a block at a time.
  3. `collect` (collect.py) adds the splits and applies the factors that all weights of a row share.

The maximum of softmax weights is that over the columns seen so far, as in flash attention: when it grows, earlier sums
are scaled down. Those of sigmoid are relative to exp(min(max_j S_ij, 0)), handled the same way.

Cost: 2 U for each side, in units U = 2 M N D floating-point operations; blocks.py has that of wide features. No
atomics: every word is written by one program, and a kernel of one configuration gives the same bits every time.
(Autotuning picks the configuration once per process; another may differ in the last bits.)

Memory: (M + N) Dp elements of the products' dtype (Dp: D rounded up to a multiple of 64), none for rows that already
are as `pad` would leave them; M Dp floats for G, up to 2^15 Dp where columns are split.

Numerics: sums, maxima and exponentials are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.blocks import accumulate_blocks
from fastssl.kernels.common.launch import OPTIONS, PEAK, PROGRAMS, ROWS, autotune, configs, input_precision, is_wide
from fastssl.kernels.common.tiles import COUNTS, at, exponents, finite, load_excluded, load_scale, softplus, span
from fastssl.kernels.common.weights import Sums, Weights, exponentials, load_factors, power_of_two, sigmoid_relative


def narrow_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    operands_in_registers = capability // 10 in (8, 12)  # mma.sync; Hopper's and Blackwell's read shared memory
    if operands_in_registers and c["BN"] * named["D"] > 64 * 64:
        return None
    running, tf32 = named["WEIGHT"] in ("softmax", "sigmoid"), named["PRECISION"] == "tf32" and size == 4
    if tf32 and capability // 10 in (10, 12):  # the one that takes neither stack nor spills under any Triton
        of_100 = (64, 8) if named["D"] == 64 else (16 if named["WEIGHT"] == "sigmoid" else 32, 4)
        if (c["BM"], c["BN"], c["warps"]) != (64, *(of_100 if capability // 10 == 10 else (32, 8))):
            return None
    elif c["BM"] == 64 and (c["BN"], c["warps"]) != (32, 4):
        return None
    if capability // 10 == 9 and tf32 and running and (c["BN"], named["D"]) == (64, 128):
        return None
    if capability // 10 == 10 and not tf32 and named["WEIGHT"] == "both" and c["BM"] == 64:
        return None
    return (c["BM"] + c["stages"] * c["BN"]) * named["D"] * size


@triton.jit
def weigh_tile(
    x, shift_i, factor_i, column_shift, column_factor, to_peak, common, top, total, column, N,
    WEIGHT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of W scaled to `PEAK`, the factors for earlier sums, and the rows' maxima and totals so far."""
    if WEIGHT == "both" or WEIGHT == "column":
        j = column + tl.arange(0, BN)
        w = exponentials(x, shift_i, factor_i, column_shift, column_factor, to_peak, common, j, N, WEIGHT)
        return w, top, top, total
    highest = tl.maximum(top, tl.max(x, 1))
    if WEIGHT == "softmax":
        p = tl.exp(x - finite(highest)[:, None])
    else:
        highest = tl.minimum(highest, 0.0)
        p = sigmoid_relative(x, finite(highest)[:, None])
    alpha = tl.exp(top - finite(highest))
    return p * PEAK, alpha, highest, total * alpha + tl.sum(p, 1)


@triton.jit
def begin(exclude, row_shift, row_factor, peak, i, M, N, WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr):
    """A block of rows before its first tile: excluded columns, shifts, factors, their scaling and the shift that they
    are relative to, NaN if there is none; maxima and sums."""
    top = tl.full((BM,), float("-inf"), tl.float32)
    zero = tl.zeros((BM,), tl.float32)
    excluded = i
    shift, factor, to_peak, common = zero, zero, 1.0, 0.0
    if EXCLUDE == "row":
        excluded = load_excluded(exclude, i, M, N)
    if WEIGHT == "both" or WEIGHT == "column":
        to_peak = PEAK / power_of_two(tl.load(peak))
    if WEIGHT == "both":
        shift, factor = load_factors(row_shift, row_factor, to_peak, i, M)
        common = tl.load(peak + 1)
    return excluded, shift, factor, to_peak, common, top, zero, zero


@triton.jit
def end(tops, totals, losses, split, i, M, top, total, loss, WEIGHT: tl.constexpr):
    """Store what a split has found for rows i besides G."""
    to = split.to(tl.int64) * M + i
    if tops is not None:
        if WEIGHT == "sigmoid":
            total *= tl.exp(top)
        tl.store(tops + to, top, mask=i < M)
        tl.store(totals + to, total, mask=i < M)
    if losses is not None:
        tl.store(losses + to, loss, mask=i < M)


@autotune(
    narrow_needs,
    ["D", "splits", "WEIGHT", "PRECISION"],  # splits is a power of two that falls as rows grow, so few sizes are tuned
    configs(
        ({"BM": 128, "BN": 64}, 8, 2),
        ({"BM": 128, "BN": 32}, 8, 2),
        ({"BM": 64, "BN": 32}, 4, 3),
        ({"BM": 64, "BN": 64}, 8, 2),
        ({"BM": 64, "BN": 32}, 8, 3),
        ({"BM": 64, "BN": 16}, 4, 3),
    ),
)
@triton.jit(do_not_specialize=COUNTS)
def accumulate_narrow(
    left, right, scale, bias, exclude, row_shift, row_factor, column_shift, column_factor, peak, aligned,
    tops, totals, losses, gradient, M, N, padded_rows, splits,
    WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G = W y for BM rows and one split of the columns, with G in registers."""
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits * BM
    i = row + tl.arange(0, BM)
    factor = load_scale(scale)
    offset = load_scale(bias) if bias is not None else None
    excluded, shift_i, factor_i, to_peak, common, top, total, loss = begin(
        exclude, row_shift, row_factor, peak, i, M, N, WEIGHT, EXCLUDE, BM
    )
    d = tl.arange(0, D)
    x_i = tl.load(at(left, row, D, BM) + d[None, :])
    acc = tl.zeros((BM, D), tl.float32)
    start, stop = span(split, splits, N)
    for column in range(start, stop, BN):
        y_j = tl.load(at(right, column, D, BN) + d[None, :])
        product = tl.dot(x_i, tl.trans(y_j), input_precision=PRECISION)
        x = exponents(product, factor, offset, excluded, exclude, aligned, row, column, M, N, EXCLUDE, BM, BN)
        if losses is not None:
            loss += tl.sum(softplus(x), 1)
        if gradient is not None:
            w, alpha, top, total = weigh_tile(
                x, shift_i, factor_i, column_shift, column_factor, to_peak, common, top, total, column, N, WEIGHT, BN
            )
            if WEIGHT == "softmax" or WEIGHT == "sigmoid":
                acc *= alpha[:, None]
            acc = tl.dot(w.to(y_j.dtype), y_j, acc, input_precision=PRECISION)
    if gradient is not None:
        tl.store(at(gradient, split.to(tl.int64) * padded_rows + row, D, BM) + d[None, :], acc)
    end(tops, totals, losses, split, i, M, top, total, loss, WEIGHT)


def accumulate(
    pairs: Weights,
    *,
    aligned: Tensor | None = None,
    derive: bool = True,
    loss: bool = False,
    kept: Tensor | None = None,
) -> Sums:
    """G = W y, in splits.

    Args:
        pairs: W; if its rows are wide, softmax weights need the rows' maxima, as shifts.
        aligned: receives the S of NT-Xent's positives, at least those of the first half of the rows.
        derive: whether G is wanted.
        loss: whether the losses are wanted, for "sigmoid".
        kept: all products <x_i, y_j> to read, for wide rows; see kept.py.
    """
    if is_wide(pairs.left.shape[1], pairs.precision):
        return accumulate_blocks(pairs, both=False, aligned=aligned, derive=derive, loss=loss, kept=kept)[0]
    pairs = pairs.surveyed(relate=True)
    left, right, sizes, scale, precision, weight, exclude_by, bias, exclude, rows, columns, peak = pairs
    (padded_rows, padded), count = left.shape, sizes[0]
    units, column_units = padded_rows // ROWS, right.shape[0] // ROWS
    splits = 1 << (min(column_units, max(PROGRAMS // units, 1)).bit_length() - 1)

    def new(wanted: bool, *shape: int) -> Tensor | None:
        return left.new_empty(shape, dtype=torch.float32) if wanted else None

    def grid(meta: dict) -> tuple[int]:
        return (triton.cdiv(count, meta["BM"]) * splits,)

    running = derive and weight in ("softmax", "sigmoid")
    top, total = (new(running, splits, count) for _ in range(2))
    sums = Sums(weight, new(derive, splits, padded_rows, padded), peak, top, total, new(loss, splits, count))
    accumulate_narrow[grid](
        left, right, scale, bias, exclude, *(rows or (None, None)), *(columns or (None, None)), peak, aligned,
        sums.top, sums.total, sums.loss, sums.gradient, *sizes, padded_rows, splits, D=padded,
        WEIGHT=weight, EXCLUDE=exclude_by, PRECISION=input_precision(precision), **OPTIONS,
    )  # fmt: skip
    return sums


def accumulate_both(pairs: Weights, *, loss: bool = False, kept: Tensor | None = None) -> tuple[Sums, Sums]:
    """What `accumulate` gives of `pairs`, and W^T x, its arguments exchanged."""
    if is_wide(pairs.left.shape[1], pairs.precision):
        return accumulate_blocks(pairs, both=True, aligned=None, derive=True, loss=loss, kept=kept)
    pairs = pairs.surveyed(relate=True)
    return accumulate(pairs, loss=loss), accumulate(pairs.exchanged())
