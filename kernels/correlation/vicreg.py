"""VICReg (arXiv:2105.04906) on the GPU, for two views or one: the parts that need no product, and its launchers.

    loss = lambda_param mean (z_a - z_b)^2
         + mu_param times the sum over views of mean_i max(0, 1 - sqrt(var_i + eps))
         + nu_param times the sum over views of sum_{i != j} C_ij^2 / D

where var_i are the variances of a view's columns and C is its D x D covariance matrix; `vicreg` halves mu_param, which
makes the second sum a mean. Sums over columns give the first two terms, in O(N D); __init__.py has the algorithm and
the cost of the third.
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
from fastssl.kernels.correlation.products import operands_of, power_of_two_above


@triton.jit(do_not_specialize=COUNTS)
def _vicreg_columns(
    sums, offset, slope, terms, view, slots, N, D, M, eps, pull,
    CROSS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """For a view: offset (D); the terms relu(1 - std), var and sum_n (z_a - z_b)^2, (3, D); and, for the gradient,
    slope = -pull [std < 1] / std (D)."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total, squares = moments(sums, view, slots, d, N, D, SLOTS)
    variance = squares / M
    std = tl.sqrt(variance + eps)
    tl.store(offset + d, (total / N).to(tl.float32), mask=d < D)
    tl.store(terms + d, tl.where(std >= 1, 0.0, 1 - std), mask=d < D)
    tl.store(terms + D + d, variance, mask=d < D)
    if CROSS is not None:
        tl.store(terms + 2 * D + d, sum_rows(sums, 4, slots, d, D, SLOTS), mask=d < D)
    tl.store(slope + d, tl.where(std >= 1, 0.0, -pull / std).to(tl.float32), mask=d < D)


def _vicreg_statistics(views: Sequence[Tensor], M: int, eps: float, pull: float, precision: str) -> Columns:
    """The terms are (V, 3): sums over columns of relu(1 - std), var and, with two views, (z_a - z_b)^2."""
    cross = None if len(views) == 1 else "difference"
    sums, (rows, dim) = column_sums(views, cross), views[0].shape
    offset, slope = (sums.new_empty((len(views), dim), dtype=torch.float32) for _ in range(2))
    terms = sums.new_zeros((len(views), 3, dim))
    width = BLOCK["BD"]
    for view in range(len(views)):
        _vicreg_columns[(triton.cdiv(dim, width),)](
            sums, offset[view], slope[view], terms[view], view, sums.shape[1], rows, dim, M, eps, pull,
            CROSS=cross, SLOTS=SLOTS, BD=width, **OPTIONS,
        )  # fmt: skip
    scale = 1 / power_of_two_above(terms[:, 1].amax(1).sqrt()) if precision == "float16" else None
    return Columns(offset, None, slope, terms.sum(2), scale)


def _vicreg(
    views: Sequence[Tensor],
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    """(loss, mean squared difference of two views, variance, covariance, *kept). `mu_param`: see `_vicreg_backward`."""
    rows, dim = views[0].shape
    M = rows - unbiased
    columns = _vicreg_statistics(views, M, eps, mu_param / (dim * M), precision)
    variance, invariance = columns.terms[:, 0].mean() / dim, columns.terms[0, 2] / (rows * dim)
    covariance, kept, products = torch.zeros_like(variance), None, None
    if nu_param:
        operands = operands_of(views, columns, precision)
        if dual:
            squares, kept = dual_forward(operands, columns.scale, rows, False, derive)
            squares = squares / M**2
        else:
            squares, gradients = primal_forward(operands, operands, columns.scale, M, derive, precision)
            if derive:
                weight = squares.new_full((len(views),), 4 * nu_param / (dim * M) / PEAK.value)
                weight = weight if columns.scale is None else weight / columns.scale**3
                products = Products(gradients[0], weight)
        covariance = squares.sum() / dim
    if derive and not dual:
        kept = derivatives(views, columns, products, M, 2 * lambda_param / (rows * dim), None, torch.float32)
    loss = lambda_param * invariance + mu_param * len(views) * variance + nu_param * covariance
    parts = (x.to(torch.float32) for x in (loss, invariance, variance, covariance))
    return *parts, *(kept or no_sums(views, dual, derive))


def _vicreg_backward(
    grad_loss: Tensor,
    views: Sequence[Tensor],
    kept: Sequence[Tensor],
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> list[Tensor]:
    """dL/dz of each view, where `mu_param` is the weight of each view's variance term."""
    if not dual:
        return [(grad_loss * gradient).to(z.dtype) for gradient, z in zip(kept, views, strict=True)]
    rows, dim = views[0].shape
    M = rows - unbiased
    columns = _vicreg_statistics(views, M, eps, mu_param / (dim * M), precision)
    products = None
    if nu_param:
        operands, weight = operands_of(views, columns, precision), 4 * nu_param / (dim * M**2)
        products = dual_products(operands, columns.scale, kept, False, weight, precision)
    apart = 2 * lambda_param / (rows * dim)
    return derivatives(views, columns, products, M, apart, grad_loss, views[0].dtype)


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, invariance, variance, covariance, kept_a, kept_b) of `fastssl::vicreg` for CUDA tensors; see
    fastssl/ops/correlation.py."""
    return _vicreg((z_a, z_b), lambda_param, mu_param / 2, nu_param, eps, unbiased, dual, derive, precision)


def vicreg_backward(
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    kept_a: Tensor,
    kept_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(grad_z_a, grad_z_b) of `fastssl::vicreg_backward` for CUDA tensors; see fastssl/ops/correlation.py."""
    options = lambda_param, mu_param / 2, nu_param, eps, unbiased, dual, precision
    return tuple(_vicreg_backward(grad_loss, (z_a, z_b), (kept_a, kept_b), *options))


def variance_covariance(
    z: Tensor, mu_param: float, nu_param: float, eps: float, unbiased: bool, dual: bool, derive: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, variance, covariance, kept) of `fastssl::variance_covariance` for CUDA tensors; see
    fastssl/ops/correlation.py."""
    loss, _, *rest = _vicreg((z,), 0.0, mu_param, nu_param, eps, unbiased, dual, derive, precision)
    return loss, *rest


def variance_covariance_backward(
    grad_loss: Tensor,
    z: Tensor,
    kept: Tensor,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    precision: str,
) -> Tensor:
    """grad_z of `fastssl::variance_covariance_backward` for CUDA tensors; see fastssl/ops/correlation.py."""
    return _vicreg_backward(grad_loss, (z,), (kept,), 0.0, mu_param, nu_param, eps, unbiased, dual, precision)[0]
