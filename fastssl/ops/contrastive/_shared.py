"""Shared by several of the operations: normalised rows, sums of exponentials, cross-entropies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._precision import accumulate_dtype

EPS = 1e-12  # torch.nn.functional.normalize's


def normalized_rows(z: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """(z, norms): the rows in the dtype of sums, and the norms they were divided by (N, 1), unclamped."""
    z = z.to(accumulate_dtype(z.dtype))
    if not normalize:
        return z, None
    # Through float64, so that rows of 1e-30 or 1e30 have a norm in float32.
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
    return (z / norms.clamp_min(EPS)).to(z.dtype), norms.to(z.dtype)


def through_norms(gradient: Tensor, z: Tensor, norms: Tensor | None) -> Tensor:
    """The gradient of the rows that `normalized_rows` was given, from that of z."""
    if norms is None:
        return gradient
    along = (gradient * z).sum(1, keepdim=True).where(norms > EPS, 0)
    return (gradient - along * z) / norms.clamp_min(EPS)


def sums_of_exponentials(S: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(total, shift): the sum of exp(S - shift), 0 where there is none, and the shift, the maximum, broadcast."""
    largest = S.amax(dim, keepdim=True)
    shift = largest.where(largest != float("-inf"), 0)
    return (S - shift).exp().sum(dim), shift.squeeze(dim)


def margin(total: Tensor, shift: Tensor, positive: Tensor) -> Tensor:
    """n - positive, n the log-sum-exp of the negatives: the cross-entropy is its softplus. NaN where positive is
    infinite."""
    return total.log() + (shift - positive) + 0 * positive
