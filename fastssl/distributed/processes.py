"""The processes of a group: their number, their rows, and whether their tensors are alike."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = type(None)
_DESCRIPTION = 160  # bytes, of a tensor in words


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.disable, which imports torch._dynamo: only where something has, else nothing is compiled."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
        return run(*args, **kwargs)

    return call


def rank() -> int:
    """This process's rank in the default group, 0 without one."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """The number of processes in the default group, 1 without one."""
    return dist.get_world_size() if _initialized() else 1


def default_group(index: int, processes: int) -> ProcessGroup:
    """The default group, if it has that many processes and this one has that rank in it."""
    if not _initialized() or (rank(), world_size()) != (index, processes):
        raise ValueError(
            "rank and world_size must be those of torch.distributed's default group,"
            f" {(rank(), world_size()) if _initialized() else 'which there is not'}, got {(index, processes)}"
        )
    return dist.group.WORLD


def all_processes() -> ProcessGroup | None:
    """The default group, None where this process is alone."""
    return default_group(rank(), world_size()) if world_size() > 1 else None


def gather_rows(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The rows of x of all processes, in the order of their ranks.

    The gradient of a process's x is that of the sum of all processes' losses. All must call this, and later its
    backward pass, with an x of the same shape and dtype.

    Args:
        x: (B, ...) rows of this process.
        group: the processes; None: all of them.

    Returns:
        (processes B, ...), rows rank B to (rank + 1) B being x.
    """
    return _GatherRows.apply(x, group)


def mean_over_processes(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The mean of x over the processes, summed in float32 or float64. Its gradient is the mean of their gradients."""
    return _Mean.apply(x.to(torch.promote_types(x.dtype, torch.float32)), group).to(x.dtype)


@uncompiled
def sum_over_processes(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of x over the processes, a constant."""
    x = x.detach().clone(memory_format=torch.contiguous_format)  # NCCL wants it, and elements to meet
    dist.all_reduce(x, group=group)
    return x


def sum_of_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of x over the processes, which all of them go on with: its gradient is that of each, see `shared`."""
    return _Summed.apply(x, group)


def shared(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, which all processes have, and each uses for its part of a sum: its gradient is the sum of theirs."""
    return _WithGradient.apply(x, lambda gradient: sum_of_parts(gradient, group))


def with_mean_gradient(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """x, with the mean over the processes of their gradients of x in place of this one's."""
    return _WithGradient.apply(x, lambda gradient: mean_over_processes(gradient, group))


def with_scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times factor."""
    return _WithGradient.apply(x, lambda gradient: gradient * factor)


def check_group(group: Any) -> None:
    """Raises TypeError if group is no ProcessGroup, ValueError if this process has no part in it."""
    if not _initialized():
        raise ValueError(f"group must be None where torch.distributed is not initialised, got {group!r}")
    if not isinstance(group, ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"group must contain this process, got one without process {rank()}")
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


@uncompiled
def check_alike(group: ProcessGroup | None, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError on every process if the tensors differ. One exchange of a few bytes is waited for."""
    device = _meeting_place(next(iter(tensors.values())).device, group)
    mine = b"".join(_describe(t).encode().ljust(_DESCRIPTION) for t in tensors.values())
    table = torch.empty(dist.get_world_size(group) * len(mine), dtype=torch.uint8, device=device)
    all_gather(table, torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device), group)
    everyone = bytes(table.tolist())
    if everyone == mine * dist.get_world_size(group):
        return
    differences = []
    for i, name in enumerate(tensors):
        kinds: dict[str, list[int]] = {}
        for process, start in enumerate(range(i * _DESCRIPTION, len(everyone), len(mine))):
            kinds.setdefault(everyone[start : start + _DESCRIPTION].decode().strip(), []).append(process)
        if len(kinds) > 1:
            on_processes = (f"{kind} on {', '.join(map(str, processes))}" for kind, processes in kinds.items())
            differences.append(f"{name} {' and '.join(on_processes)}")
    raise ValueError(
        f"{' and '.join(tensors)} must have the same shape, dtype, device and requires_grad on every process of group,"
        f" got {'; '.join(differences)}"
    )


def _meeting_place(device: torch.device, group: ProcessGroup | None) -> torch.device:
    """Where the host's numbers are exchanged: on the CPU if the group can, which waits for no GPU, and where they meet
    those of a process whose tensors are elsewhere."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device


def _describe(x: Tensor) -> str:
    requires_grad = torch.is_grad_enabled() and x.requires_grad
    return f"({tuple(x.shape)}, {x.dtype}, {x.device.type}, requires_grad={requires_grad})"[:_DESCRIPTION]


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_gather(output: Tensor, x: Tensor, group: ProcessGroup | None) -> None:
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(output, x, group=group)


def gather_numbers(numbers: list[int], device: torch.device, group: ProcessGroup) -> list[list[int]]:
    """Those of every process, which has as many and tensors on that device. They are waited for."""
    device = _meeting_place(device, group)
    table = torch.empty(group.size() * len(numbers), dtype=torch.int64, device=device)
    all_gather(table, torch.tensor(numbers, dtype=torch.int64, device=device), group)
    return table.view(group.size(), -1).tolist()


class _GatherRows(Function):
    @staticmethod
    def forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
        output = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        all_gather(output, x.contiguous(), group)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _SumRows.apply(grad, ctx.group), None


class _SumRows(Function):
    """The gather's transpose: the sum over processes of this process's part of x."""

    @staticmethod
    def forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
        output = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
        # PyTorch 2.13 renamed it, and the gather.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(output, x.contiguous(), group=group)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _GatherRows.apply(grad, ctx.group), None


class _Summed(Function):
    @staticmethod
    def forward(x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_over_processes(x.contiguous(), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return shared(grad, ctx.group), None


class _Mean(Function):
    @staticmethod
    def forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x / dist.get_world_size(group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Mean.apply(grad, ctx.group), None


class _WithGradient(Function):
    @staticmethod
    def forward(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.change = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.change(grad), None
