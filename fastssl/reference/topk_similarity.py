"""The nearest neighbours by similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def topk_similarity(query: Tensor, bank: Tensor, k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """All similarities, then the k largest of each row."""
    query, bank = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, bank))
    if normalize:
        query, bank = F.normalize(query, dim=1), F.normalize(bank, dim=1)
    values, indices = (query @ bank.T).topk(k, dim=1)
    return values, indices
