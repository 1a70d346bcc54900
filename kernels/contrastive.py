"""Softmax contrastive losses on the GPU.

NT-Xent. With z the N = 2B (normalised) rows of [z1; z2], S = scale z z^T, pos(i) = (i + B) mod N:

    lse_i  = log sum_{j != i} exp(S_ij) = shift_i + log(total_i)
    loss_i = lse_i - S_{i, pos(i)}

and, given g_i = dL/dloss_i, with p_ij = exp(S_ij - lse_i):

    W_ij     = g_i p_ij + g_j p_ji - [j = pos(i)] (g_i + g_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G = W z,      dL/dscale = 1/2 sum_i <z_i, G_i>
    dL/dx_i  = (dL/dz_i - <dL/dz_i, z_i> z_i) / |x_i|    where rows were normalised, z = x / |x|

Neither S nor W is stored: their tiles live in registers.

Algorithm
  1. `_prepare` normalises and rounds the rows to the dtype of the products, once, into a copy whose rows and
     columns are padded with zeros, so that the loops below load whole tiles.
  2. Forward: S is symmetric. Cut it into T x T tiles and let tile (b, d) be rows of block b against columns of
     block b + d, modulo the number of blocks: the distances d = 0 ... blocks // 2 see every pair once. One program
     takes one tile and leaves the maximum and the sum of exponentials of its rows, and by symmetry those of its
     columns. A row in block b finds what it needs from block c in slot (c - b) mod blocks, where nobody else writes.
     `_merge` reduces the slots. Distances are taken in bands, so the slots need O(B) memory.
  3. Backward: a program owns a block of rows of G. It recomputes S tile by tile, turns it into W, and adds W z_j.
     G stays in registers while D <= 128; a wider one lies in memory, where the program alone reads and writes it.
     Where B is too small to fill the GPU the columns are split between programs, each with a G of its own.
  4. `_project` adds the splits and the positives, and applies scale and the derivative of the normalisation.

Cost, in units U = 2 N^2 D floating-point operations: forward 1/2 U; backward 1 U for S and 1 U for W z; 2.5 U in
all. Two outputs per tile would make it 2 U, but they would need atomics: here every word is written by one program,
and a kernel of one configuration gives the same bits every time. (Autotuning picks the configuration once per
process; another may differ in the last bits.)

Memory: N Dp elements of the products' dtype (Dp: D rounded up to 64); at most 1 KiB per row in the forward pass;
N Dp floats in the backward pass, up to 2^15 Dp where columns are split.

Numerics: sums, maxima and exponentials are float32, exponents in base 2. A row's maximum is taken before its
exponentials, so any scale and any row lengths are safe. Norms and row products are float64, which costs O(N D).
W is scaled by 2^13 / max |g|, so that float16 holds its small entries. The positive's entry, g_i (p - 1), is where
a confident model's gradient cancels: it is left out of the rounded W, and `_project` adds it in float32, from the
same S that the sums contain. NaN spreads to all losses, as it does in the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

_DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS = 128  # rows are padded to a multiple of it: the largest tile
_BAND = 64  # distances per forward launch
_PROGRAMS = 256  # row blocks times column splits of the backward pass, where the columns suffice

_EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize's
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_PEAK = tl.constexpr(8192.0)  # of W: far enough from float16's 65504 and from its 6e-5

_COUNTS = ["B", "N", "blocks", "start", "band", "splits"]  # a changing batch must not compile anew
# Contracting a product with a sum would round S differently in one kernel and in another, and a sum of products
# differently in the two lanes that share it.
_OPTIONS = {"enable_fp_fusion": False}


def _configs(*choices: tuple[dict[str, int], int, int]) -> list[triton.Config]:
    """Triton's configurations from (tile sizes, warps, stages)."""
    return [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in choices]


def _suited(
    needs: Callable[..., int | None],
    configs: Sequence[triton.Config],
    named: dict[str, Any],
    capability: int,
    shared: int,
) -> list[triton.Config]:
    """Those of `configs` that suit a device: `needs` gives the bytes of shared memory of their tiles, or None."""
    size = named["z"].element_size()
    suited = []
    for config in configs:
        choice = config.kwargs | {"warps": config.num_warps, "stages": config.num_stages}
        tiles = needs(choice, named, size, capability)
        if tiles is not None and tiles + 2048 <= shared:  # reductions across warps need the rest
            suited.append(config)
    return suited


def _autotune(needs: Callable[..., int | None], key: list[str], configs: list[triton.Config]) -> Callable:
    """triton.autotune over the `_suited` ones of `configs`."""

    def prune(configs: list[triton.Config], named: dict[str, Any], **meta: Any) -> list[triton.Config]:
        capability = driver.active.get_current_target().arch
        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
        return _suited(needs, configs, named | meta, capability, properties["max_shared_mem"])

    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": prune})


def _suits_units(c: dict[str, int], named: dict[str, Any]) -> bool:
    """IEEE float32 has no tensor cores: each thread holds a slice of both operands, which must be thin."""
    return (c["BK"] == 16) == (named["PRECISION"] == "ieee")


def _forward_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    if not _suits_units(c, named) or 16 * c["warps"] != named["T"]:
        return None
    return c["stages"] * 2 * named["T"] * c["BK"] * size


def _narrow_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    operands_in_registers = capability // 10 in (8, 12)  # mma.sync; Hopper's and Blackwell's read shared memory
    if operands_in_registers and c["BN"] * named["D"] > 64 * 64:
        return None
    return (c["BM"] + c["stages"] * c["BN"]) * named["D"] * size


def _wide_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    # Blackwell keeps products in tensor memory, and TF32 operands pass through registers on their way there: wide
    # chunks spill.
    tight = capability // 10 == 10 and named["PRECISION"] == "tf32" and size == 4 and (c["BM"], c["BK"]) != (128, 32)
    if tight or not _suits_units(c, named):
        return None
    return c["stages"] * (c["BM"] + c["BN"]) * c["BK"] * size


@triton.jit
def _load_rows(z1, z2, rows, columns, B, D, row_stride1, column_stride1, row_stride2, column_stride2):
    """Rows of [z1; z2] in float32, zero outside. `rows` (R, 1) and `columns` (1, C) are int64."""
    first = (rows < B) & (columns < D)
    second = (rows >= B) & (rows < 2 * B) & (columns < D)
    x1 = tl.load(z1 + rows * row_stride1 + columns * column_stride1, mask=first, other=0.0)
    x2 = tl.load(z2 + (rows - B) * row_stride2 + columns * column_stride2, mask=second, other=0.0)
    return tl.where(rows < B, x1, x2).to(tl.float32)


@triton.jit
def _unit(x, inverse):
    """x over its norm, rounded once."""
    return (x.to(tl.float64) * inverse).to(tl.float32)


@triton.jit(do_not_specialize=_COUNTS)
def _prepare(
    z1, z2, z, inverse, B, D, row_stride1, column_stride1, row_stride2, column_stride2, PADDED,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the (normalised) rows, rounded to z's dtype and padded with zeros, and what they were multiplied by."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    squares = tl.zeros((BR, BD), tl.float64)
    if NORMALIZE:
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
            x = _load_rows(z1, z2, rows, columns, B, D, row_stride1, column_stride1, row_stride2, column_stride2)
            squares += x.to(tl.float64) * x
        factor = 1 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), _EPS)
    else:
        factor = tl.full((BR,), 1.0, tl.float64)
    tl.store(inverse + row, factor, mask=row < 2 * B)
    for start in range(0, PADDED, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = _load_rows(z1, z2, rows, columns, B, D, row_stride1, column_stride1, row_stride2, column_stride2)
        unit = _unit(x, factor[:, None]).to(z.dtype.element_ty)
        tl.store(z + rows * PADDED + columns, unit, mask=columns < PADDED)


@triton.jit
def _at(base, row, width, R: tl.constexpr):
    """Pointers (R, 1) to the first elements of R rows, `width` wide, from `row` on."""
    return base + tl.cast(row, tl.int64) * width + tl.arange(0, R)[:, None] * width


@triton.jit
def _products(z, row, column, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """<z_i, z_j> for BM rows from `row` on and BN columns from `column` on."""
    k = tl.arange(0, BK)
    left = _at(z, row, D, BM) + k[None, :]
    right = _at(z, column, D, BN) + k[None, :]
    product = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, D, BK):
        product = tl.dot(tl.load(left), tl.trans(tl.load(right)), product, input_precision=PRECISION)
        left += BK
        right += BK
    return product


@triton.jit
def _maximum_and_sum(x, AXIS: tl.constexpr):
    """max x and sum 2^(x - max x) along an axis; (-inf, 0) where all is masked."""
    top = tl.max(x, AXIS)
    finite = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(tl.exp2(x - tl.expand_dims(finite, AXIS)), AXIS)


@_autotune(
    _forward_needs,
    ["D", "T", "PRECISION"],
    _configs(
        ({"BK": 64}, 8, 3),
        ({"BK": 32}, 8, 3),
        ({"BK": 64}, 4, 3),
        ({"BK": 32}, 4, 3),
        ({"BK": 16}, 4, 3),
        ({"BK": 16}, 4, 2),
    ),
)
@triton.jit(do_not_specialize=_COUNTS)
def _forward_tile(
    z, scale, tops, sums, aligned, B, D, blocks, start, band,
    T: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of tile (block, distance), distance = start ... start + band - 1, for its rows and columns."""
    pid = tl.program_id(0)
    N = 2 * B
    block = pid // band
    slot = pid % band
    distance = start + slot
    row = block * T
    column = ((block + distance) % blocks) * T
    i = row + tl.arange(0, T)
    j = column + tl.arange(0, T)
    # In units of log 2, so that 2^x is the exponential.
    x = _products(z, row, column, D, T, T, BK, PRECISION) * (tl.load(scale) * _LOG2E)
    once = (distance > 0) & (2 * distance < blocks)  # no other program sees this tile's transpose
    gap = tl.abs(row - column)
    if (gap == 0) | (tl.maximum(row, column) + T > N):
        x = tl.where((i[:, None] != j[None, :]) & (i[:, None] < N) & (j[None, :] < N), x, float("-inf"))
    if tl.abs(gap - B) < T:
        partner = tl.where(i < B, i + B, i - B)
        found = tl.sum(tl.where(partner[:, None] == j[None, :], x, 0.0), 1)
        tl.store(aligned + i, found, mask=(partner >= column) & (partner < column + T) & (i < N))
        if once:
            partner = tl.where(j < B, j + B, j - B)
            found = tl.sum(tl.where(partner[None, :] == i[:, None], x, 0.0), 0)
            tl.store(aligned + j, found, mask=(partner >= row) & (partner < row + T) & (j < N))
    top, total = _maximum_and_sum(x, 1)
    to = slot.to(tl.int64) * N + i
    tl.store(tops + to, top, mask=i < N)
    tl.store(sums + to, total, mask=i < N)
    if once:
        top, total = _maximum_and_sum(x, 0)
        to = (band + slot).to(tl.int64) * N + j
        tl.store(tops + to, top, mask=j < N)
        tl.store(sums + to, total, mask=j < N)


@triton.jit(do_not_specialize=_COUNTS)
def _merge(
    tops, sums, aligned, loss, shift, total, N, blocks, start, band, last, SLOTS: tl.constexpr, BR: tl.constexpr
):
    """Fold a band's maxima and sums into (shift, total), in units of log 2; after the last band, finish."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = i < N
    top = tl.full((BR,), float("-inf"), tl.float32)
    acc = tl.zeros((BR,), tl.float32)
    if start > 0:
        top = tl.load(shift + i, mask=inside, other=0.0)
        acc = tl.load(total + i, mask=inside, other=0.0)
    slot = tl.arange(0, SLOTS)
    distance = start + slot % band
    # A tile at distance 0, or half way round, has left nothing for its columns: they are rows of another tile.
    written = (slot < band) | ((slot < 2 * band) & (distance > 0) & (2 * distance < blocks))
    at = slot[:, None].to(tl.int64) * N + i[None, :]
    mask = written[:, None] & inside[None, :]
    tops_ = tl.load(tops + at, mask=mask, other=float("-inf"))
    sums_ = tl.load(sums + at, mask=mask, other=0.0)
    highest = tl.maximum(top, tl.max(tops_, 0))
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    acc = acc * tl.exp2(top - finite) + tl.sum(sums_ * tl.exp2(tops_ - finite[None, :]), 0)
    if last:
        positive = tl.load(aligned + i, mask=inside, other=0.0)
        tl.store(loss + i, tl.log(acc) + (finite - positive) * _LN2, mask=inside)
        natural = finite * _LN2
        tl.store(shift + i, natural, mask=inside)
        tl.store(total + i, acc * tl.exp2(finite - natural * _LOG2E), mask=inside)
    else:
        tl.store(shift + i, highest, mask=inside)
        tl.store(total + i, acc, mask=inside)


@triton.jit
def _load_softmax(grad_loss, shift, total, peak, i, N):
    """(shift in units of log 2, g / total scaled to `_PEAK`) of rows i; the factor is 0 outside."""
    inside = i < N
    top = tl.load(peak)
    factor = tl.where(top == 0, 0.0, _PEAK / top)
    g = tl.load(grad_loss + i, mask=inside, other=0.0)
    return (
        tl.load(shift + i, mask=inside, other=0.0) * _LOG2E,
        g * factor / tl.load(total + i, mask=inside, other=1.0),
    )


@triton.jit
def _weights(
    product, scale2, shift_i, a_i, grad_loss, shift, total, peak, aligned, row, column, B,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of W without the positives, from a tile of z z^T. The positives' S goes to `aligned`."""
    N = 2 * B
    i = row + tl.arange(0, BM)
    j = column + tl.arange(0, BN)
    x = product * scale2
    gap = tl.abs(row - column)
    T: tl.constexpr = max(BM, BN)
    if (gap < T) | (tl.abs(gap - B) < T) | (column + BN > N):
        distance = tl.abs(i[:, None] - j[None, :])
        found = tl.sum(tl.where((distance == B) & (j[None, :] < N), x, 0.0), 1)
        partner = tl.where(i < B, i + B, i - B)
        tl.store(aligned + i, found, mask=(partner >= column) & (partner < column + BN) & (i < N))
        x = tl.where((distance == 0) | (distance == B) | (j[None, :] >= N), float("-inf"), x)
    shift_j, a_j = _load_softmax(grad_loss, shift, total, peak, j, N)
    return a_i[:, None] * tl.exp2(x - shift_i[:, None]) + a_j[None, :] * tl.exp2(x - shift_j[None, :])


@triton.jit
def _span(split, splits, N):
    """Columns [start, stop) of a split, in whole multiples of 128, never none."""
    units = tl.cdiv(N, 128)
    return units * split // splits * 128, units * (split + 1) // splits * 128


@_autotune(
    _narrow_needs,
    ["D", "splits", "PRECISION"],  # a power of two that falls as B grows: a few sizes are tuned, not each
    _configs(
        ({"BM": 128, "BN": 64}, 8, 2),
        ({"BM": 128, "BN": 32}, 8, 2),
        ({"BM": 64, "BN": 32}, 4, 3),
    ),
)
@triton.jit(do_not_specialize=_COUNTS)
def _backward_narrow(
    z, scale, grad_loss, shift, total, peak, aligned, gradient, B, padded_rows, splits,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G = W z without the positives, for BM rows and one split of the columns; G in registers."""
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits * BM
    i = row + tl.arange(0, BM)
    scale2 = tl.load(scale) * _LOG2E
    shift_i, a_i = _load_softmax(grad_loss, shift, total, peak, i, 2 * B)
    d = tl.arange(0, D)
    z_i = tl.load(_at(z, row, D, BM) + d[None, :])
    acc = tl.zeros((BM, D), tl.float32)
    start, stop = _span(split, splits, 2 * B)
    for column in range(start, stop, BN):
        z_j = tl.load(_at(z, column, D, BN) + d[None, :])
        product = tl.dot(z_i, tl.trans(z_j), input_precision=PRECISION)
        w = _weights(product, scale2, shift_i, a_i, grad_loss, shift, total, peak, aligned, row, column, B, BM, BN)
        acc = tl.dot(w.to(z_j.dtype), z_j, acc, input_precision=PRECISION)
    tl.store(_at(gradient, split.to(tl.int64) * padded_rows + row, D, BM) + d[None, :], acc)


@_autotune(
    _wide_needs,
    ["D", "splits", "PRECISION"],
    _configs(
        ({"BM": 128, "BN": 64, "BK": 32}, 8, 3),
        ({"BM": 128, "BN": 64, "BK": 64}, 8, 2),
        ({"BM": 64, "BN": 128, "BK": 32}, 8, 3),
        ({"BM": 64, "BN": 64, "BK": 32}, 4, 3),
        ({"BM": 64, "BN": 64, "BK": 16}, 8, 2),
        ({"BM": 64, "BN": 32, "BK": 16}, 4, 2),
    ),
)
@triton.jit(do_not_specialize=_COUNTS)
def _backward_wide(
    z, scale, grad_loss, shift, total, peak, aligned, gradient, B, padded_rows, splits, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_backward_narrow`, for any D: G in memory, BK columns of it at a time."""
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits * BM
    i = row + tl.arange(0, BM)
    scale2 = tl.load(scale) * _LOG2E
    shift_i, a_i = _load_softmax(grad_loss, shift, total, peak, i, 2 * B)
    k = tl.arange(0, BK)
    start, stop = _span(split, splits, 2 * B)
    for column in range(start, stop, BN):
        product = _products(z, row, column, D, BM, BN, BK, PRECISION)
        w = _weights(product, scale2, shift_i, a_i, grad_loss, shift, total, peak, aligned, row, column, B, BM, BN)
        w = w.to(z.dtype.element_ty)
        tl.debug_barrier()  # what other threads of this program stored is seen by its loads
        right = _at(z, column, D, BN) + k[None, :]
        to = _at(gradient, split.to(tl.int64) * padded_rows + row, D, BM) + k[None, :]
        for _ in range(0, D, BK):
            acc = tl.load(to, mask=tl.full((1, BK), column, tl.int32) > start, other=0.0)
            tl.store(to, tl.dot(w, tl.load(right), acc, input_precision=PRECISION))
            right += BK
            to += BK


@triton.jit
def _positive_weight(grad_loss, shift, total, peak, aligned, i, inside):
    """g_i (p - 1) of the positive, scaled as W is."""
    top = tl.load(peak)
    g = tl.load(grad_loss + i, mask=inside, other=0.0) * tl.where(top == 0, 0.0, _PEAK / top)
    denominator = tl.load(total + i, mask=inside, other=1.0)
    x = tl.load(aligned + i, mask=inside, other=0.0)
    shift2 = tl.load(shift + i, mask=inside, other=0.0) * _LOG2E
    return g * ((tl.exp2(x - shift2) - denominator) / denominator)


@triton.jit
def _total_gradient(
    gradient, weight, partner, inverse_partner, rows, columns, z1, z2, B, D,
    row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """G for a tile of rows and columns: the splits' sum and the positive's term."""
    x = _load_rows(z1, z2, partner, columns, B, D, row_stride1, column_stride1, row_stride2, column_stride2)
    acc = weight * _unit(x, inverse_partner)
    for split in range(splits):
        at = (rows + split * padded_rows) * PADDED + columns
        acc += tl.load(gradient + at, mask=(rows < 2 * B) & (columns < D), other=0.0)
    return acc


@triton.jit(do_not_specialize=_COUNTS)
def _project(
    z1, z2, inverse, scale, grad_loss, shift, total, peak, aligned, gradient, dz1, dz2, dscale, B, D,
    row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    NORMALIZE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dz1 and dz2 from G, and each row's share of dscale."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < 2 * B
    partner = tl.where(row < B, row + B, row - B)
    factor = tl.load(inverse + row, mask=inside, other=1.0)[:, None]
    factor_partner = tl.load(inverse + partner, mask=inside, other=1.0)[:, None]
    weight = _positive_weight(grad_loss, shift, total, peak, aligned, row, inside)
    weight += _positive_weight(grad_loss, shift, total, peak, aligned, partner, inside)
    weight = weight[:, None]
    partner = tl.where(inside, partner, 2 * B)[:, None]
    shares = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = _load_rows(z1, z2, rows, columns, B, D, row_stride1, column_stride1, row_stride2, column_stride2)
        g = _total_gradient(
            gradient, weight, partner, factor_partner, rows, columns, z1, z2, B, D,
            row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits, BR, BD,
        )  # fmt: skip
        shares += _unit(x, factor).to(tl.float64) * g
    along = tl.sum(shares, 1)
    unscale = tl.load(peak) / _PEAK
    tl.store(dscale + row, 0.5 * unscale * along, mask=inside)
    along = tl.where(factor < 1 / _EPS, along[:, None], 0.0).to(tl.float32)  # a clamped norm is a constant
    output_scale = tl.load(scale) * unscale
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        g = _total_gradient(
            gradient, weight, partner, factor_partner, rows, columns, z1, z2, B, D,
            row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits, BR, BD,
        )  # fmt: skip
        if NORMALIZE:
            x = _load_rows(z1, z2, rows, columns, B, D, row_stride1, column_stride1, row_stride2, column_stride2)
            g = _unit(g - along * _unit(x, factor), factor)
        out = (g * output_scale).to(dz1.dtype.element_ty)
        tl.store(dz1 + rows * D + columns, out, mask=(rows < B) & (columns < D))
        tl.store(dz2 + (rows - B) * D + columns, out, mask=(rows >= B) & inside[:, None] & (columns < D))


def _pad(z1: Tensor, z2: Tensor, normalize: bool, precision: str) -> tuple[Tensor, Tensor]:
    """(z, inverse): the padded (normalised) rows of [z1; z2] in the dtype of the products, and 1 / norm in float64."""
    batch, dim = z1.shape
    padded = triton.cdiv(dim, 64) * 64
    z = z1.new_empty((triton.cdiv(2 * batch, _ROWS) * _ROWS, padded), dtype=_DTYPES[precision])
    inverse = z1.new_empty(2 * batch, dtype=torch.float64)
    block = _row_block(padded)
    _prepare[(z.shape[0] // block["BR"],)](
        z1, z2, z, inverse, batch, dim, *z1.stride(), *z2.stride(), padded, normalize, **block, **_OPTIONS
    )
    return z, inverse


def _row_block(padded: int) -> dict[str, int]:
    """Tile of the row kernels: 1024 elements, of as few rows as that takes."""
    width = min(triton.next_power_of_2(padded), 1024)
    return {"BR": 1024 // width, "BD": width}


def _input_precision(precision: str) -> str:
    """tl.dot's `input_precision`, which matters for float32 operands only."""
    return "ieee" if precision == "float32" else "tf32"


def nt_xent(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, shift, total) of `fastssl::nt_xent` for CUDA tensors; see fastssl/ops/contrastive.py."""
    batch, rows = z1.shape[0], 2 * z1.shape[0]
    loss, shift, total = (z1.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if batch == 0:
        return loss, shift, total
    with torch.cuda.device_of(z1):
        z, _ = _pad(z1, z2, normalize, precision)
        tile = 64 if precision == "float32" or rows <= 2048 else 128
        blocks = triton.cdiv(rows, tile)
        distances = blocks // 2 + 1
        band = triton.cdiv(distances, triton.cdiv(distances, _BAND))
        tops, sums = (z1.new_empty((2 * band, rows), dtype=torch.float32) for _ in range(2))
        aligned = torch.empty_like(loss)
        for start in range(0, distances, band):
            width = min(band, distances - start)
            _forward_tile[(blocks * width,)](
                z, scale, tops, sums, aligned, batch, z.shape[1], blocks, start, width,
                T=tile, PRECISION=_input_precision(precision), **_OPTIONS,
            )  # fmt: skip
            _merge[(triton.cdiv(rows, 16),)](
                tops, sums, aligned, loss, shift, total, rows, blocks, start, width, start + width == distances,
                SLOTS=max(triton.next_power_of_2(2 * band), 8), BR=16, **_OPTIONS,
            )  # fmt: skip
    return loss, shift, total


def nt_xent_backward(
    grad_loss: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz1, dz2, dscale) of `fastssl::nt_xent_backward` for CUDA tensors; see fastssl/ops/contrastive.py."""
    batch, dim = z1.shape
    dz1, dz2 = z1.new_empty(z1.shape), z2.new_empty(z2.shape)
    if batch == 0:
        return dz1, dz2, scale.new_zeros(())
    with torch.cuda.device_of(z1):
        z, inverse = _pad(z1, z2, normalize, precision)
        padded_rows, padded = z.shape
        units = padded_rows // _ROWS
        splits = 1 << (min(units, max(_PROGRAMS // units, 1)).bit_length() - 1)
        gradient = z1.new_empty((splits, padded_rows, padded), dtype=torch.float32)
        aligned, dscale = z1.new_empty(2 * batch, dtype=torch.float32), torch.empty_like(inverse)
        grad_loss, shift, total = grad_loss.contiguous(), shift.contiguous(), total.contiguous()
        softmax = grad_loss, shift, total, torch.linalg.vector_norm(grad_loss, float("inf")), aligned

        def grid(meta: dict) -> tuple[int]:
            return (triton.cdiv(2 * batch, meta["BM"]) * splits,)

        # Without tensor cores a whole row of z does not fit a thread's registers.
        narrow = padded <= 128 and precision != "float32"
        kernel = _backward_narrow if narrow else _backward_wide
        kernel[grid](
            z, scale, *softmax, gradient, batch, padded_rows, splits, padded,
            PRECISION=_input_precision(precision), **_OPTIONS,
        )  # fmt: skip
        block = _row_block(padded)
        _project[(triton.cdiv(2 * batch, block["BR"]),)](
            z1, z2, inverse, scale, *softmax, gradient, dz1, dz2, dscale, batch, dim, *z1.stride(), *z2.stride(),
            padded, padded_rows, splits, normalize, **block, **_OPTIONS,
        )  # fmt: skip
        return dz1, dz2, dscale.sum().to(scale.dtype)
