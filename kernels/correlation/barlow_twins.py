"""Barlow Twins (arXiv:2103.03230) on the GPU: the parts of its loss that need no product, and its launchers.

    loss = invariance_param sum_i (C_ii - 1)^2 + lambda_param sum_{i != j} C_ij^2,    C = A^T B / N

for the standardised columns A and B of two views. Sums over columns give the diagonal of C, in O(N D); __init__.py has
the algorithm and the cost of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS, PEAK
from fastssl.kernels.correlation.columns import BLOCK, COUNTS, SLOTS, Columns, column_sums, moments, sum_rows
from fastssl.kernels.correlation.derivatives import Products, derivatives, no_sums
from fastssl.kernels.correlation.dual import dual_forward, dual_products
from fastssl.kernels.correlation.primal import primal_forward
from fastssl.kernels.correlation.products import operands_of

WARPS = 8  # of the kernel below: with 4 it spills registers


@triton.jit(do_not_specialize=COUNTS)
def _barlow_twins_columns(
    sums, offset, rstd, slope, terms, slots, N, D, M, eps, pull, SLOTS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """offset and rstd (2, D), terms (C_ii - 1)^2 (D), and, for the gradient, slope pull (C_ii - 1) (D)."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total_a, squares_a = moments(sums, 0, slots, d, N, D, SLOTS)
    total_b, squares_b = moments(sums, 1, slots, d, N, D, SLOTS)
    rstd_a = 1 / tl.sqrt(squares_a / M + eps)
    rstd_b = 1 / tl.sqrt(squares_b / M + eps)
    cross = sum_rows(sums, 4, slots, d, D, SLOTS) - total_a * total_b / N
    c = cross * rstd_a * rstd_b / N
    tl.store(offset + d, (total_a / N).to(tl.float32), mask=d < D)
    tl.store(offset + D + d, (total_b / N).to(tl.float32), mask=d < D)
    tl.store(rstd + d, rstd_a.to(tl.float32), mask=d < D)
    tl.store(rstd + D + d, rstd_b.to(tl.float32), mask=d < D)
    tl.store(terms + d, (c - 1) * (c - 1), mask=d < D)
    tl.store(slope + d, (pull * (c - 1)).to(tl.float32), mask=d < D)


def _barlow_twins_statistics(views: Sequence[Tensor], M: int, eps: float, pull: float) -> Columns:
    sums, (rows, dim) = column_sums(views, "product"), views[0].shape
    offset, rstd = (sums.new_empty((2, dim), dtype=torch.float32) for _ in range(2))
    slope, terms = offset.new_empty(dim), sums.new_empty(dim)
    width = BLOCK["BD"]
    _barlow_twins_columns[(triton.cdiv(dim, width),)](
        sums, offset, rstd, slope, terms, sums.shape[1], rows, dim, M, eps, pull,
        SLOTS=SLOTS, BD=width, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return Columns(offset, rstd, slope.expand(2, -1), terms.sum(), None)


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    invariance_param: float,
    lambda_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, invariance, redundancy, kept_a, kept_b) of `fastssl::barlow_twins` for CUDA tensors; see
    fastssl/ops/correlation.py."""
    views, rows = (z_a, z_b), z_a.shape[0]
    M = rows - unbiased
    columns = _barlow_twins_statistics(views, M, eps, 2 * invariance_param / rows)
    invariance, kept, products = columns.terms, None, None
    redundancy = torch.zeros_like(invariance)
    if lambda_param:
        operands = operands_of(views, columns, precision)
        if dual:
            squares, kept = dual_forward(operands, None, rows, True, derive)
            redundancy = squares[0] / rows**2
        else:
            squares, gradients = primal_forward(*operands.split(1), None, rows, derive, precision)
            redundancy = squares[0]
            if derive:
                weight = redundancy.new_full((2,), 2 * lambda_param / rows / PEAK.value)
                products = Products([gradient[0] for gradient in gradients], weight)
    if derive and not dual:
        kept = derivatives(views, columns, products, M, 0.0, None, torch.float32)
    loss = invariance_param * invariance + lambda_param * redundancy
    return *(x.to(torch.float32) for x in (loss, invariance, redundancy)), *(kept or no_sums(views, dual, derive))


def barlow_twins_backward(
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    kept_a: Tensor,
    kept_b: Tensor,
    invariance_param: float,
    lambda_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(grad_z_a, grad_z_b) of `fastssl::barlow_twins_backward` for CUDA tensors; see fastssl/ops/correlation.py."""
    if not dual:
        return (grad_loss * kept_a).to(z_a.dtype), (grad_loss * kept_b).to(z_b.dtype)
    views, rows = (z_a, z_b), z_a.shape[0]
    M = rows - unbiased
    columns = _barlow_twins_statistics(views, M, eps, 2 * invariance_param / rows)
    products = None
    if lambda_param:
        operands = operands_of(views, columns, precision)
        products = dual_products(operands, None, (kept_b, kept_a), True, 2 * lambda_param / rows**2, precision)
    return tuple(derivatives(views, columns, products, M, 0.0, grad_loss, z_a.dtype))
