"""The primal algorithm, by the D x D matrix C = A^T B / N, or A^T A / M of each view:

    sum_{i != j} C_ij^2,    B W^T and A W,    W = C but W_ii = 0.

Algorithm. C is computed in panels of `PANEL` columns. `_weigh` sums a panel's squares and stores W, whose two products
are added to those of earlier panels. VICReg's C is symmetric: only the part of a panel on and below its diagonal block
is computed, and the squares below that block count twice.

Cost, in units U = 2 N D D floating-point operations: Barlow Twins 3 U, VICReg 1.5 U for each view (and half a panel's
width more); the losses alone 1 U and 0.5 U.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PEAK
from fastssl.kernels.correlation.columns import COUNTS, tile_at
from fastssl.kernels.correlation.products import TILE, matrix_product, rounded

PANEL = 2048  # columns of C at a time, for each of which the gradients' sums are read and written; a multiple of ROWS


@triton.jit(do_not_specialize=COUNTS)
def _weigh(
    products, scale, weights, squares, view_stride, stride, first_row, first_column, last_column, reciprocal,
    SYMMETRIC: tl.constexpr, TF32: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """From a tile of a panel of C: W, and the sum of its squares. `reciprocal` is 1 over the divisor of C.

    SYMMETRIC: the rows from `last_column` on also stand for their transposes.
    """
    pid, view = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = stride // T
    row, column = pid // blocks * T, pid % blocks * T
    rows, columns = tile_at(T, T, column // T, row)
    c = tl.load(products + view * view_stride + rows * stride + columns) * reciprocal
    c = tl.where(rows + first_row != columns + first_column, c, 0.0)
    if weights is not None:
        w = rounded(c * PEAK, weights.dtype.element_ty, TF32)
        tl.store(weights + view * view_stride + rows * stride + columns, w)
    if scale is not None:
        factor = tl.load(scale + view)
        c *= (1 / (factor * factor)).to(tl.float32)
    total = tl.sum(tl.sum(c * c, 1), 0)
    if SYMMETRIC:
        total = tl.where(row + first_row >= last_column, 2 * total, total)
    tl.store(squares + view * tl.num_programs(0) + pid, total)


def primal_forward(
    left: Tensor, right: Tensor, scale: Tensor | None, count: int, derive: bool, precision: str
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Sums of squares of C = left^T right / count off its diagonal, (V,), float64; and V products right W^T and left W.

    Where left is right, C is symmetric, and the two products are one.
    """
    symmetric = left is right
    (views, _, padded), squares, of_left, of_right = left.shape, [], None, None
    if derive:
        of_left = left.new_empty(left.shape, dtype=torch.float32)
        of_right = of_left if symmetric else torch.empty_like(of_left)
    for start in range(0, padded, PANEL):
        stop = min(start + PANEL, padded)
        first, below = (start, stop) if symmetric else (0, 0)
        x, y = left[:, :, first:], right[:, :, start:stop]
        products = matrix_product(x.mT, y)
        _, rows, width = products.shape
        weights = left.new_empty(products.shape) if derive else None
        squares.append(products.new_empty((views, (rows // TILE) * (width // TILE))))
        _weigh[(squares[-1].shape[1], views)](
            products, scale, weights, squares[-1], products.stride(0), width, first, start, stop, 1 / count,
            SYMMETRIC=symmetric, TF32=precision == "tf32", T=TILE, **OPTIONS,
        )  # fmt: skip
        if derive:
            matrix_product(x, weights, of_right[:, :, start:stop], add=symmetric and start > 0)
            if below < padded:
                matrix_product(y, weights[:, below - first :].mT, of_left[:, :, below:], add=start > 0)
    gradients = (of_left, of_right) if derive else None
    return torch.cat(squares, 1).sum(1, dtype=torch.float64), gradients
