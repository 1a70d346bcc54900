"""Exponential moving averages of lists of tensors, in place: schema and portable code.

    target = momentum target + (1 - momentum) source

There is no derivative. `momentum` is a 0-d tensor: on the CPU its value is read, elsewhere nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.ops._op import current_backend

_library = torch.library.Library("fastssl", "FRAGMENT")


def check_pairs(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """What kernels check by themselves, lest every tensor be looked at in Python."""
    if len(targets) != len(sources):
        raise ValueError(f"targets and sources must have the same length, got {len(targets)} and {len(sources)}")
    addresses = set()
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            shapes = f"{list(target.shape)} and {list(source.shape)}"
            raise ValueError(f"targets[{i}] and sources[{i}] must have the same shape, got {shapes}")
        if target.device != source.device:
            devices = f"{target.device} and {source.device}"
            raise ValueError(f"targets[{i}] and sources[{i}] must be on the same device, got {devices}")
        if not (target.is_floating_point() and source.is_floating_point()):
            dtypes = f"{target.dtype} and {source.dtype}"
            raise ValueError(f"targets[{i}] and sources[{i}] must be of floating-point dtypes, got {dtypes}")
        if target.numel() and target.data_ptr() in addresses:
            raise ValueError(f"targets must not share memory, but targets[{i}] is there twice")
        addresses.add(target.data_ptr())


def _portable(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor) -> None:
    check_pairs(targets, sources)
    together = [], []
    for target, source in zip(targets, sources, strict=True):
        wide = torch.promote_types(target.dtype, torch.float32)
        if target.dtype == source.dtype == wide and momentum.device.type == "cpu":
            together[0].append(target)
            together[1].append(source)
        else:
            target.copy_(target.to(wide).lerp(source.to(wide), (1 - momentum).to(wide)))
    if together[0]:
        torch._foreach_lerp_(*together, 1 - momentum.item())


for _name in ("ema_update_", "ema_update_portable_"):
    _library.define(f"{_name}(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum) -> ()")
    _library.impl(_name, _portable, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastssl::{_name}", lambda targets, sources, momentum: None, lib=_library)


def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor) -> None:
    """The kernel of the tensors' device where there is one, else the portable code."""
    if current_backend() == "portable":
        torch.ops.fastssl.ema_update_portable_(targets, sources, momentum)
    else:
        torch.ops.fastssl.ema_update_(targets, sources, momentum)
