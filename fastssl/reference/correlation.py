"""Barlow Twins (arXiv:2103.03230) and VICReg (arXiv:2105.04906), as their authors' code has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambda_param: float = 5e-3,
    eps: float = 1e-5,
    unbiased: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The cross-correlation of the views' standardised features, less the identity, squared and weighted."""
    correlation = cross_correlation(z_a, z_b, eps=eps, unbiased=unbiased)
    invariance = (correlation.diagonal() - 1).square().sum()
    redundancy = _off_diagonal(correlation).square().sum()
    loss = invariance + lambda_param * redundancy
    return _with_metrics(loss, return_metrics, invariance=invariance, redundancy=redundancy)


def redundancy_loss(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> Tensor:
    """The squares off the diagonal of the cross-correlation."""
    return _off_diagonal(cross_correlation(z_a, z_b, eps=eps, unbiased=unbiased)).square().sum()


def cross_correlation(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> Tensor:
    """(D, D), of the standardised features."""
    a, b = (_standardize(z, eps, unbiased) for z in (z_a, z_b))
    return a.T @ b / len(a)


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Invariance of the views, variance of each feature, and covariance of each two features."""
    invariance = F.mse_loss(z_a, z_b) * (z_a.shape[1] if invariance_reduction == "batchmean" else 1)
    variance = variance_loss(z_a, eps=eps, unbiased=unbiased) + variance_loss(z_b, eps=eps, unbiased=unbiased)
    variance = variance / (2 if variance_reduction == "mean" else 1)
    covariance = covariance_loss(z_a, unbiased=unbiased) + covariance_loss(z_b, unbiased=unbiased)
    loss = lambda_param * invariance + mu_param * variance + nu_param * covariance
    return _with_metrics(loss, return_metrics, invariance=invariance, variance=variance, covariance=covariance)


def variance_loss(z: Tensor, *, eps: float = 1e-4, unbiased: bool = True) -> Tensor:
    """How far the standard deviations of the features are below 1."""
    std = (z.var(0, unbiased=unbiased) + eps).sqrt()
    return F.relu(1 - std).mean()


def covariance_loss(z: Tensor, *, unbiased: bool = True) -> Tensor:
    """The squares off the diagonal of the features' covariance, by their number."""
    z = z - z.mean(0)
    covariance = z.T @ z / (len(z) - int(unbiased))
    return _off_diagonal(covariance).square().sum() / z.shape[1]


def _standardize(z: Tensor, eps: float, unbiased: bool) -> Tensor:
    if unbiased or eps == 0:  # which batch_norm does not do
        return (z - z.mean(0)) / (z.var(0, unbiased=unbiased) + eps).sqrt()
    return F.batch_norm(z, None, None, training=True, eps=eps)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix.masked_fill(torch.eye(len(matrix), dtype=torch.bool, device=matrix.device), 0)


def _with_metrics(loss: Tensor, return_metrics: bool, **metrics: Tensor) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    return (loss, {name: x.detach().float() for name, x in metrics.items()}) if return_metrics else loss
