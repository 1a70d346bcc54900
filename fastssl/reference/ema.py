"""Exponential moving averages, as training scripts write them (MoCo, arXiv:1911.05722; BYOL, arXiv:2006.07733)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor) -> None:
    """target = momentum target + (1 - momentum) source, of every pair."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(momentum * target + (1 - momentum) * source)
