"""Tiles of a similarity matrix on the GPU: what the softmax and the sigmoid losses share.

For M rows x_i and N rows y_j let S = scale x y^T + bias. Every gradient here, and some of the losses, is a product

    G_i = sum_j W_ij y_j

whose weights W_ij are a function of S_ij. Neither S nor W is stored: their tiles live in registers.

Algorithm
  1. `pad` (normalises and) rounds rows to the dtype of the products, once, into a copy whose rows and columns are
     padded with zeros, so that the loops below load whole tiles.
  2. `accumulate`: a program owns a block of rows of G and walks over the columns: a tile of S, its tile of W, G += W y.
     G stays in registers while D <= 128; a wider one lies in memory, where the program alone reads and writes it.
     Where there are too few rows to fill the GPU the columns are split between programs, each with a G of its own.
     G_j = sum_i W_ij x_i is the same pass with x and y exchanged.
  3. `collect` adds the splits and applies the factors that all weights of a row share.

Two things vary. WEIGHT says how W comes from S:

    both      r_i exp(S_ij - s_i) + c_j exp(S_ij - t_j)    given factors r, c and shifts s, t of rows and columns
    column    c_j exp(S_ij - t_j)
    softmax   exp(S_ij - max_j S_ij)                       the maximum of the columns seen so far, as in flash
                                                           attention: when it grows, what was summed is scaled down
    sigmoid   1 / (1 + exp(-S_ij))                         relative to exp(min(max_j S_ij, 0)), kept in the same way

EXCLUDE says which columns j row i leaves out:

    None      none
    row       exclude[i]
    column    those with exclude[j] = i: `row` after x and y have been exchanged
    diagonal  i
    partner   i and, apart, (i + N / 2) mod N: NT-Xent's positive, whose S is noted and whose weight the caller adds

Cost: 2 U, in units U = 2 M N D floating-point operations. No atomics: every word is written by one program, and a
kernel of one configuration gives the same bits every time. (Autotuning picks the configuration once per process;
another may differ in the last bits.)

Memory: (M + N) Dp elements of the products' dtype (Dp: D rounded up to 64), none for rows that are already as `pad`
would leave them; M Dp floats for G, up to 2^15 Dp where columns are split.

Numerics: sums, maxima and exponentials are float32, exponents in base 2. Weights are held at 2^13 times their size
relative to the largest |factor| (or as above), by powers of two, so that float16 holds small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = 128  # rows are padded to a multiple of it: the largest tile
PROGRAMS = 256  # row blocks times column splits of `accumulate`, where the columns suffice

EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize's
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PEAK = tl.constexpr(8192.0)  # of weights: far enough from float16's 65504 and from its 6e-5

COUNTS = ["B", "M", "N", "row_blocks", "blocks", "start", "band", "splits"]  # a changing batch must not compile anew
# Contracting a product with a sum would round S differently in one kernel and in another, and a sum of products
# differently in the two lanes that share it.
OPTIONS = {"enable_fp_fusion": False}


def configs(*choices: tuple[dict[str, int], int, int]) -> list[triton.Config]:
    """Triton's configurations from (tile sizes, warps, stages)."""
    return [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in choices]


def suited(
    needs: Callable[..., int | None],
    configs: Sequence[triton.Config],
    named: dict[str, Any],
    capability: int,
    shared: int,
) -> list[triton.Config]:
    """Those of `configs` that suit a device: `needs` gives the bytes of shared memory of their tiles, or None."""
    size = named["left"].element_size()
    suited = []
    for config in configs:
        choice = config.kwargs | {"warps": config.num_warps, "stages": config.num_stages}
        tiles = needs(choice, named, size, capability)
        if tiles is not None and tiles + 2048 <= shared:  # reductions across warps need the rest
            suited.append(config)
    return suited


def autotune(needs: Callable[..., int | None], key: list[str], configs: list[triton.Config]) -> Callable:
    """triton.autotune over the `suited` ones of `configs`."""

    def prune(configs: list[triton.Config], named: dict[str, Any], **meta: Any) -> list[triton.Config]:
        capability = driver.active.get_current_target().arch
        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
        return suited(needs, configs, named | meta, capability, properties["max_shared_mem"])

    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": prune})


def suits_units(c: dict[str, int], named: dict[str, Any]) -> bool:
    """IEEE float32 has no tensor cores: each thread holds a slice of both operands, which must be thin."""
    return (c["BK"] == 16) == (named["PRECISION"] == "ieee")


# What the assembler is known to spill (the tests compile every configuration) is left out below. Blackwell keeps
# products in tensor memory, and TF32 operands pass through registers on their way there.


def _tf32_in_tensor_memory(named: dict[str, Any], size: int, capability: int) -> bool:
    return capability // 10 == 10 and named["PRECISION"] == "tf32" and size == 4


def narrow_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    operands_in_registers = capability // 10 in (8, 12)  # mma.sync; Hopper's and Blackwell's read shared memory
    if operands_in_registers and c["BN"] * named["D"] > 64 * 64:
        return None
    running, tf32 = named["WEIGHT"] in ("softmax", "sigmoid"), named["PRECISION"] == "tf32" and size == 4
    if capability // 10 in (10, 12) and tf32 and running and c["BM"] != 64:
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
def load_rows(z1, z2, rows, columns, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2):
    """Rows of [z1; z2], B in z1 and N in all, in float32, zero outside. `rows` (R, 1), `columns` (1, C) are int64."""
    first = (rows < B) & (columns < D)
    second = (rows >= B) & (rows < N) & (columns < D)
    x1 = tl.load(z1 + rows * row_stride1 + columns * column_stride1, mask=first, other=0.0)
    x2 = tl.load(z2 + (rows - B) * row_stride2 + columns * column_stride2, mask=second, other=0.0)
    return tl.where(rows < B, x1, x2).to(tl.float32)


@triton.jit
def unit(x, inverse):
    """x over its norm, rounded once."""
    return (x.to(tl.float64) * inverse).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def prepare(
    z1, z2, z, inverse, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2, PADDED,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the (normalised) rows, rounded to z's dtype and padded with zeros, and what they were multiplied by."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    squares = tl.zeros((BR, BD), tl.float64)
    if NORMALIZE:
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
            x = load_rows(z1, z2, rows, columns, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2)
            squares += x.to(tl.float64) * x
        factor = 1 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), EPS)
    else:
        factor = tl.full((BR,), 1.0, tl.float64)
    tl.store(inverse + row, factor, mask=row < N)
    for start in range(0, PADDED, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = load_rows(z1, z2, rows, columns, B, N, D, row_stride1, column_stride1, row_stride2, column_stride2)
        out = unit(x, factor[:, None]).to(z.dtype.element_ty)
        tl.store(z + rows * PADDED + columns, out, mask=columns < PADDED)


@triton.jit
def at(base, row, width, R: tl.constexpr):
    """Pointers (R, 1) to the first elements of R rows, `width` wide, from `row` on."""
    return base + tl.cast(row, tl.int64) * width + tl.arange(0, R)[:, None] * width


@triton.jit
def products(
    left, right, row, column, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """<x_i, y_j> for BM rows from `row` on and BN columns from `column` on."""
    k = tl.arange(0, BK)
    left = at(left, row, D, BM) + k[None, :]
    right = at(right, column, D, BN) + k[None, :]
    product = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, D, BK):
        product = tl.dot(tl.load(left), tl.trans(tl.load(right)), product, input_precision=PRECISION)
        left += BK
        right += BK
    return product


@triton.jit
def load_scale(scale):
    """In units of log 2, so that 2^x is the exponential."""
    return tl.load(scale).to(tl.float32) * LOG2E


@triton.jit
def load_excluded(exclude, i, count, others):
    """exclude[i] as int32, -1 where it is none of the `others` rows and outside of its own `count`."""
    other = tl.load(exclude + i, mask=i < count, other=-1)
    return tl.where((other >= 0) & (other < others), other, -1).to(tl.int32)


@triton.jit
def finite(top):
    """A maximum to subtract: 0 where nothing was seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def natural(shift, total):
    """(shift, total) in natural units from units of log 2: what rounding takes from the shift goes to the total."""
    rounded = shift * LN2
    return rounded, total * tl.exp2(shift - rounded * LOG2E)


@triton.jit
def power_of_two(x):
    """A positive number rounded down to a power of two, 2^-100 at least; 1 for 0, infinity, NaN, which set no scale."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where((x == 0) | (exponent == 255), 127, tl.maximum(exponent, 27))
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_factors(shift, factor, to_peak, i, count):
    """(shift in units of log 2, factor scaled by `to_peak`) of rows i; the factor is 0 outside."""
    inside = i < count
    scaled = tl.load(factor + i, mask=inside, other=0.0) * to_peak
    return tl.load(shift + i, mask=inside, other=0.0) * LOG2E, scaled


@triton.jit
def softplus(x):
    """log(1 + 2^x): log(1 + t) = 2 artanh(t / (2 + t)), whose odd minimax polynomial is exact to 5e-9."""
    t = tl.exp2(-tl.abs(x))
    s = t / (2 + t)
    q = s * s
    series = tl.fma(q, 0.14012230, 0.13999570)
    series = tl.fma(series, q, 0.20010850)
    series = tl.fma(series, q, 0.33333207)
    return tl.maximum(x, 0.0) * LN2 + 2 * (s * (series * q) + s)


@triton.jit
def exponents(
    product, scale2, bias2, excluded, exclude, aligned, row, column, M, N,
    EXCLUDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of S in units of log 2, minus infinity where a column is left out. A partner's S goes to `aligned`."""
    i = row + tl.arange(0, BM)
    j = column + tl.arange(0, BN)
    x = product * scale2
    if bias2 is not None:
        x += bias2
    T: tl.constexpr = max(BM, BN)
    if EXCLUDE == "partner":
        half = N // 2
        gap = tl.abs(row - column)
        if (gap < T) | (tl.abs(gap - half) < T) | (column + BN > N):
            x = tl.where(j[None, :] < N, x, float("-inf"))
            distance = tl.abs(i[:, None] - j[None, :])
            partner = tl.where(i < half, i + half, i - half)
            found = tl.sum(tl.where(partner[:, None] == j[None, :], x, 0.0), 1)
            tl.store(aligned + i, found, mask=(partner >= column) & (partner < column + BN) & (i < N))
            x = tl.where((distance != 0) & (distance != half), x, float("-inf"))
    elif EXCLUDE == "diagonal":
        if (tl.abs(row - column) < T) | (column + BN > N):
            x = tl.where((i[:, None] != j[None, :]) & (j[None, :] < N), x, float("-inf"))
    else:
        if EXCLUDE == "row":
            x = tl.where(excluded[:, None] != j[None, :], x, float("-inf"))
        elif EXCLUDE == "column":
            x = tl.where(load_excluded(exclude, j, N, M)[None, :] != i[:, None], x, float("-inf"))
        if column + BN > N:
            x = tl.where(j[None, :] < N, x, float("-inf"))
    return x


@triton.jit
def weights(
    x, shift_i, factor_i, column_shift, column_factor, to_peak, top, total, column, N,
    WEIGHT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of W scaled to `PEAK`, what to multiply earlier sums by, and the rows' maxima and totals so far."""
    j = column + tl.arange(0, BN)
    if WEIGHT == "both" or WEIGHT == "column":
        shift_j, factor_j = load_factors(column_shift, column_factor, to_peak, j, N)
        if WEIGHT == "both":
            w = factor_i[:, None] * tl.exp2(x - shift_i[:, None]) + factor_j[None, :] * tl.exp2(x - shift_j[None, :])
        else:
            w = factor_j[None, :] * tl.exp2(x - shift_j[None, :])
        return w, top, top, total
    highest = tl.maximum(top, tl.max(x, 1))
    if WEIGHT == "softmax":
        p = tl.exp2(x - finite(highest)[:, None])
    else:
        highest = tl.minimum(highest, 0.0)
        p = tl.exp2(tl.minimum(x, 0.0) - finite(highest)[:, None]) / (1 + tl.exp2(-tl.abs(x)))
    alpha = tl.exp2(top - finite(highest))
    return p * PEAK, alpha, highest, total * alpha + tl.sum(p, 1)


@triton.jit
def span(split, splits, N):
    """Columns [start, stop) of a split, in whole multiples of 128, never none."""
    units = tl.cdiv(N, 128)
    return units * split // splits * 128, units * (split + 1) // splits * 128


@triton.jit
def begin(exclude, row_shift, row_factor, peak, i, M, N, WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr):
    """A block of rows before its first tile: excluded columns, shifts, factors and their scaling; maximum and sums."""
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
    """Store what a split found of rows i beside G."""
    to = split.to(tl.int64) * M + i
    if tops is not None:
        tl.store(tops + to, top, mask=i < M)
        tl.store(totals + to, total, mask=i < M)
    if losses is not None:
        tl.store(losses + to, loss, mask=i < M)


@autotune(
    narrow_needs,
    ["D", "splits", "WEIGHT", "PRECISION"],  # splits: a power of two that falls as rows grow: few sizes are tuned
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
    """G = W y for BM rows and one split of the columns; G in registers."""
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits * BM
    i = row + tl.arange(0, BM)
    scale2 = load_scale(scale)
    bias2 = load_scale(bias) if bias is not None else None
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
        x = exponents(product, scale2, bias2, excluded, exclude, aligned, row, column, M, N, EXCLUDE, BM, BN)
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
    tops, totals, losses, gradient, M, N, padded_rows, splits, D,
    WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `accumulate_narrow`, for any D: G in memory, BK columns of it at a time."""
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits * BM
    i = row + tl.arange(0, BM)
    scale2 = load_scale(scale)
    bias2 = load_scale(bias) if bias is not None else None
    excluded, shift_i, factor_i, to_peak, top, total, loss = begin(
        exclude, row_shift, row_factor, peak, i, M, N, WEIGHT, EXCLUDE, BM
    )
    k = tl.arange(0, BK)
    start, stop = span(split, splits, N)
    for column in range(start, stop, BN):
        product = products(left, right, row, column, D, BM, BN, BK, PRECISION)
        x = exponents(product, scale2, bias2, excluded, exclude, aligned, row, column, M, N, EXCLUDE, BM, BN)
        if losses is not None:
            loss += tl.sum(softplus(x), 1)
        if gradient is not None:
            w, alpha, top, total = weights(
                x, shift_i, factor_i, column_shift, column_factor, to_peak, top, total, column, N, WEIGHT, BN
            )
            w = w.to(right.dtype.element_ty)
            tl.debug_barrier()  # what other threads of this program stored is seen by its loads
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


@triton.jit(do_not_specialize=COUNTS)
def collect(
    x, scale, gradient, peak, tops, totals, out, shift, total, share, M, D, row_stride, column_stride,
    PADDED, padded_rows, splits,
    WEIGHT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """scale G (G itself for softmax) from the splits' sums, <x_i, G_i>, and the rows' totals and shifts."""
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
    if WEIGHT == "softmax" or WEIGHT == "sigmoid":
        acc = tl.zeros((BR,), tl.float32)
        for split in tl.range(splits, loop_unroll_factor=4):
            to = split * M + row
            top = tl.load(tops + to, mask=inside, other=float("-inf"))
            acc += tl.load(totals + to, mask=inside, other=0.0) * tl.exp2(top - highest)
        if WEIGHT == "softmax":
            rounded, correction = natural(highest, correction)
            acc *= correction * PEAK
            tl.store(shift + row, tl.where(acc == acc, rounded, acc), mask=inside)
        tl.store(total + row, acc, mask=inside)
    else:
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
            if WEIGHT == "softmax" or WEIGHT == "sigmoid":
                top = tl.load(tops + split * M + row, mask=inside, other=float("-inf"))
                part *= tl.exp2(top - highest)[:, None]
            g += part
        g *= correction[:, None]
        if share is not None:
            shares += tl.load(x + rows * row_stride + columns * column_stride, mask=mask, other=0.0).to(tl.float64) * g
        tl.store(out + rows * D + columns, (g * output_scale).to(out.dtype.element_ty), mask=mask)
    if share is not None:
        tl.store(share + row, tl.sum(shares, 1), mask=inside)


def row_block(padded: int) -> dict[str, int]:
    """Tile of the row kernels: 1024 elements, of as few rows as that takes."""
    width = min(triton.next_power_of_2(padded), 1024)
    return {"BR": 1024 // width, "BD": width}


def input_precision(precision: str) -> str:
    """tl.dot's `input_precision`, which matters for float32 operands only."""
    return "ieee" if precision == "float32" else "tf32"


def pad_views(z1: Tensor, z2: Tensor, normalize: bool, precision: str) -> tuple[Tensor, Tensor]:
    """(z, inverse): the padded (normalised) rows of [z1; z2] in the dtype of the products, and 1 / norm in float64."""
    batch, dim = z1.shape
    rows = batch + z2.shape[0]
    padded = triton.cdiv(dim, 64) * 64
    z = z1.new_empty((triton.cdiv(rows, ROWS) * ROWS, padded), dtype=DTYPES[precision])
    inverse = z1.new_empty(rows, dtype=torch.float64)
    block = row_block(padded)
    prepare[(z.shape[0] // block["BR"],)](
        z1, z2, z, inverse, batch, rows, dim, *z1.stride(), *z2.stride(), padded, normalize, **block, **OPTIONS
    )
    return z, inverse


def pad(x: Tensor, precision: str) -> Tensor:
    """The padded rows of x in the dtype of the products; x itself where it is so already."""
    rows, dim = x.shape
    whole = rows % ROWS == 0 and dim % 64 == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if whole and x.dtype == DTYPES[precision] else pad_views(x, x[:0], False, precision)[0]


class Factors(NamedTuple):
    """What the weights of one side's rows are multiplied by, relative to exp(S - shift)."""

    shift: Tensor
    factor: Tensor


def largest(*factors: Factors) -> Tensor:
    """The largest |factor|, on the device."""
    return torch.stack([torch.linalg.vector_norm(f.factor, float("inf")) for f in factors]).amax()


class Sums(NamedTuple):
    """What `accumulate` leaves of each split: G; of running weights maxima and totals; of the sigmoid losses."""

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
        rows: of "both".
        columns: of "both" and "column".
        peak: the largest |factor|, 0-d.
        aligned: receives the S of NT-Xent's positives, in units of log 2.
        derive: whether G is wanted.
        loss: whether the losses of the rows are wanted; "sigmoid" has some.
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
    # Without tensor cores a whole row does not fit a thread's registers.
    kernel = accumulate_narrow if padded <= 128 and precision != "float32" else accumulate_wide

    def grid(meta: dict) -> tuple[int]:
        return (triton.cdiv(count, meta["BM"]) * splits,)

    kernel[grid](
        left, right, scale, bias, exclude, *(rows or (None, None)), *(columns or (None, None)), peak, aligned,
        sums.top, sums.total, sums.loss, sums.gradient, count, others, padded_rows, splits, D=padded,
        WEIGHT=weight, EXCLUDE=exclude_by, PRECISION=input_precision(precision), **OPTIONS,
    )  # fmt: skip
    return sums


class Collected(NamedTuple):
    gradient: Tensor
    shift: Tensor | None
    total: Tensor | None
    share: Tensor | None


def collect_sums(sums: Sums, x: Tensor, scale: Tensor, dtype: torch.dtype, share: bool = False) -> Collected:
    """scale G, or G itself for softmax, in `dtype`; the rows' shifts and totals; and <x_i, G_i> in float64."""
    (count, dim), (splits, padded_rows, padded) = x.shape, sums.gradient.shape
    out = Collected(
        x.new_empty((count, dim), dtype=dtype),
        x.new_empty(count, dtype=torch.float32) if sums.weight == "softmax" else None,
        x.new_empty(count, dtype=torch.float32) if sums.weight in ("softmax", "sigmoid") else None,
        x.new_empty(count, dtype=torch.float64) if share else None,
    )
    block = row_block(padded)
    collect[(triton.cdiv(count, block["BR"]),)](
        x, scale, sums.gradient, sums.peak, sums.top, sums.total, *out, count, dim, *x.stride(), padded, padded_rows,
        splits, WEIGHT=sums.weight, **block, num_warps=8, **OPTIONS,
    )  # fmt: skip
    return out
