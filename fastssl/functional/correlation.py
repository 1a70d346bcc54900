"""Losses on the correlation and covariance of features."""

from __future__ import annotations

from typing import Literal, overload

import torch.nn.functional as F
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import finish, multiple, needs_gradient, of_reference
from fastssl._checks import (
    check_batch,
    check_choice,
    check_eps,
    check_flag,
    check_group,
    check_holds,
    check_number,
    check_pair,
    check_rows,
    check_size,
)
from fastssl.distributed import ProcessGroup, gather_rows, mean_over_processes
from fastssl.distributed.correlation import center, correction, correlate, mean_square, standardize
from fastssl.ops import correlation, current_backend
from fastssl.ops._precision import accumulate_dtype, product_precision


@overload
def barlow_twins(
    z_a: Tensor, z_b: Tensor, *, lambda_param: float = ..., eps: float = ..., unbiased: bool = ...,
    return_metrics: Literal[False] = ..., group: ProcessGroup | None = ...,
) -> Tensor: ...

@overload
def barlow_twins(
    z_a: Tensor, z_b: Tensor, *, lambda_param: float = ..., eps: float = ..., unbiased: bool = ...,
    return_metrics: Literal[True], group: ProcessGroup | None = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambda_param: float = 5e-3,
    eps: float = 1e-5,
    unbiased: bool = False,
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Barlow Twins (arXiv:2103.03230): each feature should correlate with itself across the views, and with no other.

        loss = sum_i (C_ii - 1)^2 + lambda_param sum_{i != j} C_ij^2,    C = A^T B / B_rows,

    A and B being the views' features, standardised over the batch: minus their mean, divided by sqrt(variance + eps).
    By default that is `torch.nn.functional.batch_norm`, as in the authors' code; with unbiased=True and eps=0 it is
    Algorithm 1 of the paper. The D x D correlations are never stored, see `correlation_algorithm`: memory is O(B D).

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device.
        lambda_param: the weight of the redundancy, which need not be computed where it is 0.
        eps: added to the variances. A feature that is constant over the batch has correlation 0 with all others; with
            an eps of 0, NaN.
        unbiased: divide the variances by B - 1, not by B. C is divided by B in either case.
        return_metrics: also return the parts of the loss; they cost no further product.
        group: processes that each hold B rows of one batch, over which features are standardised and correlated. None:
            this process alone. All must call this function and its backward pass, with the same arguments except for
            the features. If all rows together are at most D, the processes exchange their rows, otherwise their D x D
            correlations, which are then stored; their products have the dtype of sums.

    Returns:
        0-d loss in z_a's dtype, float32 under autocast; NaN where z_a or z_b has NaN or Inf. With return_metrics,
        (loss, metrics); the metrics are detached 0-d float32 tensors: "invariance", sum_i (C_ii - 1)^2; "redundancy",
        sum_{i != j} C_ij^2, or 0 where it was not computed.

        With a group, every process's loss (and metrics) is that of the whole batch. The gradients of the features are
        those of the sum of the processes' losses: averaged over the processes, as DistributedDataParallel does, the
        gradients of parameters are those of one process on the whole batch.

    Raises:
        TypeError: if z_a or z_b is no tensor, or lambda_param or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, lambda_param or eps is not
            finite, or lambda_param not in float32, eps is negative, or on every process, if those of group differ in
            shapes, dtypes or requires_grad.
    """
    z_a, z_b = check_pair(z_a, z_b, "z_a", "z_b")
    lambda_param = _check_weight("lambda_param", lambda_param, z_a)
    eps = check_eps(eps)
    unbiased = check_flag("unbiased", unbiased)
    return_metrics = check_flag("return_metrics", return_metrics)
    check_group(group)
    check_batch(group, z_a=z_a, z_b=z_b)
    if current_backend() == "reference":
        result = reference.correlation.barlow_twins(
            z_a, z_b, lambda_param=lambda_param, eps=eps, unbiased=unbiased, return_metrics=return_metrics
        )
        return of_reference(result, z_a)
    if _exchanges_rows(z_a, group):
        loss, invariance, redundancy = _barlow_twins(*_gather(group, z_a, z_b), 1.0, lambda_param, eps, unbiased)
    else:
        C = _cross_correlation(z_a, z_b, eps, unbiased, group)
        invariance, redundancy = (C.diagonal() - 1).square().sum(), correlation.off_diagonal_squares(C)
        loss = invariance + lambda_param * redundancy
    return _with_metrics(loss, z_a, return_metrics, invariance=invariance, redundancy=redundancy)


@overload
def vicreg(
    z_a: Tensor, z_b: Tensor, *, lambda_param: float = ..., mu_param: float = ..., nu_param: float = ...,
    eps: float = ..., unbiased: bool = ..., invariance_reduction: str = ..., variance_reduction: str = ...,
    return_metrics: Literal[False] = ..., group: ProcessGroup | None = ...,
) -> Tensor: ...

@overload
def vicreg(
    z_a: Tensor, z_b: Tensor, *, lambda_param: float = ..., mu_param: float = ..., nu_param: float = ...,
    eps: float = ..., unbiased: bool = ..., invariance_reduction: str = ..., variance_reduction: str = ...,
    return_metrics: Literal[True], group: ProcessGroup | None = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    eps: float = 1e-4,
    unbiased: bool = True,
    invariance_reduction: str = "mean",
    variance_reduction: str = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""VICReg (arXiv:2105.04906): variance, invariance and covariance of the views' features.

        loss = lambda_param invariance + mu_param variance + nu_param covariance
        invariance = mean (z_a - z_b)^2
        variance   = the mean of the views' mean_i relu(1 - sqrt(Var z_i + eps))
        covariance = the sum of the views' sum_{i != j} Cov(z_i, z_j)^2 / D

    That is the authors' code. The paper's equations sum the invariance over the features (invariance_reduction
    "batchmean") and the variance over the views (variance_reduction "sum"). The D x D covariances are never stored, see
    `correlation_algorithm`: memory is O(B D).

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device.
        lambda_param: the weight of the invariance.
        mu_param: the weight of the variance.
        nu_param: the weight of the covariance, which need not be computed where it is 0.
        eps: added to the variances. With an eps of 0, a feature that is constant over the batch has gradient NaN.
        unbiased: divide variances and covariances by B - 1, not by B.
        invariance_reduction: "mean" over rows and features, or "batchmean": the mean over rows of the sum over
            features.
        variance_reduction: "mean" or "sum" over the two views.
        return_metrics: also return the parts of the loss; they cost no further product.
        group: processes that each hold B rows of one batch, as in `barlow_twins`.

    Returns:
        0-d loss in z_a's dtype, float32 under autocast; NaN where z_a or z_b has NaN or Inf. With return_metrics,
        (loss, metrics); the metrics are detached 0-d float32 tensors: "invariance", "variance" and "covariance", or 0
        where that was not computed. With a group, losses, metrics and gradients are as in `barlow_twins`.

    Raises:
        TypeError: if z_a or z_b is no tensor, or a weight or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, a weight or eps is not
            finite (or is not in float32), eps is negative, a reduction is unknown, or on every process, if those of
            group differ in shapes, dtypes or requires_grad.
    """
    z_a, z_b = check_pair(z_a, z_b, "z_a", "z_b")
    check_choice("invariance_reduction", invariance_reduction, ("mean", "batchmean"))
    check_choice("variance_reduction", variance_reduction, ("mean", "sum"))
    features = z_a.shape[1] if invariance_reduction == "batchmean" else 1
    views = 2 if variance_reduction == "sum" else 1
    lambda_param = _check_weight("lambda_param", lambda_param, z_a, features)
    mu_param = _check_weight("mu_param", mu_param, z_a, views)
    nu_param = _check_weight("nu_param", nu_param, z_a)
    eps = check_eps(eps)
    unbiased = check_flag("unbiased", unbiased)
    return_metrics = check_flag("return_metrics", return_metrics)
    check_group(group)
    check_batch(group, z_a=z_a, z_b=z_b)
    if current_backend() == "reference":
        return reference.correlation.vicreg(
            z_a, z_b, lambda_param=lambda_param, mu_param=mu_param, nu_param=nu_param, eps=eps, unbiased=unbiased,
            invariance_reduction=invariance_reduction, variance_reduction=variance_reduction,
            return_metrics=return_metrics,
        )  # fmt: skip
    weights = multiple(lambda_param, features), multiple(mu_param, views), nu_param
    vicreg_of = _vicreg if _exchanges_rows(z_a, group) else _vicreg_of_processes
    loss, invariance, variance, covariance = vicreg_of(group, z_a, z_b, *weights, eps, unbiased)
    metrics = {"invariance": invariance * features, "variance": variance * views, "covariance": covariance}
    return _with_metrics(loss, z_a, return_metrics, **metrics)


def covariance_loss(z: Tensor, *, unbiased: bool = True) -> Tensor:
    r"""VICReg's covariance term of one view (arXiv:2105.04906): sum_{i != j} Cov(z_i, z_j)^2 / D.

    Args:
        z: (B, D) embeddings, B >= 2; float32, bfloat16, float16 or float64.
        unbiased: divide the covariances by B - 1, not by B.

    Returns:
        0-d loss in z's dtype, float32 under autocast; NaN where z has NaN or Inf.

    Raises:
        TypeError: if z is no tensor.
        ValueError: if its shape or dtype does not fit, or it has one row or none.
    """
    check_rows("z", z, "(B, D)")
    unbiased = check_flag("unbiased", unbiased)
    check_batch(None, z=z)
    if current_backend() == "reference":
        return of_reference(reference.correlation.covariance_loss(z, unbiased=unbiased), z)
    return _variance_covariance(z, 0.0, 1.0, 1.0, unbiased)  # with this eps no deviation is below 1


def variance_loss(z: Tensor, *, eps: float = 1e-4, unbiased: bool = True) -> Tensor:
    r"""VICReg's variance term of one view (arXiv:2105.04906): mean_i relu(1 - sqrt(Var z_i + eps)).

    Args:
        z: (B, D) embeddings, B >= 2; float32, bfloat16, float16 or float64.
        eps: added to the variances. With an eps of 0, a feature that is constant over the batch has gradient NaN.
        unbiased: divide the variances by B - 1, not by B.

    Returns:
        0-d loss in z's dtype, float32 under autocast; NaN where z has NaN or Inf.

    Raises:
        TypeError: if z is no tensor, or eps no number.
        ValueError: if its shape or dtype does not fit, it has one row or none, or eps is not finite or negative.
    """
    check_rows("z", z, "(B, D)")
    eps = check_eps(eps)
    unbiased = check_flag("unbiased", unbiased)
    check_batch(None, z=z)
    if current_backend() == "reference":
        return reference.correlation.variance_loss(z, eps=eps, unbiased=unbiased)
    return _variance_covariance(z, 1.0, 0.0, eps, unbiased)


def redundancy_loss(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> Tensor:
    r"""The redundancy term of Barlow Twins (arXiv:2103.03230): sum_{i != j} C_ij^2, C as in `barlow_twins`.

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device; or z_a itself.
        eps: added to the variances.
        unbiased: divide the variances by B - 1, not by B.

    Returns:
        0-d loss in z_a's dtype, float32 under autocast; NaN where z_a or z_b has NaN or Inf.

    Raises:
        TypeError: if z_a or z_b is no tensor, or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, or eps is not finite or
            negative.
    """
    z_a, z_b = check_pair(z_a, z_b, "z_a", "z_b")
    eps = check_eps(eps)
    unbiased = check_flag("unbiased", unbiased)
    check_batch(None, z_a=z_a, z_b=z_b)
    if current_backend() == "reference":
        return of_reference(reference.correlation.redundancy_loss(z_a, z_b, eps=eps, unbiased=unbiased), z_a)
    return finish(_barlow_twins(z_a, z_b, 0.0, 1.0, eps, unbiased)[0], "none", z_a)


def cross_correlation(
    z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, unbiased: bool = False, group: ProcessGroup | None = None
) -> Tensor:
    r"""The cross-correlations of the views' features on which `barlow_twins` is a loss: C = A^T B / B_rows.

    The matrix is stored. It is one product of PyTorch's, in the dtype of sums, with PyTorch's own derivatives.

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device.
        eps: added to the variances.
        unbiased: divide the variances by B - 1, not by B.
        group: processes that hold B rows each of one batch, as in `barlow_twins`.

    Returns:
        (D, D) correlations in z_a's dtype, float32 under autocast; with a group, those of the whole batch.

    Raises:
        TypeError: if z_a or z_b is no tensor, or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, eps is not finite or
            negative, or on every process, if those of group differ in shapes, dtypes or requires_grad.
    """
    z_a, z_b = check_pair(z_a, z_b, "z_a", "z_b")
    eps = check_eps(eps)
    unbiased = check_flag("unbiased", unbiased)
    check_group(group)
    check_batch(group, z_a=z_a, z_b=z_b)
    if current_backend() == "reference":
        return of_reference(reference.correlation.cross_correlation(z_a, z_b, eps=eps, unbiased=unbiased), z_a)
    return finish(_cross_correlation(z_a, z_b, eps, unbiased, group), "none", z_a)


def correlation_algorithm(batch: int, dim: int) -> str:
    """Which of two algorithms `barlow_twins`, `vicreg`, `covariance_loss` and `redundancy_loss` run.

    The sum of the squares of A^T B, which is D x D, is the product of A A^T and B B^T, which are B x B, element by
    element. If there are fewer rows than features, this form ("dual") costs about B / D of the product itself;
    otherwise the D x D correlations are computed block by block, for the loss and its gradients at once ("primal"). The
    dual form subtracts the diagonal from a sum that includes it, and its rounding errors are relative to that sum. Near
    B = D the diagonal may be nearly all of the sum, so the dual form runs where 4 B <= 3 D. Even there it may be nearly
    all, if few features vary and those do not correlate: `redundancy_loss` and `covariance_loss` are then tiny, and
    have few correct digits.

    Args:
        batch: B, the number of rows, of all processes in a group that exchanges them.
        dim: D, the number of features.

    Returns:
        "dual" or "primal".

    Raises:
        TypeError: if batch or dim is no integer.
        ValueError: if one is negative.
    """
    batch, dim = check_size("batch", batch), check_size("dim", dim)
    return "dual" if 4 * batch <= 3 * dim else "primal"


def _check_weight(name: str, weight: float, x: Tensor, factor: int = 1) -> float:
    """x's dtype of sums must hold it, and it times the factor."""
    weight = check_number(name, weight)
    check_holds(name, weight * factor, weight, x)
    return weight


def _barlow_twins(
    z_a: Tensor, z_b: Tensor, invariance_param: float, lambda_param: float, eps: float, unbiased: bool
) -> tuple[Tensor, ...]:
    """(loss, invariance, redundancy)"""
    options = invariance_param, lambda_param, eps, unbiased, correlation_algorithm(*z_a.shape) == "dual"
    return correlation.barlow_twins(z_a, z_b, *options, needs_gradient(z_a, z_b), product_precision(z_a))[:3]


def _vicreg(
    group: ProcessGroup | None,
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, ...]:
    """(loss, invariance, variance, covariance)"""
    z_a, z_b = _gather(group, z_a, z_b)
    options = lambda_param, mu_param, nu_param, eps, unbiased, correlation_algorithm(*z_a.shape) == "dual"
    return correlation.vicreg(z_a, z_b, *options, needs_gradient(z_a, z_b), product_precision(z_a))[:4]


def _vicreg_of_processes(
    group: ProcessGroup,
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, ...]:
    """The same, for processes that exchange their shares of the D x D covariances."""
    dtype = accumulate_dtype(z_a.dtype)
    invariance = mean_over_processes((z_a.to(dtype) - z_b.to(dtype)).square().mean(), group)
    centered = [center(z, group) for z in (z_a, z_b)]
    factor = correction(z_a, unbiased, group)
    covariances = (correlate(x, x, group) * factor for x in centered)
    covariance: Tensor = sum(correlation.off_diagonal_squares(C) for C in covariances) / z_a.shape[1]
    variances = (mean_square(x, group) * factor for x in centered)
    variance: Tensor = sum(F.relu(1 - (x + eps).sqrt()).mean() for x in variances) / 2
    loss = lambda_param * invariance + mu_param * variance + nu_param * covariance
    return loss, invariance, variance, covariance


def _variance_covariance(z: Tensor, mu_param: float, nu_param: float, eps: float, unbiased: bool) -> Tensor:
    options = mu_param, nu_param, eps, unbiased, correlation_algorithm(*z.shape) == "dual"
    loss, *_ = correlation.variance_covariance(z, *options, needs_gradient(z), product_precision(z))
    return finish(loss, "none", z)


def _exchanges_rows(z: Tensor, group: ProcessGroup | None) -> bool:
    """Whether the rows of all processes are a smaller message than D x D correlations."""
    return group is None or z.shape[0] * group.size() <= z.shape[1]


def _gather(group: ProcessGroup | None, *views: Tensor) -> tuple[Tensor, ...]:
    return views if group is None else tuple(gather_rows(z, group) for z in views)


def _cross_correlation(z_a: Tensor, z_b: Tensor, eps: float, unbiased: bool, group: ProcessGroup | None) -> Tensor:
    a, b = (standardize(z, eps, unbiased, group) for z in (z_a, z_b))
    return correlate(a, b, group)


def _with_metrics(
    loss: Tensor, x: Tensor, return_metrics: bool, **metrics: Tensor
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    loss = finish(loss, "none", x)
    return (loss, {name: metric.detach().float() for name, metric in metrics.items()}) if return_metrics else loss
