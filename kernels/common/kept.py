"""The output `kept`, in which a forward pass may keep tiles for the backward pass: on the GPU it keeps none."""

from __future__ import annotations

import torch
from torch import Tensor


def nothing_kept(x: Tensor, keep: int) -> Tensor:
    """The output `kept` of an operation: zeros, as many bytes as its caller allows. See fastssl/ops/contrastive/."""
    return x.new_zeros(keep, dtype=torch.uint8)
