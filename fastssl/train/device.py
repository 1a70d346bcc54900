"""Where a run takes place: the choice of a device, and what keeps the host from waiting for a GPU.

A GPU works through a queue that the host fills. The host waits, and the queue runs dry, when it reads a number that is
on the GPU. So a step reads none: what is to be known of it is copied to the host behind its work (`Reading`), and read
some steps later.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl._checks import check_device


def choose(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is CUDA where there is a GPU, otherwise the CPU. Under torchrun, "cuda" is each
    process's own GPU.

    Raises:
        TypeError: if it is neither a name nor a device.
        ValueError: if there is no such device here, or several processes of this machine would have the same GPU.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a name or a torch.device, got {type(device).__name__}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', or the name of a device such as 'cuda:0', got {device!r}") from None
    if chosen.type != "cuda":
        return check_device(chosen)
    alone = not dist.is_torchelastic_launched() or os.environ.get("LOCAL_WORLD_SIZE") == "1"
    if not alone and chosen.index is not None:
        raise ValueError(f"device must be 'cuda' in several processes, each of which has its own, got {device!r}")
    index = chosen.index if alone else int(os.environ["LOCAL_RANK"])
    if index is None:
        index = torch.cuda.current_device() if gpus else 0
    if index >= gpus:
        raise ValueError(f"device must be one that PyTorch has here, which has {gpus} GPUs, got cuda:{index}")
    return torch.device("cuda", index)


def move(x: Any, device: torch.device) -> Any:
    """A tensor, or a tuple or list of them, on the device. A GPU gets it from memory from which it can fetch it itself,
    so that the host need not wait."""
    if isinstance(x, (tuple, list)):
        return tuple(move(part, device) for part in x)
    if not isinstance(x, Tensor) or x.device == device:
        return x
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=x.device.type == "cpu")


class Reading:
    """Numbers of a tensor that are on their way to the host.

    Args:
        x: what they are in. If it is on a GPU, the host waits in `numbers`, and until then for nothing.
    """

    def __init__(self, x: Tensor) -> None:
        self._host = x.detach().to("cpu", non_blocking=x.is_cuda)  # into pinned memory
        self._there = None
        if x.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(x.device))

    def numbers(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()
