"""A ring buffer of keys, written in place (MoCo, arXiv:1911.05722): schema and portable code.

    keys[(position + i) mod size] = new_keys[i],  position = (position + B) mod size

of the last `size` of B new keys. There is no derivative. `position` is 0-d int64: on the CPU its value is read, on
other devices nothing waits for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._precision import widen


def _portable(keys: Tensor, position: Tensor, new_keys: Tensor, normalize: bool) -> None:
    size, count = keys.shape[0], new_keys.shape[0]
    first = max(count - size, 0)
    entered = new_keys[first:]
    if normalize:
        entered = F.normalize(widen(entered), dim=1)
    places = (position + torch.arange(first, count, device=keys.device)) % size
    keys.index_copy_(0, places, entered.to(keys.dtype, copy=True))  # they may be some of keys
    position.add_(count).remainder_(size)


enqueue_ = Op(
    "enqueue_(Tensor(a!) keys, Tensor(b!) position, Tensor new_keys, bool normalize) -> ()", portable=_portable
)
