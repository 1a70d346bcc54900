"""A queue of past keys, entered one by one (MoCo, arXiv:1911.05722)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def enqueue_(keys: Tensor, position: Tensor, new_keys: Tensor, normalize: bool = False) -> None:
    """Each new key takes the place of the oldest."""
    if normalize:
        new_keys = F.normalize(new_keys.to(torch.promote_types(new_keys.dtype, torch.float32)), dim=1)
    for key in new_keys.clone():
        keys[position % len(keys)] = key.to(keys.dtype)
        position.copy_((position + 1) % len(keys))
