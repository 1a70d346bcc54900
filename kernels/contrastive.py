"""Softmax contrastive losses on the GPU.

All are log-sum-exps of similarities S = scale x y^T, and the products W y, W^T x of their gradients:

    similarity_logsumexp   of the rows of S                                   forward 2 U (with E y), backward dy: 2 U
    pair_logsumexp         of the rows and the columns of S (CLIP)            forward 1 U, backward 4 U
    self_logsumexp         of the rows of scale z z^T, no diagonal (SupCon)   forward 1/2 U, backward 2 U
    nt_xent                the same, minus the positive, of normalised rows   forward 1/2 U, backward 2 U

in units U = 2 M N D floating-point operations (M = N for the last two), with E_ij = exp(S_ij - shift_i). fastssl/ops/
contrastive.py has the formulas of the first three. NT-Xent: with z the N = 2B (normalised) rows of [z1; z2], S = scale
z z^T, pos(i) = (i + B) mod N:

    lse_i  = log sum_{j != i} exp(S_ij) = shift_i + log(total_i)
    loss_i = lse_i - S_{i, pos(i)}

and, given g_i = dL/dloss_i, with p_ij = exp(S_ij - lse_i):

    W_ij     = g_i p_ij + g_j p_ji - [j = pos(i)] (g_i + g_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G = W z,      dL/dscale = 1/2 sum_i <z_i, G_i>
    dL/dx_i  = (dL/dz_i - <dL/dz_i, z_i> z_i) / |x_i|    where rows were normalised, z = x / |x|

Algorithm
  1. Sums. Cut S into T x T tiles and let tile (b, d) be rows of block b against columns of block b + d, modulo the
     number of column blocks. One program takes one tile and leaves the maximum and the sum of exponentials of its rows
     and, where they are wanted, of its columns. A row in block b finds what it needs from column block c in slot
     (c - b) mod blocks, where nobody else writes; a column likewise. `_merge` reduces the slots. Distances d are taken
     in bands, so the slots need O(M + N) memory. Columns are wanted by CLIP, whose shorter side is made the rows; and
     by a symmetric S, where they stand for rows: the distances d = 0 ... blocks // 2 then see every pair once.
  2. Products: `accumulate` in _tiles.py, which recomputes S. One-sided losses need no S at all in the backward pass of
     x: their forward pass is `accumulate` too, with a running maximum.
  3. NT-Xent's `_project` adds the splits and the positives, and applies scale and the derivative of the normalisation;
     the others have `collect`.

Two outputs per tile would make the backward pass of NT-Xent 1.5 U and CLIP's 3 U, but would need atomics.

Memory: beside that of _tiles.py at most 512 bytes per row and per column for the slots.

Numerics: see _tiles.py. A row's maximum is taken before its exponentials, so any scale and any row lengths are safe.
Norms and row products are float64, which costs O(N D). The positive's entry in NT-Xent's W, g_i (p - 1), is where a
confident model's gradient cancels: it is left out of the rounded W, and `_project` adds it in float32, from the same S
that the sums contain. NaN spreads to the totals whose S it reaches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._tiles import (
    COUNTS,
    EPS,
    LN2,
    OPTIONS,
    PEAK,
    Factors,
    accumulate,
    autotune,
    collect_sums,
    configs,
    exponents,
    finite,
    input_precision,
    largest,
    load_excluded,
    load_factors,
    load_rows,
    load_scale,
    natural,
    pad,
    pad_views,
    power_of_two,
    products,
    row_block,
    suits_units,
    unit,
)

_BAND = 64  # distances per forward launch


def _forward_needs(c: dict[str, int], named: dict[str, Any], size: int, capability: int) -> int | None:
    if not suits_units(c, named) or 16 * c["warps"] != named["T"]:
        return None
    return c["stages"] * 2 * named["T"] * c["BK"] * size


@triton.jit
def _maximum_and_sum(x, AXIS: tl.constexpr):
    """max x and sum 2^(x - max x) along an axis; (-inf, 0) where all is masked."""
    top = tl.max(x, AXIS)
    return top, tl.sum(tl.exp2(x - tl.expand_dims(finite(top), AXIS)), AXIS)


@autotune(
    _forward_needs,
    ["D", "T", "PRECISION"],
    configs(
        ({"BK": 64}, 8, 3),
        ({"BK": 32}, 8, 3),
        ({"BK": 64}, 4, 3),
        ({"BK": 32}, 4, 3),
        ({"BK": 16}, 4, 3),
    ),
)
@triton.jit(do_not_specialize=COUNTS)
def _forward_tile(
    left, right, scale, exclude, row_tops, row_sums, column_tops, column_sums, aligned, M, N, D, blocks, start, band,
    EXCLUDE: tl.constexpr, SYMMETRIC: tl.constexpr, T: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of tile (block, distance), distance = start ... start + band - 1, for its rows and columns."""
    pid = tl.program_id(0)
    block = pid // band
    slot = pid % band
    distance = start + slot
    row = block * T
    column = ((block + distance) % blocks) * T
    i = row + tl.arange(0, T)
    j = column + tl.arange(0, T)
    excluded = i
    if EXCLUDE == "row":
        excluded = load_excluded(exclude, i, M, N)
    x = exponents(
        products(left, right, row, column, D, T, T, BK, PRECISION), load_scale(scale), None, excluded, exclude, None,
        row, column, M, N, "diagonal" if EXCLUDE == "partner" else EXCLUDE, T, T,
    )  # fmt: skip
    if row + T > M:
        x = tl.where(i[:, None] < M, x, float("-inf"))
    # No other program sees the transpose of this tile; where S is not symmetric that always holds.
    once = (not SYMMETRIC) | ((distance > 0) & (2 * distance < blocks))
    if EXCLUDE == "partner":
        half = N // 2
        if tl.abs(tl.abs(row - column) - half) < T:
            partner = tl.where(i < half, i + half, i - half)
            found = tl.sum(tl.where(partner[:, None] == j[None, :], x, 0.0), 1)
            tl.store(aligned + i, found, mask=(partner >= column) & (partner < column + T) & (i < N))
            if once:
                partner = tl.where(j < half, j + half, j - half)
                found = tl.sum(tl.where(partner[None, :] == i[:, None], x, 0.0), 0)
                tl.store(aligned + j, found, mask=(partner >= row) & (partner < row + T) & (j < N))
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


@triton.jit(do_not_specialize=COUNTS)
def _merge(
    tops, sums, aligned, loss, shift, total, N, row_blocks, blocks, start, band, last,
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
        # A tile at distance 0, or half way round, has left nothing for its columns: they are rows of another tile.
        written = (slot < band) | ((slot < 2 * band) & (distance > 0) & (2 * distance < blocks))
        written = written[:, None] & inside[None, :]
    else:
        # Columns of block c have heard from row block c - d, if there is one; rows, for which row_blocks = blocks, from
        # every distance.
        block = (i // T + blocks)[None, :] - distance[:, None]
        written = (slot < band)[:, None] & (block % blocks < row_blocks) & inside[None, :]
    at = slot[:, None].to(tl.int64) * N + i[None, :]
    tops_ = tl.load(tops + at, mask=written, other=float("-inf"))
    sums_ = tl.load(sums + at, mask=written, other=0.0)
    highest = tl.maximum(top, tl.max(tops_, 0))
    base = finite(highest)
    acc = acc * tl.exp2(top - base) + tl.sum(sums_ * tl.exp2(tops_ - base[None, :]), 0)
    if last:
        if loss is not None:
            positive = tl.load(aligned + i, mask=inside, other=0.0)
            tl.store(loss + i, tl.log(acc) + (base - positive) * LN2, mask=inside)
        rounded, acc = natural(base, acc)
        tl.store(shift + i, tl.where(acc == acc, rounded, acc), mask=inside)
    else:
        tl.store(shift + i, highest, mask=inside)
    tl.store(total + i, acc, mask=inside)


@triton.jit
def _positive_weight(shift, coefficient, total, peak, aligned, i, inside, N):
    """g_i (p - 1) of the positive, scaled as W is."""
    shift2, scaled = load_factors(shift, coefficient, PEAK / power_of_two(tl.load(peak)), i, N)
    denominator = tl.load(total + i, mask=inside, other=1.0)
    x = tl.load(aligned + i, mask=inside, other=0.0)
    return scaled * (tl.exp2(x - shift2) - denominator)


@triton.jit
def _total_gradient(
    gradient, weight, partner, inverse_partner, rows, columns, z1, z2, B, D,
    row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """G for a tile of rows and columns: the splits' sum and the positive's term."""
    x = load_rows(z1, z2, partner, columns, B, 2 * B, D, row_stride1, column_stride1, row_stride2, column_stride2)
    acc = weight * unit(x, inverse_partner)
    for split in range(splits):
        at = (rows + split * padded_rows) * PADDED + columns
        acc += tl.load(gradient + at, mask=(rows < 2 * B) & (columns < D), other=0.0)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _project(
    z1, z2, inverse, scale, shift, coefficient, total, peak, aligned, gradient, dz1, dz2, dscale, B, D,
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
    weight = _positive_weight(shift, coefficient, total, peak, aligned, row, inside, 2 * B)
    weight += _positive_weight(shift, coefficient, total, peak, aligned, partner, inside, 2 * B)
    weight = weight[:, None]
    partner = tl.where(inside, partner, 2 * B)[:, None]
    shares = tl.zeros((BR, BD), tl.float64)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        x = load_rows(z1, z2, rows, columns, B, 2 * B, D, row_stride1, column_stride1, row_stride2, column_stride2)
        g = _total_gradient(
            gradient, weight, partner, factor_partner, rows, columns, z1, z2, B, D,
            row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits, BR, BD,
        )  # fmt: skip
        shares += unit(x, factor).to(tl.float64) * g
    along = tl.sum(shares, 1)
    unscale = power_of_two(tl.load(peak)) / PEAK
    tl.store(dscale + row, 0.5 * unscale * along, mask=inside)
    along = tl.where(factor < 1 / EPS, along[:, None], 0.0).to(tl.float32)  # a clamped norm is a constant
    output_scale = tl.load(scale) * unscale
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        g = _total_gradient(
            gradient, weight, partner, factor_partner, rows, columns, z1, z2, B, D,
            row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits, BR, BD,
        )  # fmt: skip
        if NORMALIZE:
            x = load_rows(z1, z2, rows, columns, B, 2 * B, D, row_stride1, column_stride1, row_stride2, column_stride2)
            g = unit(g - along * unit(x, factor), factor)
        out = (g * output_scale).to(dz1.dtype.element_ty)
        tl.store(dz1 + rows * D + columns, out, mask=(rows < B) & (columns < D))
        tl.store(dz2 + (rows - B) * D + columns, out, mask=(rows >= B) & inside[:, None] & (columns < D))


def _totals(
    left: Tensor,
    right: Tensor,
    sizes: tuple[int, int],
    scale: Tensor,
    precision: str,
    exclude_by: str | None,
    *,
    exclude: Tensor | None = None,
    columns: bool = False,
    loss: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """[(total, shift)] of the rows of S, then of its columns if wanted.

    Args:
        left: x, padded.
        right: y, padded.
        sizes: M and N, neither of them 0; with `columns`, M is at most N.
        scale: of S, 0-d.
        precision: of products.
        exclude_by: EXCLUDE in _tiles.py; "diagonal" and "partner" say that S is symmetric.
        exclude: the column that a row leaves out, or the row that a column does.
        columns: whether the columns' sums are wanted.
        loss: receives NT-Xent's losses.
    """
    symmetric = exclude_by in ("diagonal", "partner")
    rows, others = sizes
    tile = 64 if precision == "float32" or max(sizes) <= 2048 else 128
    row_blocks, blocks = triton.cdiv(rows, tile), triton.cdiv(others, tile)
    distances = blocks // 2 + 1 if symmetric else blocks
    limit = _BAND if symmetric or columns else _BAND * max(1, min(4, 16 // row_blocks))  # few rows fill no GPU
    band = triton.cdiv(distances, triton.cdiv(distances, limit))

    def new(*shape: int) -> Tensor:
        return left.new_empty(shape, dtype=torch.float32)

    # Of rows, then of columns: slots of maxima and of sums, from how many blocks, shift, total.
    slots = 2 * band if symmetric else band
    sides = [(new(slots, rows), new(slots, rows), blocks, new(rows), new(rows))]
    if columns:
        sides.append((new(slots, others), new(slots, others), row_blocks, new(others), new(others)))
    column_slots = sides[-1][:2] if symmetric or columns else (None, None)
    aligned = None if loss is None else torch.empty_like(loss)
    for start in range(0, distances, band):
        width = min(band, distances - start)
        _forward_tile[(row_blocks * width,)](
            left, right, scale, exclude, *sides[0][:2], *column_slots, aligned, *sizes, left.shape[1], blocks, start,
            width, EXCLUDE=exclude_by, SYMMETRIC=symmetric, T=tile, PRECISION=input_precision(precision), **OPTIONS,
        )  # fmt: skip
        for tops, sums, heard, shift, total in sides:
            count = shift.shape[0]
            _merge[(triton.cdiv(count, 16),)](
                tops, sums, aligned, loss, shift, total, count, heard, blocks, start, width, start + width == distances,
                SYMMETRIC=symmetric, T=tile, SLOTS=max(triton.next_power_of_2(slots), 8), BR=16, **OPTIONS,
            )  # fmt: skip
    return [(total, shift) for _, _, _, shift, total in sides]


def nt_xent(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, shift, total) of `fastssl::nt_xent` for CUDA tensors; see fastssl/ops/contrastive.py."""
    rows = 2 * z1.shape[0]
    loss = z1.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return loss, loss.clone(), loss.clone()
    with torch.cuda.device_of(z1):
        z, _ = pad_views(z1, z2, normalize, precision)
        [(total, shift)] = _totals(z, z, (rows, rows), scale, precision, "partner", loss=loss)
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
        z, inverse = pad_views(z1, z2, normalize, precision)
        total = total.contiguous()
        factors = Factors(shift.contiguous(), grad_loss / total)
        aligned, dscale, peak = torch.empty_like(total), torch.empty_like(inverse), largest(factors)
        G = accumulate(
            z, z, (2 * batch, 2 * batch), scale, precision, "both", "partner", rows=factors, columns=factors, peak=peak,
            aligned=aligned,
        ).gradient  # fmt: skip
        splits, padded_rows, padded = G.shape
        block = row_block(padded)
        _project[(triton.cdiv(2 * batch, block["BR"]),)](
            z1, z2, inverse, scale, *factors, total, peak, aligned, G, dz1, dz2, dscale, batch, dim,
            *z1.stride(), *z2.stride(), padded, padded_rows, splits, normalize, **block, **OPTIONS,
        )  # fmt: skip
        return dz1, dz2, dscale.sum().to(scale.dtype)


def similarity_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, shift, weighted) of `fastssl::similarity_logsumexp` for CUDA tensors; see fastssl/ops/contrastive.py."""
    (rows, dim), columns = x.shape, y.shape[0]
    if rows == 0 or columns == 0:
        return *(x.new_zeros(rows, dtype=torch.float32) for _ in range(2)), x.new_zeros(
            (rows if weigh else 0, dim), dtype=torch.float32
        )
    with torch.cuda.device_of(x):
        exclude, by = _excluding(exclude, "row")
        inputs = pad(x, precision), pad(y, precision), (rows, columns), scale, precision
        if weigh:
            weighted, shift, total, _ = collect_sums(
                accumulate(*inputs, "softmax", by, exclude=exclude), x, scale, torch.float32
            )
            return total, shift, weighted
        [(total, shift)] = _totals(*inputs, by, exclude=exclude)
        return total, shift, x.new_empty((0, dim), dtype=torch.float32)


def similarity_logsumexp_backward(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    shift: Tensor,
    weighted: Tensor,
    needs_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dscale) of `fastssl::similarity_logsumexp_backward` for CUDA tensors; see fastssl/ops/contrastive.py."""
    dx = ((grad_total * scale)[:, None] * weighted).to(x.dtype)
    along = (weighted * x).sum(1, dtype=torch.float64)
    dscale = (grad_total * along).sum().to(scale.dtype)
    rows, columns = x.shape[0], y.shape[0]
    if not needs_y or rows == 0 or columns == 0:
        return dx, y.new_zeros((columns if needs_y else 0, y.shape[1])), dscale
    with torch.cuda.device_of(x):
        exclude, by = _excluding(exclude, "column")
        factors = Factors(shift.contiguous(), grad_total.contiguous())
        G = accumulate(
            pad(y, precision), pad(x, precision), (columns, rows), scale, precision, "column", by, exclude=exclude,
            columns=factors, peak=largest(factors),
        )  # fmt: skip
        return dx, collect_sums(G, y, scale, y.dtype).gradient, dscale


def pair_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Totals and shifts of `fastssl::pair_logsumexp` for CUDA tensors; see fastssl/ops/contrastive.py."""
    rows, columns = x.shape[0], y.shape[0]
    if rows == 0 or columns == 0:
        return tuple(x.new_zeros(count, dtype=torch.float32) for count in (rows, rows, columns, columns))
    with torch.cuda.device_of(x):
        left, right = pad(x, precision), pad(y, precision)
        if rows <= columns:
            exclude, by = _excluding(exclude, "row")
            of_x, of_y = _totals(left, right, (rows, columns), scale, precision, by, exclude=exclude, columns=True)
        else:
            exclude, by = _excluding(exclude, "column")
            of_y, of_x = _totals(right, left, (columns, rows), scale, precision, by, exclude=exclude, columns=True)
        return *of_x, *of_y


def pair_logsumexp_backward(
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dy, dscale) of `fastssl::pair_logsumexp_backward` for CUDA tensors; see fastssl/ops/contrastive.py."""
    rows, columns = x.shape[0], y.shape[0]
    if rows == 0 or columns == 0:
        return x.new_zeros(x.shape), y.new_zeros(y.shape), scale.new_zeros(())
    with torch.cuda.device_of(x):
        left, right = pad(x, precision), pad(y, precision)
        of_x = Factors(row_shift.contiguous(), grad_row_total.contiguous())
        of_y = Factors(column_shift.contiguous(), grad_column_total.contiguous())
        peak = largest(of_x, of_y)
        exclude, by = _excluding(exclude, "row")
        G = accumulate(
            left, right, (rows, columns), scale, precision, "both", by, exclude=exclude,
            rows=of_x, columns=of_y, peak=peak,
        )  # fmt: skip
        dx = collect_sums(G, x, scale, x.dtype, share=True)
        exclude, by = _excluding(exclude, "column")
        G = accumulate(
            right, left, (columns, rows), scale, precision, "both", by, exclude=exclude,
            rows=of_y, columns=of_x, peak=peak,
        )  # fmt: skip
        return dx.gradient, collect_sums(G, y, scale, y.dtype).gradient, dx.share.sum().to(scale.dtype)


def self_logsumexp(z: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(total, shift) of `fastssl::self_logsumexp` for CUDA tensors; see fastssl/ops/contrastive.py."""
    rows = z.shape[0]
    if rows == 0:
        return tuple(z.new_zeros(0, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(z):
        padded = pad(z, precision)
        return _totals(padded, padded, (rows, rows), scale, precision, "diagonal")[0]


def self_logsumexp_backward(
    grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """(dz, dscale) of `fastssl::self_logsumexp_backward` for CUDA tensors; see fastssl/ops/contrastive.py."""
    rows = z.shape[0]
    if rows == 0:
        return z.new_zeros(z.shape), scale.new_zeros(())
    with torch.cuda.device_of(z):
        padded = pad(z, precision)
        factors = Factors(shift.contiguous(), grad_total.contiguous())
        G = accumulate(
            padded, padded, (rows, rows), scale, precision, "both", "diagonal", rows=factors, columns=factors,
            peak=largest(factors),
        )  # fmt: skip
        dz = collect_sums(G, z, scale, z.dtype, share=True)
        return dz.gradient, dz.share.sum().mul(0.5).to(scale.dtype)


def _excluding(exclude: Tensor | None, by: str) -> tuple[Tensor | None, str | None]:
    """`exclude` and EXCLUDE."""
    return (None, None) if exclude is None else (exclude.contiguous(), by)
