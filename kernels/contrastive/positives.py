"""Losses of rows that have one positive each: what remains for a row when the sums over its negatives are there.

With x and y the (normalised) rows, p_i = scale <x_i, y_i>, and n_i = shift_i + log(total_i) the log-sum-exp of row i's
negatives,

    loss_i = softplus(n_i - p_i),    slope_i = sigmoid(n_i - p_i).

The gradient of x_i is that of the negatives, scale G_i, which `accumulate` leaves in splits, and that of the positive,
scale w_i y_i with w_i minus the sum of the slopes, times their gradients, in which the pair takes part. `project` adds
them, and goes back through the normalisation:

    dL/dx_i = (g_i - <g_i, x_i> x_i) / |x_i|,    g_i = scale (G_i + w_i y_i).

A program takes a tile of rows and reads them twice. Cost: O(splits N D).

Numerics: norms and row products are float64. The positive, whose weight does not average out, takes no part in rounded
products: it is added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PEAK, row_block
from fastssl.kernels.common.rows import pad, pad_views, unit
from fastssl.kernels.common.tiles import COUNTS, EPS
from fastssl.kernels.common.weights import Sums, power_of_two

WARPS = 8  # of these kernels: with 4 they spill registers


@triton.jit
def load_inverse(inverse, row, inside, BR: tl.constexpr):
    """Inverse norms (BR, 1); 1 where rows are not normalised."""
    factor = tl.full((BR, 1), 1.0, tl.float64)
    if inverse is not None:
        factor = tl.load(inverse + row, mask=inside, other=1.0)[:, None]
    return factor


@triton.jit
def unit_rows(z, inverse, rows, columns, B, D, row_stride, column_stride):
    x = tl.load(z + rows * row_stride + columns * column_stride, mask=(rows < B) & (columns < D), other=0.0)
    return unit(x.to(tl.float32), inverse)


@triton.jit
def margin_and_slope(total, shift, positive):
    """n - p, NaN where p is infinite, and its sigmoid."""
    n = tl.log(total) + (shift - positive) + 0 * positive
    return n, tl.where(n < 0, tl.exp(n), 1.0) / (1 + tl.exp(-tl.abs(n)))


@triton.jit
def load_factors_of_positive(gradient, total, shift, positive, i, inside):
    """slope / total, the factor of a row's negatives, and its slope, both times its gradient."""
    acc = tl.load(total + i, mask=inside, other=1.0)
    _, slope = margin_and_slope(acc, tl.load(shift + i, mask=inside, other=0.0), positive)
    slope *= gradient
    return tl.where(acc == 0, 0.0, slope / acc), slope


@triton.jit(do_not_specialize=COUNTS)
def project(
    z1, z2, inverse1, inverse2, scale, gradient, peak, weight, extra, out, share, B, D,
    row_stride1, column_stride1, row_stride2, column_stride2, PADDED, padded_rows, splits,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of z1 from G, the positives z2 and `extra`; <x_i, their sum>, its share in that of scale."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    rows = row[:, None]
    inside = row < B
    factor = load_inverse(inverse1, row, inside, BR)
    factor_positive = load_inverse(inverse2, row, inside, BR)
    of_positive = tl.load(weight + row, mask=inside, other=0.0)[:, None]
    unscale = power_of_two(tl.load(peak)) / PEAK
    output_scale = tl.load(scale).to(tl.float32)
    along = factor
    if (inverse1 is not None) or (share is not None):
        alongs = tl.zeros((BR, BD), tl.float64)
        for start in range(0, D, BD):
            columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
            x = unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
            y = unit_rows(z2, factor_positive, rows, columns, B, D, row_stride2, column_stride2)
            g = tl.zeros((BR, BD), tl.float32)
            for split in range(splits):
                from_ = gradient + (rows + split * padded_rows) * PADDED + columns
                g += tl.load(from_, mask=inside[:, None] & (columns < D), other=0.0)
            g = g * unscale + of_positive * y
            if extra is not None:
                g += tl.load(extra + rows * D + columns, mask=inside[:, None] & (columns < D), other=0.0)
            alongs += x.to(tl.float64) * g
        along = tl.sum(alongs, 1)[:, None]
        if share is not None:
            tl.store(share + rows, along, mask=inside[:, None])
    along = tl.where(factor < 1 / EPS, along, 0.0).to(tl.float32)  # a clamped norm is a constant
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)[None, :].to(tl.int64)
        y = unit_rows(z2, factor_positive, rows, columns, B, D, row_stride2, column_stride2)
        g = tl.zeros((BR, BD), tl.float32)
        for split in range(splits):
            from_ = gradient + (rows + split * padded_rows) * PADDED + columns
            g += tl.load(from_, mask=inside[:, None] & (columns < D), other=0.0)
        g = g * unscale + of_positive * y
        if extra is not None:
            g += tl.load(extra + rows * D + columns, mask=inside[:, None] & (columns < D), other=0.0)
        if inverse1 is not None:
            x = unit_rows(z1, factor, rows, columns, B, D, row_stride1, column_stride1)
            g = unit(g - along * x, factor)
        g = (g * output_scale).to(out.dtype.element_ty)
        tl.store(out + rows * D + columns, g, mask=inside[:, None] & (columns < D))


def rows_of_products(z: Tensor, normalize: bool, precision: str) -> tuple[Tensor, Tensor | None]:
    """The padded (normalised) rows in the dtype of the products, and 1 / norm in float64 if they were normalised."""
    return pad_views(z, z[:0], True, precision) if normalize else (pad(z, precision), None)


def projected(
    z: Tensor,
    positives: Tensor,
    inverses: tuple[Tensor | None, Tensor | None],
    scale: Tensor,
    sums: Sums,
    weight: Tensor,
    share: Tensor | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """The gradient of z, in its dtype, from the sums over negatives and the weights of its positives, whose `inverses`
    are 1 / norm of both; its rows' shares in the gradient of scale go to `share`, float64. `extra`, float32 (N, D), is
    added to the sums."""
    out, extra = z.new_empty(z.shape), None if extra is None else extra.contiguous()
    (splits, padded_rows, padded), (rows, dim) = sums.gradient.shape, z.shape
    block = row_block(padded)
    project[(triton.cdiv(rows, block["BR"]),)](
        z, positives, *inverses, scale, sums.gradient, sums.peak, weight, extra, out, share, rows, dim,
        *z.stride(), *positives.stride(), padded, padded_rows, splits, **block, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return out
