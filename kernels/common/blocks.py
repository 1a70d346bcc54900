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

Numerics: as in weights.py. A sigmoid's weights are relative to one bound of all S, not to each row's maximum. Products
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
    products,
    softplus,
)
from fastssl.kernels.common.weights import Factors, Sums, exponentials, load_factors, power_of_two, sigmoids

WORKSPACE = 1 << 28  # bytes for the weights of a block
SIDE = 256  # the sides of a block are multiples of this, the largest side of a tile
DIAGONAL = 2048  # rows of a symmetric block, at least: smaller ones would save operations, and fill no GPU


def weigh_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    if not suits_units(c, named):
        return None
    return c["stages"] * (c["BM"] + c["BN"]) * c["BK"] * size


@autotune(
    weigh_needs,
    ["D", "WEIGHT", "PRECISION"],
    configs(
        ({"BM": 128, "BN": 256, "BK": 64}, 8, 3),
        ({"BM": 128, "BN": 256, "BK": 32}, 8, 3),
        ({"BM": 128, "BN": 128, "BK": 64}, 8, 3),
        ({"BM": 128, "BN": 128, "BK": 32}, 8, 3),
        ({"BM": 64, "BN": 64, "BK": 16}, 8, 2),
    ),
)
@triton.jit(do_not_specialize=COUNTS)
def weigh(
    left, right, scale, bias, exclude, row_shift, row_factor, column_shift, column_factor, peak, aligned, kept,
    step_i, step_j, w, totals, losses, M, N, D, first_row, first_column, height, width, start,
    WEIGHT: tl.constexpr, EXCLUDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W (height, width) of a block of S, zero past S's last row and column; the sums of sigmoids and of losses of each
    program, from `start` on. `kept`, if there, are all products."""
    pid = tl.program_id(0)
    row_blocks, column_blocks = height // BM, width // BN
    block, column_block = tl.swizzle2d(pid // column_blocks, pid % column_blocks, row_blocks, column_blocks, 8)
    row, column = first_row + block * BM, first_column + column_block * BN
    i, j = row + tl.arange(0, BM), column + tl.arange(0, BN)
    excluded = i
    if EXCLUDE == "row":
        excluded = load_excluded(exclude, i, M, N)
    if kept is not None:
        inside = (i[:, None] < M) & (j[None, :] < N)
        product = tl.load(kept_tile(kept, row, column, step_i, step_j, BM, BN), mask=inside, other=0.0)
    else:
        product = products(left, right, row, column, D, BM, BN, BK, PRECISION, M, N)
    offset = load_scale(bias) if bias is not None else None
    x = exponents(product, load_scale(scale), offset, excluded, exclude, aligned, row, column, M, N, EXCLUDE, BM, BN)
    if row + BM > M:
        x = tl.where(i[:, None] < M, x, float("-inf"))
    if losses is not None:
        tl.store(losses + start + pid, tl.sum(tl.sum(softplus(x), 1), 0))
    if w is not None:
        if WEIGHT == "sigmoid":
            shift = tl.load(row_shift)
            weights = sigmoids(x, shift)
            tl.store(totals + start + pid, tl.sum(tl.sum(weights, 1), 0) * tl.exp(shift))
            weights *= PEAK
        elif WEIGHT == "softmax":
            weights = PEAK * tl.exp(x - tl.load(row_shift + i, mask=i < M, other=0.0)[:, None])
        else:
            to_peak = PEAK / power_of_two(tl.load(peak))
            shift_i, factor_i = 0.0, 0.0
            if WEIGHT == "both":
                shift_i, factor_i = load_factors(row_shift, row_factor, to_peak, i, M)
            weights = exponentials(x, shift_i, factor_i, column_shift, column_factor, to_peak, j, N, WEIGHT)
        to = w + (block * BM).to(tl.int64) * width + column_block * BN
        to += tl.arange(0, BM)[:, None] * width + tl.arange(0, BN)[None, :]
        tl.store(to, weights.to(w.dtype.element_ty))


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


def sigmoid_shift(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, precision: str) -> Tensor:
    """What float16's sigmoids are relative to: the largest that S can be, or 0."""
    if precision != "float16":
        return scale.new_zeros((), dtype=torch.float32)
    lengths = (torch.linalg.vector_norm(z, dim=1, dtype=torch.float32).amax() for z in (left, right))
    bound = next(lengths) * next(lengths) * scale.abs() + bias
    return bound.float().nan_to_num(0.0).clamp(max=0)


def accumulate_blocks(
    left: Tensor,
    right: Tensor,
    sizes: tuple[int, int],
    scale: Tensor,
    precision: str,
    weight: str,
    exclude_by: str | None,
    *,
    bias: Tensor | None,
    exclude: Tensor | None,
    rows: Factors | None,
    columns: Factors | None,
    peak: Tensor | None,
    maxima: tuple[Tensor, Tensor] | None,
    aligned: Tensor | None,
    derive: bool,
    loss: bool,
    kept: Tensor | None,
    both: bool,
) -> tuple[Sums, Sums | None]:
    """What `accumulate` gives, and what it gives with x and y exchanged if `both` are wanted; see there."""
    symmetric = left is right and exclude_by in ("diagonal", "partner")
    slices = blocks_of(*(len(z) for z in (left, right)), left.element_size(), symmetric)
    blocks = [(i, j) for i, j in itertools.product(*slices) if not symmetric or i.start <= j.start]
    height, width = (of_side[0].stop for of_side in slices)

    def sums(side: Tensor) -> Tensor:
        return side.new_empty(side.shape, dtype=torch.float32)

    of_rows = sums(left) if derive else None
    of_columns = of_rows if symmetric else sums(right) if derive and both else None
    w = left.new_empty(height, width) if derive else None
    sigmoid = weight == "sigmoid"
    shift = sigmoid_shift(left, right, scale, bias, precision) if sigmoid and derive else None
    row_shift, row_factor = rows or (maxima[1] if weight == "softmax" else shift, None)
    programs = 0
    most = len(blocks) * height * width // 64**2
    totals, losses = (of_rows)
