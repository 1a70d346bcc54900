"""Rows of unit length, and the gradient through that, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12  # torch.nn.functional.normalize's


def normalized_rows(z: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """(z, norms): the rows in the dtype of sums, and the norms they were divided by (N, 1), unclamped."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
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
