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
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_pairs(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """What kernels check by themselves, lest every tensor be looked at in Python."""
    if len(targets) != len(sources):
        raise ValueError(f"targets and sources must have the same length, got {len(targets)} and {len(sources)}")
    spans = []
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            shapes = f"{list(target.shape)} and {list(source.shape)}"
            raise ValueError(f"targets[{i}] and sources[{i}] must have the same shape, got {shapes}")
        if target.device != source.device:
            devices = f"{target.device} and {source.device}"
            raise ValueError(f"targets[{i}] and sources[{i}] must be on the same device, got {devices}")
        for name, x in (("targets", target), ("sources", source)):
            if x.dtype not in _DTYPES:
                raise ValueError(f"{name}[{i}] must be of 16, 32 or 64 bits, floating-point, got {x.dtype}")
        if target.device.type == "meta" or target.numel() == 0:
            continue
        if _elements(target) < target.numel():
            raise ValueError(f"targets[{i}] must have no two elements in one place, got strides {target.stride()}")
        spans.append((*_span(target), f"targets[{i}]", True))
        if (source.data_ptr(), source.stride(), source.dtype) != (target.data_ptr(), target.stride(), target.dtype):
            spans.append((*_span(source), f"sources[{i}]", False))
    last_end, last_name, target_end, target_name = 0, "", 0, ""
    for begin, end, name, written in sorted(spans):
        if begin < (last_end if written else target_end):
            raise ValueError(f"targets must not share memory, got {name} and {last_name if written else target_name}")
        if end > last_end:
            last_end, last_name = end, name
        if written and end > target_end:
            target_end, target_name = end, name


def _elements(x: Tensor) -> int:
    """From the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses from its first to behind its last element."""
    return x.data_ptr(), x.data_ptr() + _elements(x) * x.element_size()


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
        torch.ops.fastssl.ema_update_portable_.default(targets, sources, momentum)
    else:
        torch.ops.fastssl.ema_update_.default(targets, sources, momentum)
