"""Products W y and W^T x with weights W of similarities, for rows that are too wide for registers, on the GPU.

G, the sums W y, would lie in memory, and a kernel that visits tiles of S would read and write it for every tile: 20 to
30 floating-point operations per byte, an eighth of what an H100 needs. Instead S is cut into blocks, so large that
their sums are rarely touched, and so small that their weights fit `WORKSPACE` bytes.

Algorithm. For every block, in a fixed order, `weigh` writes W, in the dtype of the products; then PyTorch's products
(cuBLAS) add W y to the rows' sums and, where they are wanted, W^T x to the columns'. For a symmetric S, one set of rows
with itself, blocks on and above the diagonal are visited, each for both of its sides.

Cost, in units U = 2 M N D floating-point operations: 2 U for one side, 3 U for both, 1.5 U and a little for both of a
symmetric S; 1 U less (half of one) where products are kept (kept.py). Of memory a weight is written once and read by
each product: 6 bytes for both sides in 16 bits. An H100 (800 TFLOP/s, 3 TB/s) takes 2 ps for them, and for 3 U 3.8 ps
at D = 512. A block of C columns reads and writes the rows' sums for every 2 C D operations: 4 bytes each, 2 C / 8 or
2,900 operations per byte.

                        U      bytes per pair, 16 bits    ps per pair at D = 512, were they all the time that it takes
    this                3      6                          3.8 + 2
    G in memory         4      4 D (1 / BM + 1 / BN)      2 x 24 FLOP per byte at 3 TB/s: 28

No atomics, and no tile depends on another: the same bits every time, as far as cuBLAS gives them (with
`torch.use_deterministic_algorithms` it asks for CUBLAS_WORKSPACE_CONFIG).

Memory: `WORKSPACE`, and (M + N) Dp floats for sums (Dp: D rounded up to a multiple of 64).

Numerics: as in weights.py. Sigmoids are relative to one bound of them all, not to each row's largest. cuBLAS's products
of float32 follow `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PEAK, autotune, configs, input_precision, suits_units
from fastssl.kernels.common.tiles import (
    COUNTS,
    exponents,
    kept_tile,
    load_excluded,
    load_scale,
    softplus,
)
from fastssl.kernels.common.weights import Sums, Weights, exponentials, load_factors, power_of_two

WORKSPACE = 1 << 28  # bytes for the weights of a block
SIDE = 256  # the sides of a block are multiples of this, the largest side of a tile
CELL = tl.constexpr(64)  # the smallest side of a tile
DIAGONAL = 2048  # rows of a symmetric block, at least: smaller ones would save operations, and fill no GPU


def weigh_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    """One configuration for each card and precision: the largest tile that spills no registers."""
    widest = 128 if size == 2 and capability // 10 == 9 else 64
    if not suits_units(c, named) or c["BN"] != widest or (size == 2) != (c["BK"] == 64):
        return None
    return c["stages"] * (c["BM"] + 2 * c["BN"]) * c["BK"] * size


@triton.jit
def store_sum(cells, x, block, column_block, width):
    """The sum of a tile, for the first of its cells, and 0 for the others: one number for each `CELL` of a block, which
    every configuration writes."""
    a, b = tl.arange(0, x.shape[0] // CELL)[:, None], tl.arange(0, x.shape[1] // CELL)[None, :]
    to = (block * a.shape[0] + a) * (width // CELL) + column_block * b.shape[1] + b
    total = tl.sum(tl.sum(x, 1), 0)
    tl.store(cells + to, tl.where((a == 0) & (b == 0), total, 0.0))


@triton.jit
def weigh_half(
    product, scale, bias, exclude, row_shift, row_factor, column_shift, column_factor, peak, aligned, kept,
    step_i, step_j, w, totals, losses, M, N, first_row, first_column, block, column_block, width,
    WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of W, and the sums of its sigmoids and losses, from its products."""
    row, column = first_row + block * BM, first_column + column_block * BN
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    excluded = i
    if EXCLUDE == "row":
        excluded = load_excluded(exclude, i, M, N)
    if kept is not None:
        inside = (i[:, None] < M) & (j[None, :] < N)
        product = tl.load(kept_tile(kept, row, column, step_i, step_j, BM, BN), mask=inside, other=0.0)
    offset = load_scale(bias) if bias is not None else None
    x = exponents(product, load_scale(scale), offset, excluded, exclude, aligned, row, column, M, N, EXCLUDE, BM, BN)
    if row + BM > M:
        x = tl.where(i[:, None] < M, x, float("-inf"))
    if losses is not None:
        store_sum(losses, softplus(x), block, column_block, width)
    if w is not None:
        if WEIGHT == "softmax":
            weights = PEAK * tl.exp(x - tl.load(row_shift + i, mask=i < M, other=0.0)[:, None])
        else:
            to_peak = PEAK / power_of_two(tl.load(peak))
            if WEIGHT == "sigmoid":
                weights = 1 / (1 + tl.exp(-x))  # one exponential, and 0 where it overflows
                store_sum(totals, weights, block, column_block, width)
                weights *= to_peak
            else:
                shift_i, factor_i = 0.0, 0.0
                if WEIGHT == "both":
                    shift_i, factor_i = load_factors(row_shift, row_factor, to_peak, i, M)
                weights = exponentials(
                    x, shift_i, factor_i, column_shift, column_factor, to_peak, float("nan"), j, N, WEIGHT
                )
        to = w + (block * BM).to(tl.int64) * width + column_block * BN
        to += tl.arange(0, BM)[:, None] * width + tl.arange(0, BN)[None, :]
        tl.store(to, weights.to(w.dtype.element_ty))


@autotune(
    weigh_needs,
    ["D", "WEIGHT", "PRECISION"],
    configs(
        ({"BM": 128, "BN": 128, "BK": 64}, 8, 3),
        ({"BM": 128, "BN": 64, "BK": 64}, 8, 3),
        ({"BM": 128, "BN": 64, "BK": 32}, 8, 3),
        ({"BM": 64, "BN": 64, "BK": 16}, 8, 2),
    ),
)
@triton.jit(do_not_specialize=COUNTS)
def weigh(
    left, right, scale, bias, exclude, row_shift, row_factor, column_shift, column_factor, peak, aligned, kept,
    step_i, step_j, w, totals, losses, M, N, D, first_row, first_column, height, width,
    WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W (height, width) of a block of S, zero past S's last row and column; and the sums of sigmoids and of losses,
    where they are wanted. `kept`, if there, are all products.

    A program has two tiles, one beside the other, with rows in common: their exponentials, one tile after the other,
    need fewer registers than those of one tile of that size."""
    pid = tl.program_id(0)
    row_blocks, column_blocks = height // BM, width // (2 * BN)
    block, column_block = tl.swizzle2d(pid // column_blocks, pid % column_blocks, row_blocks, column_blocks, 8)
    row, column = first_row + BM * block, first_column + 2 * BN * column_block
    near = tl.zeros((BM, BN), tl.float32)
    far = tl.zeros((BM, BN), tl.float32)
    if kept is None:
        # The last row stands for those after it, and the last column.
        x_row, y_row = tl.minimum(row, M - 1), tl.minimum(column, N - 1)
        k = tl.arange(0, BK)[None, :]
        x_at = tl.minimum(tl.arange(0, BM), M - 1 - x_row)[:, None] * D + k
        near_at = tl.minimum(tl.arange(0, BN), N - 1 - y_row)[:, None] * D + k
        far_at = tl.minimum(tl.arange(0, BN) + BN, N - 1 - y_row)[:, None] * D + k
        left += x_row.to(tl.int64) * D
        right += y_row.to(tl.int64) * D
        for _ in range(0, D, BK):
            x = tl.load(left + x_at)
            near = tl.dot(x, tl.trans(tl.load(right + near_at)), near, input_precision=PRECISION)
            far = tl.dot(x, tl.trans(tl.load(right + far_at)), far, input_precision=PRECISION)
            left += BK
            right += BK
    weigh_half(
        near, scale, bias, exclude, row_shift, row_factor, column_shift, column_factor, peak, aligned, kept,
        step_i, step_j, w, totals, losses, M, N, first_row, first_column, block, 2 * column_block, width,
        WEIGHT, EXCLUDE, BM, BN,
    )  # fmt: skip
    weigh_half(
        far, scale, bias, exclude, row_shift, row_factor, column_shift, column_factor, peak, aligned, kept,
        step_i, step_j, w, totals, losses, M, N, first_row, first_column, block, 2 * column_block + 1, width,
        WEIGHT, EXCLUDE, BM, BN,
    )  # fmt: skip


def add_product(out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """out += left right, or out = left right the `first` time, in float32."""
    dtype = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, left, right, beta=0 if first else 1, out=out, **dtype)


def cut(count: int, most: int) -> list[slice]:
    """Slices of about as many rows each, multiples of `SIDE`, at most `most` of them."""
    size = triton.cdiv(triton.cdiv(count, triton.cdiv(count, most)), SIDE) * SIDE
    return [slice(first, first + size) for first in range(0, count, size)]


def blocks_of(rows: int, columns: int, size: int, symmetric: bool) -> tuple[list[slice], list[slice]]:
    """The rows and the columns of blocks whose weights, of `size` bytes each, fit the workspace; as square as may be,
    because the sums of a block's sides are read and written."""

    def beside(side: int) -> int:
        return max(WORKSPACE // size // side // SIDE, 1) * SIDE

    square = beside(math.isqrt(WORKSPACE // size))
    if symmetric:
        most = min(square, max(triton.cdiv(rows, 4), DIAGONAL))
        return cut(rows, most), cut(rows, most)
    height = min(triton.cdiv(rows, SIDE) * SIDE, square)
    width = min(triton.cdiv(columns, SIDE) * SIDE, beside(height))
    return cut(rows, beside(width)), cut(columns, width)


def largest_sigmoid(pairs: Weights) -> Tensor:
    """A bound of all sigmoids for float16, whose range is short; else 1."""
    if pairs.precision != "float16":
        return pairs.scale.new_ones((), dtype=torch.float32)
    x, y = (torch.linalg.vector_norm(z, dim=1, dtype=torch.float32).amax() for z in (pairs.left, pairs.right))
    return (x * y * pairs.scale.abs() + pairs.bias).float().nan_to_num(0.0).clamp(max=0).exp()


def accumulate_blocks(
    pairs: Weights, *, both: bool, aligned: Tensor | None, derive: bool, loss: bool, kept: Tensor | None
) -> tuple[Sums, Sums]:
    """What `accumulate` gives of `pairs`; and, if `both` are wanted, of the same exchanged, without losses."""
    symmetric = pairs.symmetric
    pairs = pairs.surveyed(relate=False)
    left, right, sizes, scale, precision, weight, exclude_by, bias, exclude, rows, columns, peak = pairs
    slices = blocks_of(len(left), len(right), left.element_size(), symmetric)
    blocks = [(i, j) for i, j in itertools.product(*slices) if not symmetric or i.start <= j.start]
    height, width = (side[0].stop for side in slices)
    cells, unscaled = height * width // CELL.value**2, derive and weight == "sigmoid"

    def new(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return left.new_empty(shape, dtype=dtype) if wanted else None

    def grid(meta: dict) -> tuple[int]:
        return (height // meta["BM"] * (width // (2 * meta["BN"])),)

    of_rows = new(derive, *left.shape)
    of_columns = of_rows if symmetric else new(derive and both, *right.shape)
    w = new(derive, height, width, dtype=left.dtype)
    in_cells = new(unscaled, cells), new(loss, cells)
    in_blocks = [new(x is not None, len(blocks), dtype=torch.float64) for x in in_cells]
    if unscaled:
        peak = largest_sigmoid(pairs)
    for index, (i, j) in enumerate(blocks):
        weigh[grid](
            left, right, scale, bias, exclude, *(rows or (None, None)), *(columns or (None, None)), peak, aligned, kept,
            *((None, None) if kept is None else kept.stride()), w, *in_cells, *sizes, left.shape[1], i.start, j.start,
            height, width, WEIGHT=weight, EXCLUDE=exclude_by, PRECISION=input_precision(precision), **OPTIONS,
        )  # fmt: skip
        for of_cells, of_blocks in zip(in_cells, in_blocks, strict=True):
            if of_cells is not None:
                torch.sum(of_cells, 0, dtype=torch.float64, out=of_blocks[index])
        if derive:
            x, y = left[i], right[j]
            part = w[: len(x), : len(y)]
            add_product(of_rows[i], part, y, first=j.start == 0)
            if of_columns is not None and not (symmetric and i == j):
                add_product(of_columns[j], part.T, x, first=i.start == 0)
    sums = (Sums(weight, None if g is None else g[None], peak, None, *in_blocks) for g in (of_rows, of_columns))
    return tuple(sums)
