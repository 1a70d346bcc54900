"""Moving averages."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastssl import reference
from fastssl._checks import (
    check_scalar,
    check_share,
    check_tensors,
)
from fastssl.ops import current_backend, ema


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """Exponential moving average, in place: the teacher of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO.

        target = momentum target + (1 - momentum) source

    of all pairs in one pass over memory, in float32 arithmetic where both are of 32 or 16 bits.

    Args:
        targets: tensors of any shape, float32, bfloat16, float16 or float64; changed.
        sources: as many, each of its target's shape and device, and of any of those dtypes. From its first element to
            its last, no target may share memory with another tensor, unless source and target are one.
        momentum: from 0, which copies, to 1, which leaves the targets as they are: a number, or a 0-d tensor, whose
            value is not checked and which no GPU waits for.

    Raises:
        TypeError: if a target or a source is no tensor, or momentum neither number nor tensor.
        ValueError: before anything is changed, if numbers, shapes, dtypes or devices do not fit, momentum is a number
            below 0 or above 1, or a target shares memory.
    """
    targets, sources = list(targets), list(sources)
    check_tensors("targets", targets)
    check_tensors("sources", sources)
    if isinstance(momentum, Tensor):
        check_scalar("momentum", momentum)
    else:
        check_share("momentum", momentum)
    if current_backend() == "reference":
        ema.check_pairs(targets, sources)
        reference.ema.ema_update_(targets, sources, momentum)
        return
    momentum = torch.as_tensor(momentum, dtype=torch.float64)
    devices = {x.device for x in (*targets, *sources)}
    if len(devices) < 2:
        ema.ema_update_(targets, sources, momentum)
    else:
        ema.check_pairs(targets, sources)
        for device in devices:
            on_device = [[x for x in tensors if x.device == device] for tensors in (targets, sources)]
            ema.ema_update_(*on_device, momentum)
    torch.autograd.graph.increment_version(targets)
