"""A ring buffer of keys, written in place (MoCo, arXiv:1911.05722): schema and portable code.

    keys[(position + i) mod size] = new_keys[i],  position = (position + B) mod size

of the last `size` of B new keys. There is no derivative. `position` is 0-d int64: on the CPU its value is read,
elsewhere nobody waits for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._backend import current_backend

_library = torch.library.Library("fastssl", "FRAGMENT")


def _portable(keys: Tensor, position: Tensor, new_keys: Tensor, normalize: bool) -> None:
    size, count = keys.shape[0], new_keys.shape[0]
    first = max(count - size, 0)
    entered = new_keys[first:]
    if normalize:
        entered = F.normalize(entered.to(torch.promote_types(entered.dtype, torch.float32)), dim=1)
    places = (position + torch.arange(first, count, device=keys.device)) % size
    keys.index_copy_(0, places, entered.to(keys.dtype, copy=True))  # they may be some of keys
    position.add_(count).remainder_(size)


for _name in ("enqueue_", "enqueue_portable_"):
    _library.define(f"{_name}(Tensor(a!) keys, Tensor(b!) position, Tensor new_keys, bool normalize) -> ()")
    _library.impl(_name, _portable, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastssl::{_name}", lambda keys, position, new_keys, normalize: None, lib=_library)


def enqueue_(keys: Tensor, position: Tensor, new_keys: Tensor, normalize: bool) -> None:
    """The kernel of the tensors' device where there is one, else the portable code."""
    if current_backend() == "portable":
        torch.ops.fastssl.enqueue_portable_.default(keys, position, new_keys, normalize)
    else:
        torch.ops.fastssl.enqueue_.default(keys, position, new_keys, normalize)
