"""How unevenly directions are spread over the sphere (arXiv:2005.10242)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniformity(x: Tensor, *, t: float | Tensor = 2.0) -> Tensor:
    """The log-mean-exp of all distances between different rows."""
    z = F.normalize(x, dim=1)
    rows = z.shape[0]
    itself = torch.eye(rows, dtype=torch.bool, device=z.device)
    potential = (-t * (2 - 2 * z @ z.T)).masked_fill(itself, float("-inf"))
    peak = potential.detach().flatten().logsumexp(0)  # whose derivative would be rounded as it is
    pairs = z.new_full((), rows * (rows - 1), dtype=torch.float64)
    return (potential - peak).exp().sum().log() + peak - pairs.log().to(z.dtype)
