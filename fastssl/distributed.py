"""What a loss needs of the other processes: how many there are, and their rows."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def rank() -> int:
    """This process's rank in the default group, 0 without one."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """The number of processes in the default group, 1 without one."""
    return dist.get_world_size() if _initialized() else 1


def gather_rows(x: Tensor) -> Tensor:
    """The rows of x of all processes, in the order of their ranks.

    The gradient of a process's x is that of the sum of all processes' losses. All must call this, and later its
    backward pass, with an x of the same shape and dtype.

    Args:
        x: (B, ...) rows of this process.

    Returns:
        (world_size B, ...), rows rank B to (rank + 1) B being x.
    """
    return _GatherRows.apply(x)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


class _GatherRows(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        output = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(output, x.contiguous())
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumRows.apply(grad)


class _SumRows(Function):
    """The gather's transpose: the sum over processes of this process's part of x."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        output = x.new_empty(x.shape[0] // world_size(), *x.shape[1:])
        dist.reduce_scatter_tensor(output, x.contiguous())
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _GatherRows.apply(grad)
