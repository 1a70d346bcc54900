"""Products W y with weights W of similarities S, which the softmax and the sigmoid losses share on the GPU.

For M rows x_i and N rows y_j let S = scale x y^T + bias. Every gradient here, and some of the losses, is a product

    G_i = sum_j W_ij y_j

whose weights W_ij are a function of S_ij. Neither S nor W is stored: their tiles live in registers.

Algorithm
  1. `pad` (normalises and) rounds rows to the dtype of the products, once, into a copy whose rows and columns are
     padded with zeros, so that the loops below load whole tiles.
  2. `accumulate`: a program owns a block of rows of G and walks over the columns: it computes a tile of S, from it a
     tile of W, and adds W y to G. While D <= 128, G stays in registers; a wider G lies in memory, where this program
     alone reads and writes it. If there are too few rows to fill the GPU, the columns are split between programs, each
     with a G of its own. G_j = sum_i W_ij x_i is the same pass with x and y exchanged.
  3. `collect` (collect.py) adds the splits and applies the factors that all weights of a row share.

Two things vary. WEIGHT says how W comes from S:

    both      r_i exp(S_ij - s_i) + c_j exp(S_ij - t_j)    given factors r, c and shifts s, t of rows and columns
    column    c_j exp(S_ij - t_j)
    softmax   exp(S_ij - max_j S_ij)                       with the maximum over the columns seen so far, as in flash
                                                           attention: when it grows, earlier sums are scaled down
    sigmoid   1 / (1 + exp(-S_ij))                         relative to exp(min(max_j S_ij, 0)), handled the same way

EXCLUDE says which entries are left out, as described in tiles.py.

Cost: 2 U, in units U = 2 M N D floating-point operations, 1 U where a forward pass has kept its products (kept.py). No
atomics: every word is written by one program, and a kernel of one configuration gives the same bits every time.
(Autotuning picks the configuration once per process; another may differ in the last bits.)

Memory: (M + N) Dp elements of the products' dtype (Dp: D rounded up to a multiple of 64), none for rows that already
are as `pad` would leave them; M Dp floats for G, up to 2^15 Dp where columns are split.

Numerics: sums, maxima and exponentials are float32. Weights are divided by a power of two near the largest |factor|
(for softmax and sigmoid they are relative to a maximum, as above) and multiplied by 2^13, so that float16 holds small
ones.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import (
    OPTIONS,
    PEAK,
    PROGRAMS,
    ROWS,
    autotune,
    configs,
    input_precision,
    is_wide,
    suits_units,
)
from fastssl.kernels.common.tiles import (
    COUNTS,
    at,
    exponents,
    finite,
    kept_tile,
    load_excluded,
    load_scale,
    products,
    softplus,
    span,
)


def _tf32_in_tensor_memory(named: dict[str, Any], size: int, capability: int) -> bool:
    return capability // 10 == 10 and named["PRECISION"] == "tf32" and size == 4


def narrow_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    operands_in_registers = capability // 10 in (8, 12)  # mma.sync; Hopper's and Blackwell's read shared memory
    if operands_in_registers and c["BN"] * named["D"] > 64 * 64:
        return None
    running, tf32 = named["WEIGHT"] in ("softmax", "sigmoid"), named["PRECISION"] == "tf32" and size == 4
    if capability // 10 in (10, 12) and tf32 and running and c["BM"] != 64:
        return None
    if capability // 10 == 9 and tf32 and running and (c["BN"], named["D"]) == (64, 128):
        return None
    if capability // 10 == 10 and not tf32 and named["WEIGHT"] == "both" and c["BM"] == 64:
        return None
    return (c["BM"] + c["stages"] * c["BN"]) * named["D"] * size


def wide_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    if not suits_units(c, named):
        return None
    weight, tile = named["WEIGHT"], (c["BM"], c["BN"], c["BK"])
    if _tf32_in_tensor_memory(named, size, capability):
        spilled = tile != ((64, 64, 32) if weight == "sigmoid" else (128, 64, 32))
    else:
        spilled = weight == "sigmoid" and tile in ((64, 32, 16), (64, 64, 32))
        if capability // 10 in (10, 12):
            spilled |= (weight, tile) == ("both", (64, 64, 16))
        if capability // 10 == 12:
            spilled |= (weight, tile) in (("sigmoid", (128, 64, 64)), ("column", (64, 64, 32)))
    return None if spilled else c["stages"] * (c["BM"] + c["BN"]) * c["BK"] * size


@triton.jit
def power_of_two(x):
    """x >= 0 rounded down to a power of two, at least 2^-100; 1 for 0, infinity and NaN, which set no scale."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where((x == 0) | (exponent == 255), 127, tl.maximum(exponent, 27))
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_factors(shift, factor, to_peak, i, count):
    """(shift, factor times `to_peak`) of rows i; both are 0 outside."""
    inside = i < count
    scaled = tl.load(factor + i, mask=inside, other=0.0) * to_peak
    return tl.load(shift + i, mask=inside, other=0.0), scaled


@triton.jit
def weights(
    x, shift_i, factor_i, column_shift, column_factor, to_peak, top, total, column, N,
    WEIGHT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of W scaled to `PEAK`, the factors for earlier sums, and the rows' maxima and totals so far."""
    j = column + tl.arange(0, BN)
    if WEIGHT == "both" or WEIGHT == "column":
        shift_j, factor_j = load_factors(column_shift, column_factor, to_peak, j, N)
        if WEIGHT == "both":
            w = factor_i[:, None] * tl.exp(x - shift_i[:, None]) + factor_j[None, :] * tl.exp(x - shift_j[None, :])
        else:
            w = factor_j[None, :] * tl.exp(x - shift_j[None, :])
        return w, top, top, total
    highest = tl.maximum(top, tl.max(x, 1))
    if WEIGHT == "softmax":
        p = tl.exp(x - finite(highest)[:, None])
    else:
        highest = tl.minimum(highest, 0.0)
        p = tl.exp(tl.minimum(x, 0.0) - finite(highest)[:, None]) / (1 + tl.exp(-tl.abs(x)))
    alpha = tl.exp(top - finite(highest))
    return p * PEAK, alpha, highest, total * alpha + tl.sum(p, 1)


@triton.jit
def begin(exclude, row_shift, row_factor, peak, i, M, N, WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr):
    """A block of rows before its first tile: excluded columns, shifts, factors, their scaling; maxima and sums."""
    top = tl.full((BM,), float("-inf"), tl.float32)
    zero = tl.zeros((BM,), tl.float32)
    excluded = i
    shift, factor, to_peak = zero, zero, 1.0
    if EXCLUDE == "row":
        excluded = load_excluded(exclude, i, M, N)
    if WEIGHT == "both" or WEIGHT == "column":
        to_peak = PEAK / power_of_two(tl.load(peak))
    if WEIGHT == "both":
        shift, factor = load_factors(row_shift, row_factor, to_peak, i, M)
    return excluded, shift, factor, to_peak, top, zero, zero


@triton.jit
def end(tops, totals, losses, split, i, M, top, total, loss):
    """Store what a split has found for rows i besides G."""
    to = split.to(tl.int64) * M + i
    if tops is not None:
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
    excluded, shift_i, factor_i, to_peak, top, total, loss = begin(
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
            w, alpha, top, total = weights(
                x, shift_i, factor_i, column_shift, column_factor, to_peak, top, total, column, N, WEIGHT, BN
            )
            if WEIGHT == "softmax" or WEIGHT == "sigmoid":
                acc *= alpha[:, None]
            acc = tl.dot(w.to(y_j.dtype), y_j, acc, input_precision=PRECISION)
    if gradient is not None:
        tl.store(at(gradient, split.to(tl.int64) * padded_rows + row, D, BM) + d[None, :], acc)
    end(tops, totals, losses, split, i, M, top, total, loss)


@autotune(
    wide_needs,
    ["D", "splits", "WEIGHT", "PRECISION"],
    configs(
        ({"BM": 128, "BN": 64, "BK": 32}, 8, 3),
        ({"BM": 128, "BN": 64, "BK": 64}, 8, 2),
        ({"BM": 64, "BN": 128, "BK": 32}, 8, 3),
        ({"BM": 64, "BN": 64, "BK": 32}, 4, 3),
        ({"BM": 64, "BN": 64, "BK": 16}, 8, 2),
        ({"BM": 64, "BN": 32, "BK": 16}, 4, 2),
    ),
)
@triton.jit(do_not_specialize=COUNTS)
def accumulate_wide(
    left, right, scale, bias, exclude, row_shift, row_factor, column_shift, column_factor, peak, aligned,
    tops, totals, losses, gradient, M, N, padded_rows, splits, D, kept, step_i, step_j,
    WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Like `accumulate_narrow`, for any D: G is in memory, and BK of its columns are processed at a time.

    `kept`, if there, are all products: a forward pass (weights with a running maximum) writes them, a backward pass
    reads them."""
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits * BM
    i = row + tl.arange(0, BM)
    factor = load_scale(scale)
    offset = load_scale(bias) if bias is not None else None
    excluded, shift_i, factor_i, to_peak, top, total, loss = begin(
        exclude, row_shift, row_factor, peak, i, M, N, WEIGHT, EXCLUDE, BM
    )
    k = tl.arange(0, BK)
    start, stop = span(split, splits, N)
    for column in range(start, stop, BN):
        if (kept is not None) and (WEIGHT == "both" or WEIGHT == "column"):
            product = tl.load(kept_tile(kept, row, column, step_i, step_j, BM, BN))
        else:
            product = products(left, right, row, column, D, BM, BN, BK, PRECISION)
            if kept is not None:
                tl.store(kept_tile(kept, row, column, step_i, step_j, BM, BN), product)
        x = exponents(product, factor, offset, excluded, exclude, aligned, row, column, M, N, EXCLUDE, BM, BN)
        if losses is not None:
            loss += tl.sum(softplus(x), 1)
        if gradient is not None:
            w, alpha, top, total = weights(
                x, shift_i, factor_i, column_shift, column_factor, to_peak, top, total, column, N, WEIGHT, BN
            )
            w = w.to(right.dtype.element_ty)
            tl.debug_barrier()  # makes what other threads of this program have stored visible to the loads below
            y_j = at(right, column, D, BN) + k[None, :]
            to = at(gradient, split.to(tl.int64) * padded_rows + row, D, BM) + k[None, :]
            for _ in range(0, D, BK):
                acc = tl.load(to, mask=tl.full((1, BK), column, tl.int32) > start, other=0.0)
                if WEIGHT == "softmax" or WEIGHT == "sigmoid":
                    acc *= alpha[:, None]
                tl.store(to, tl.dot(w, tl.load(y_j), acc, input_precision=PRECISION))
                y_j += BK
                to += BK
    end(tops, totals, losses, split, i, M, top, total, loss)


class Factors(NamedTuple):
    """For each row of one side: its weights are factor exp(S - shift)."""

    shift: Tensor
    factor: Tensor


def largest(*factors: Factors) -> Tensor:
    """The largest |factor|, on the device."""
    return reduce(torch.maximum, (torch.linalg.vector_norm(f.factor, float("inf")) for f in factors))


class Sums(NamedTuple):
    """What `accumulate` leaves for each split: G; for softmax and sigmoid, maxima and totals; for sigmoid, losses."""

    weight: str
    gradient: Tensor | None
    peak: Tensor | None
    top: Tensor | None
    total: Tensor | None
    loss: Tensor | None


def accumulate(
    left: Tensor,
    right: Tensor,
    sizes: tuple[int, int],
    scale: Tensor,
    precision: str,
    weight: str,
    exclude_by: str | None,
    *,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    rows: Factors | None = None,
    columns: Factors | None = None,
    peak: Tensor | None = None,
    aligned: Tensor | None = None,
    derive: bool = True,
    loss: bool = False,
    kept: Tensor | None = None,
) -> Sums:
    """G = W y in splits, of (M, N) = `sizes` rows and columns, for x and y as `pad` leaves them.

    Args:
        left: x.
        right: y.
        sizes: M and N, neither of them 0.
        scale: of S, 0-d.
        precision: of products.
        weight: WEIGHT.
        exclude_by: EXCLUDE.
        bias: of S, 0-d.
        exclude: the column that a row leaves out, or the row that a column does.
        rows: factors of the rows, for "both".
        columns: factors of the columns, for "both" and "column".
        peak: the largest |factor|, 0-d.
        aligned: receives the S of NT-Xent's positives.
        derive: whether G is wanted.
        loss: whether the losses of the rows are wanted, for "sigmoid".
        kept: all products <x_i, y_j>, see kept.py: written for "softmax", else read.
    """
    count, others = sizes
    padded_rows, padded = left.shape
    units, column_units = padded_rows // ROWS, right.shape[0] // ROWS
    splits = 1 << (min(column_units, max(PROGRAMS // units, 1)).bit_length() - 1)

    def new(*shape: int) -> Tensor:
        return left.new_empty(shape, dtype=torch.float32)

    running = derive and weight in ("softmax", "sigmoid")
    sums = Sums(
        weight,
        new(splits, padded_rows, padded) if derive else None,
        peak,
        new(splits, count) if running else None,
        new(splits, count) if running else None,
        new(splits, count) if loss else None,
    )
    kernel, only_wide = accumulate_narrow, {}
    if is_wide(padded, precision):
        steps = (None, None) if kept is None else kept.stride()
        kernel, only_wide = accumulate_wide, {"kept": kept, "step_i": steps[0], "step_j": steps[1]}

    def grid(meta: dict) -> tuple[int]:
        return (triton.cdiv(count, meta["BM"]) * splits,)

    kernel[grid](
        left, right, scale, bias, exclude, *(rows or (None, None)), *(columns or (None, None)), peak, aligned,
        sums.top, sums.total, sums.loss, sums.gradient, count, others, padded_rows, splits, D=padded,
        WEIGHT=weight, EXCLUDE=exclude_by, PRECISION=input_precision(precision), **only_wide, **OPTIONS,
    )  # fmt: skip
    return sums
