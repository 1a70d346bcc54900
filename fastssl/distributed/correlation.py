"""Standardised columns and their correlations, over the rows of all processes; group None: of this process alone."""

from __future__ import annotations

from torch import Tensor

from fastssl._arithmetic import without_autocast
from fastssl.distributed.processes import ProcessGroup, mean_over_processes
from fastssl.ops import correlation
from fastssl.ops._precision import widen


def center(z: Tensor, group: ProcessGroup | None) -> Tensor:
    """z minus the means of its columns over all processes, in the dtype of sums."""
    if group is None:
        return correlation.center(z)
    z = widen(z)
    shifted = z - mean_over_processes(z[:1].detach(), group)  # nearly exact where a column is constant
    return shifted - mean_over_processes(shifted.mean(0), group)


def standardize(z: Tensor, eps: float, unbiased: bool, group: ProcessGroup | None) -> Tensor:
    centered = center(z, group)
    variance = mean_square(centered, group) * correction(z, unbiased, group)
    return centered * (variance + eps).rsqrt()


def mean_square(x: Tensor, group: ProcessGroup | None) -> Tensor:
    mean = (x * x).mean(0)  # the gradient of x.square() has a factor 2 x, which may be infinite
    return mean if group is None else mean_over_processes(mean, group)


def correction(z: Tensor, unbiased: bool, group: ProcessGroup | None) -> float:
    """The factor by which a mean over the rows of all processes is to be multiplied."""
    rows = z.shape[0] * (1 if group is None else group.size())
    return rows / correlation.divisor(rows, unbiased)


def correlate(a: Tensor, b: Tensor, group: ProcessGroup | None) -> Tensor:
    """The mean over the rows of all processes of the products of each two columns, under autocast too."""
    with without_autocast(a):
        product = a.T @ b / a.shape[0]
    return product if group is None else mean_over_processes(product, group)
