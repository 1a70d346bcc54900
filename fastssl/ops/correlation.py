"""Barlow Twins (arXiv:2103.03230) and VICReg (arXiv:2105.04906): schemas, fake kernels, derivatives, portable code.

Of N rows of D features, with A and B the views' columns, centred and for Barlow Twins divided by their deviations,

    Barlow Twins   C = A^T B / N,   invariance = sum_i (C_ii - 1)^2,   redundancy = sum_{i != j} C_ij^2
                   loss = invariance_param invariance + lambda_param redundancy
    VICReg         cov = A^T A / (N - 1),   covariance = sum_{i != j} cov_ij^2 / D,   both of a view, added up
                   variance = mean_i relu(1 - std_i), the mean of the views'
                   invariance = mean (z_a - z_b)^2
                   loss = lambda_param invariance + mu_param variance + nu_param covariance

The sum over i != j is the expensive part. It is computed in one of two ways, each in memory O(N D) (U = 2 N D min(N,
D)):

    dual     sum_ij (A^T B)_ij^2 = <A A^T, B B^T>, of N x N matrices, less the sum over the diagonal. Its derivative
             by A is 2 (B B^T) A, less that of the diagonal. The forward pass keeps the N x N matrices, and the backward
             pass makes the gradients of them. 4 U for two views, 3 U for kernels that make half of what is symmetric.
    primal   Blocks of A^T B, each visited once: with W_ij = 2 C_ij / N off the diagonal, dA += B W^T and dB += A W.
             There is no normaliser, so the forward pass takes the gradients too (`derive`), and the backward pass
             multiplies them by the gradient of the loss. 3 U for Barlow Twins, 4 U for VICReg, which has two such
             matrices, 3 U for kernels that make half of what is symmetric.

Eager code computes 3 products of 2 N D^2, D / N times as much where N < D. dual is used where 4 N <= 3 D: nearer to N =
D the sum of all squares may consist almost entirely of the diagonal, and the difference of the two would lose its
digits, as it otherwise does only where few features vary.

The backward pass of the standardisation, with means over the rows (the last one over N - 1 rows where unbiased):

    dz = rstd (dA - mean(dA) - A mean(dA A))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights, widen


def center(z: Tensor) -> Tensor:
    """z minus the means of its columns, in the dtype of sums: exactly 0 where a column is constant."""
    shifted = widen(z)
    shifted = shifted - shifted[:1]
    return shifted - shifted.mean(0)


def divisor(rows: int, unbiased: bool) -> int:
    """What sums over rows are divided by. PyTorch 2.10 subtracts no bool from the symbol of a length."""
    return rows - int(unbiased)


def column_variance(centered: Tensor, unbiased: bool) -> Tensor:
    return centered.square().sum(0) / divisor(centered.shape[0], unbiased)


def off_diagonal_squares(product: Tensor) -> Tensor:
    """sum_{i != j} product_ij^2."""
    return (product * (1 - torch.eye(len(product), dtype=product.dtype, device=product.device))).square().sum()


def gram_squares(a: Tensor, b: Tensor) -> Tensor:
    """off_diagonal_squares of a^T b, by the dual way."""
    return (a @ a.T * (b @ b.T)).sum() - (a * b).sum(0).square().sum()


def _standardize(z: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    """The standardised columns, and the factor that made them so."""
    centered = center(z)
    rstd = (column_variance(centered, unbiased) + eps).rsqrt()
    return centered * rstd, rstd


def _standardize_backward(grad_a: Tensor, a: Tensor, rstd: Tensor, unbiased: bool) -> Tensor:
    projection = (grad_a * a).sum(0) / divisor(a.shape[0], unbiased)
    return (grad_a - grad_a.mean(0) - a * projection) * rstd


def _gram_sums(a: Tensor, b: Tensor, gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """gram_squares of the rounded a and b. NaN stays NaN."""
    diagonal = (a * b).sum(0).double().square().sum()
    all_squares = torch.dot(gram_a.double().flatten(), gram_b.double().flatten())
    return all_squares.where(all_squares.isinf(), all_squares - diagonal).clamp_min(0)


def _gram_gradient(a: Tensor, b: Tensor, gram_b: Tensor, precision: str) -> Tensor:
    """Half the derivative of gram_squares by a. Diagonals, which do not average out, go through no rounded product."""
    weight = round_weights(gram_b.clone().fill_diagonal_(0), precision)
    gradient = (weight @ round_operand(a, precision)).addcmul_(a, b.square().sum(1, keepdim=True))
    return gradient.addcmul_(b, (a * b).sum(0), value=-1)


def _kept(z: Tensor, dual: bool, derive: bool, make: Callable[..., Tensor]) -> Tensor:
    rows, columns = z.shape
    return make(z, (rows if derive else 0, rows if dual else columns), dtype=accumulate_dtype(z.dtype))


def _barlow_twins_fake(
    z_a: Tensor,
    z_b: Tensor,
    invariance_param: float,
    lambda_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    parts = [z_a.new_empty((), dtype=accumulate_dtype(z_a.dtype)) for _ in range(3)]
    return *parts, *(_kept(z, dual, derive, Tensor.new_empty) for z in (z_a, z_b))


def _barlow_twins_portable(
    z_a: Tensor,
    z_b: Tensor,
    invariance_param: float,
    lambda_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    (a, rstd_a), (b, rstd_b) = (_standardize(z, eps, unbiased) for z in (z_a, z_b))
    rows, dim = a.shape
    rounded_a, rounded_b = (round_operand(x, precision) for x in (a, b))
    diagonal = (a * b).mean(0)
    invariance = (diagonal - 1).square().sum(dtype=torch.float64)
    redundancy = torch.zeros_like(invariance)
    kept_a, kept_b = (_kept(z, dual, derive, Tensor.new_zeros) for z in (z_a, z_b))
    if dual and lambda_param:
        grams = [x @ x.T for x in (rounded_a, rounded_b)]
        redundancy = _gram_sums(rounded_a, rounded_b, *grams) / rows**2
        if derive:
            kept_a, kept_b = grams
    elif lambda_param:
        for block in row_blocks(dim, dim):
            C = rounded_a[:, block].T @ rounded_b / rows
            C[:, block].fill_diagonal_(0)
            redundancy += C.square().sum(dtype=torch.float64)
            if derive:
                weight = round_weights(C * (2 * lambda_param / rows), precision)
                kept_a[:, block] = rounded_b @ weight.T
                kept_b.addmm_(rounded_a[:, block], weight)
    if derive and not dual:
        pull = 2 * invariance_param / rows * (diagonal - 1)
        kept_a = _standardize_backward(kept_a + pull * b, a, rstd_a, unbiased)
        kept_b = _standardize_backward(kept_b + pull * a, b, rstd_b, unbiased)
    loss = invariance_param * invariance + lambda_param * redundancy
    return *(x.to(a.dtype) for x in (loss, invariance, redundancy)), kept_a, kept_b


def _barlow_twins_portable_backward(
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
    if not dual:
        return (grad_loss * kept_a).to(z_a.dtype), (grad_loss * kept_b).to(z_b.dtype)
    (a, rstd_a), (b, rstd_b) = (_standardize(z, eps, unbiased) for z in (z_a, z_b))
    rows = a.shape[0]
    pull = 2 * invariance_param / rows * ((a * b).mean(0) - 1)
    grad_a, grad_b = pull * b, pull * a
    if lambda_param:
        factor = 2 * lambda_param / rows**2
        grad_a.add_(_gram_gradient(a, b, kept_b, precision), alpha=factor)
        grad_b.add_(_gram_gradient(b, a, kept_a, precision), alpha=factor)
    grad_z_a = _standardize_backward(grad_a, a, rstd_a, unbiased)
    grad_z_b = _standardize_backward(grad_b, b, rstd_b, unbiased)
    return (grad_loss * grad_z_a).to(z_a.dtype), (grad_loss * grad_z_b).to(z_b.dtype)


def _barlow_twins_share(
    rows: slice,
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    invariance_param: float,
    lambda_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
) -> Tensor:
    (a, _), (b, _) = (_standardize(z, eps, unbiased) for z in (z_a, z_b))
    invariance = ((a * b).mean(0) - 1).square().sum()
    squares = gram_squares(a, b) if dual else off_diagonal_squares(a.T @ b)
    return grad_loss * (invariance_param * invariance + lambda_param / a.shape[0] ** 2 * squares)


barlow_twins = Op(
    "barlow_twins(Tensor z_a, Tensor z_b, float invariance_param, float lambda_param, float eps, bool unbiased,"
    " bool dual, bool derive, str precision)"
    " -> (Tensor loss, Tensor invariance, Tensor redundancy, Tensor kept_a, Tensor kept_b)",
    backward="(Tensor grad_loss, Tensor z_a, Tensor z_b, Tensor kept_a, Tensor kept_b,"
    " float invariance_param, float lambda_param, float eps, bool unbiased, bool dual, str precision)"
    " -> (Tensor grad_z_a, Tensor grad_z_b)",
    fake=_barlow_twins_fake,
    portable=(_barlow_twins_portable, _barlow_twins_portable_backward),
    share=_barlow_twins_share,
    triton="correlation",
)


def _variance_covariance_fake(
    z: Tensor,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    parts = [z.new_empty((), dtype=accumulate_dtype(z.dtype)) for _ in range(3)]
    return *parts, _kept(z, dual, derive, Tensor.new_empty)


def _variance_covariance_portable(
    z: Tensor,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    a = center(z)
    rows, dim = a.shape
    rounded = round_operand(a, precision)
    std = (column_variance(a, unbiased) + eps).sqrt()
    variance = F.relu(1 - std).mean(dtype=torch.float64)
    covariance = torch.zeros_like(variance)
    kept = _kept(z, dual, derive, Tensor.new_zeros)
    if dual and nu_param:
        gram = rounded @ rounded.T
        covariance = _gram_sums(rounded, rounded, gram, gram) / (dim * divisor(rows, unbiased) ** 2)
        if derive:
            kept = gram
    elif nu_param:
        for block in row_blocks(dim, dim):
            C = rounded[:, block].T @ rounded / divisor(rows, unbiased)
            C[:, block].fill_diagonal_(0)
            covariance += C.square().sum(dtype=torch.float64) / dim
            if derive:
                weight = round_weights(C * (4 * nu_param / (dim * divisor(rows, unbiased))), precision)
                kept[:, block] = rounded @ weight.T
    if derive and not dual:
        kept = _add_hinge(kept - kept.mean(0), a, std, mu_param, unbiased)
    loss = mu_param * variance + nu_param * covariance
    return *(x.to(a.dtype) for x in (loss, variance, covariance)), kept


def _add_hinge(grad_z: Tensor, centered: Tensor, std: Tensor, mu_param: float, unbiased: bool) -> Tensor:
    """grad_z and the derivative of mu_param mean_i relu(1 - std_i)."""
    rows, dim = centered.shape
    slope = torch.where(std >= 1, 0, -mu_param / (dim * divisor(rows, unbiased)) / std)
    return grad_z + slope * centered


def _variance_covariance_portable_backward(
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
    grad_z = kept
    if dual:
        a = center(z)
        rows, dim = a.shape
        grad_z = torch.zeros_like(a)
        if nu_param:
            grad_z = _gram_gradient(a, a, kept, precision).mul_(4 * nu_param / (dim * divisor(rows, unbiased) ** 2))
        std = (column_variance(a, unbiased) + eps).sqrt()
        grad_z = _add_hinge(grad_z - grad_z.mean(0), a, std, mu_param, unbiased)
    return (grad_loss * grad_z).to(z.dtype)


def _variance_covariance_formula(
    z: Tensor, mu_param: float, nu_param: float, eps: float, unbiased: bool, dual: bool
) -> Tensor:
    a = center(z)
    rows, dim = a.shape
    variance = F.relu(1 - (column_variance(a, unbiased) + eps).sqrt()).mean()
    squares = gram_squares(a, a) if dual else off_diagonal_squares(a.T @ a)
    covariance = squares / (dim * divisor(rows, unbiased) ** 2)
    return mu_param * variance + nu_param * covariance


def _variance_covariance_share(
    rows: slice,
    grad_loss: Tensor,
    z: Tensor,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
) -> Tensor:
    return grad_loss * _variance_covariance_formula(z, mu_param, nu_param, eps, unbiased, dual)


variance_covariance = Op(
    "variance_covariance(Tensor z, float mu_param, float nu_param, float eps, bool unbiased, bool dual, bool derive,"
    " str precision) -> (Tensor loss, Tensor variance, Tensor covariance, Tensor kept)",
    backward="(Tensor grad_loss, Tensor z, Tensor kept, float mu_param, float nu_param,"
    " float eps, bool unbiased, bool dual, str precision) -> (Tensor grad_z)",
    fake=_variance_covariance_fake,
    portable=(_variance_covariance_portable, _variance_covariance_portable_backward),
    share=_variance_covariance_share,
    triton="correlation",
)


def _vicreg_fake(
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
) -> tuple[Tensor, ...]:
    parts = [z_a.new_empty((), dtype=accumulate_dtype(z_a.dtype)) for _ in range(4)]
    return *parts, *(_kept(z, dual, derive, Tensor.new_empty) for z in (z_a, z_b))


def _vicreg_portable(
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
) -> tuple[Tensor, ...]:
    options = mu_param / 2, nu_param, eps, unbiased, dual, derive, precision
    loss_a, variance_a, covariance_a, kept_a = _variance_covariance_portable(z_a, *options)
    loss_b, variance_b, covariance_b, kept_b = _variance_covariance_portable(z_b, *options)
    difference = z_a.to(loss_a.dtype) - z_b
    invariance = difference.square().mean(1).mean(dtype=torch.float64).to(loss_a.dtype)
    if derive and not dual:
        pull = difference.mul_(2 * lambda_param / z_a.numel())
        kept_a, kept_b = kept_a + pull, kept_b - pull
    loss = lambda_param * invariance + loss_a + loss_b
    return loss, invariance, (variance_a + variance_b) / 2, covariance_a + covariance_b, kept_a, kept_b


def _vicreg_portable_backward(
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
    if not dual:
        return (grad_loss * kept_a).to(z_a.dtype), (grad_loss * kept_b).to(z_b.dtype)
    options = mu_param / 2, nu_param, eps, unbiased, dual, precision
    wide_a, wide_b = (z.to(grad_loss.dtype) for z in (z_a, z_b))
    grad_z_a = _variance_covariance_portable_backward(grad_loss, wide_a, kept_a, *options)
    grad_z_b = _variance_covariance_portable_backward(grad_loss, wide_b, kept_b, *options)
    pull = (wide_a - wide_b) * (grad_loss * (2 * lambda_param / z_a.numel()))
    return (grad_z_a + pull).to(z_a.dtype), (grad_z_b - pull).to(z_b.dtype)


def _vicreg_share(
    rows: slice,
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
    dual: bool,
) -> Tensor:
    options = mu_param / 2, nu_param, eps, unbiased, dual
    views = _variance_covariance_formula(z_a, *options) + _variance_covariance_formula(z_b, *options)
    return grad_loss * (lambda_param * (z_a - z_b).square().mean() + views)


vicreg = Op(
    "vicreg(Tensor z_a, Tensor z_b, float lambda_param, float mu_param, float nu_param, float eps, bool unbiased,"
    " bool dual, bool derive, str precision)"
    " -> (Tensor loss, Tensor invariance, Tensor variance, Tensor covariance, Tensor kept_a, Tensor kept_b)",
    backward="(Tensor grad_loss, Tensor z_a, Tensor z_b, Tensor kept_a, Tensor kept_b, float lambda_param,"
    " float mu_param, float nu_param, float eps, bool unbiased, bool dual, str precision)"
    " -> (Tensor grad_z_a, Tensor grad_z_b)",
    fake=_vicreg_fake,
    portable=(_vicreg_portable, _vicreg_portable_backward),
    share=_vicreg_share,
    triton="correlation",
)
