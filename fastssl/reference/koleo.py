"""KoLeo (arXiv:1806.03198), with DINOv3's groups and numbers of neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(features: Tensor, *, eps: float = 1e-8, topk: int = 1, group_size: int | None = None) -> Tensor:
    """Group by group: all similarities, the largest of them, and the distances to the rows that have them."""
    x = F.normalize(features, dim=1, eps=eps)
    distances = []
    for z in x.split(group_size or max(len(x), 1)):
        similarity = (z @ z.T).detach().fill_diagonal_(float("-inf"))
        nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, :topk]
        others = z.index_select(0, nearest.flatten()).view(*nearest.shape, z.shape[1])
        distances.append(F.pairwise_distance(z[:, None], others, eps=eps))
    return -(torch.cat(distances) + eps).log().mean()
