"""Tiles of similarities S = scale x y^T + bias, and their exponents.

EXCLUDE says which columns j row i leaves out:

    None      none
    row       exclude[i]
    column    those with exclude[j] = i: `row` after x and y have been exchanged
    diagonal  i
    partner   i, and (i + N / 2) mod N, NT-Xent's positive, whose S is stored and whose weight the caller adds

A tile costs 2 D operations for each of its entries, for the product, and one exponential.

Sums, maxima and exponentials are float32. Exponents are in natural units, so that the shift that one kernel stores
equals, to the last bit, an entry of the tile that the next kernel computes again: their difference is 0 at any scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize's
# Arguments on whose values Triton must not specialise: a new batch size must not compile kernels again.
COUNTS = ["B", "M", "N", "row_blocks", "blocks", "start", "band", "distances", "splits"]


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
def products_of_two(left, right, row, column, other, D, T: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Those of T rows with T columns from `column` on, and with T columns from `other` on."""
    k = tl.arange(0, BK)[None, :]
    left = at(left, row, D, T) + k
    near, far = at(right, column, D, T) + k, at(right, other, D, T) + k
    of_near = tl.zeros((T, T), tl.float32)
    of_far = tl.zeros((T, T), tl.float32)
    for _ in range(0, D, BK):
        x = tl.load(left)
        of_near = tl.dot(x, tl.trans(tl.load(near)), of_near, input_precision=PRECISION)
        of_far = tl.dot(x, tl.trans(tl.load(far)), of_far, input_precision=PRECISION)
        left += BK
        near += BK
        far += BK
    return of_near, of_far


@triton.jit
def kept_tile(products, row, column, step_i, step_j, BM: tl.constexpr, BN: tl.constexpr):
    """Pointers to a tile of products that are kept, one of (step_i, step_j) apart."""
    corner = products + tl.cast(row, tl.int64) * step_i + tl.cast(column, tl.int64) * step_j
    return corner + (tl.arange(0, BM)[:, None] * step_i + tl.arange(0, BN)[None, :] * step_j)


@triton.jit
def load_scale(scale):
    return tl.load(scale).to(tl.float32)


@triton.jit
def load_excluded(exclude, i, count, others):
    """exclude[i] as int32; -1 where it is not in [0, others), or where i >= count."""
    other = tl.load(exclude + i, mask=i < count, other=-1)
    return tl.where((other >= 0) & (other < others), other, -1).to(tl.int32)


@triton.jit
def finite(top):
    """A maximum to subtract: 0 in place of minus infinity, where nothing was seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softplus(x):
    """log(1 + exp(x)): log(1 + t) = 2 artanh(t / (2 + t)), whose odd minimax polynomial is exact to 5e-9."""
    t = tl.exp(-tl.abs(x))
    s = t / (2 + t)
    q = s * s
    series = tl.fma(q, 0.14012230, 0.13999570)
    series = tl.fma(series, q, 0.20010850)
    series = tl.fma(series, q, 0.33333207)
    return tl.maximum(x, 0.0) + 2 * (s * (series * q) + s)


@triton.jit
def exponents(
    product, scale, bias, excluded, exclude, aligned, row, column, M, N,
    EXCLUDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of S, minus infinity where a column is left out. The S of partners is stored in `aligned`."""
    i = row + tl.arange(0, BM)
    j = column + tl.arange(0, BN)
    x = product * scale
    if bias is not None:
        x += bias
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
def span(split, splits, N):
    """The columns [start, stop) of a split, in units of 128, at least one unit."""
    units = tl.cdiv(N, 128)
    return units * split // splits * 128, units * (split + 1) // splits * 128
