"""Data parallelism: the processes of torch.distributed's default group do together what one process does alone.

    views        Each process makes those of its share of the examples, from random numbers of their own: they are those
                 that one process would make.
    networks     Each process has all of them, or its share of some weights (`fastssl.train.fsdp`), and embeds its share
                 of the examples. Batch normalisation is that of the whole batch, see
                 `fastssl.train.networks.batch_norm`.
    loss         Each process takes its share of it, if the method's loss has an argument `group`: rows of other
                 processes pass by in a ring (`fastssl.distributed`). Otherwise the embeddings of all processes are
                 gathered, in the batch's order, and every process takes the loss of the whole batch. All processes see
                 the same numbers, NaN included, and make the same decisions.
    gradients    The mean over the processes. Gathered rows get the gradient of the sum of the processes' losses, that
                 is of as many times the one loss: for the parameters behind them the mean makes the sum of the shares
                 out of that. A parameter of the loss itself, such as a temperature, has the same gradient everywhere.

The first process alone prints, and reads and writes files. With P processes each makes 1 / P of the views and of the
products of networks and of losses that have a group, and holds at most two parts of the batch's embeddings. The whole
batch's are gathered for a queue, and ten times in a run for their health.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastssl.distributed import ProcessGroup, all_processes, gather_rows, mean_over_processes, rank, world_size
from fastssl.train.fsdp import is_sharded
from fastssl.train.networks.batch_norm import synchronize

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=1)


@contextlib.contextmanager
def process_group(device: torch.device = torch.device("cpu")) -> Iterator[None]:  # noqa: B008
    """The default group of the processes that torchrun has started; without torchrun, nothing.

    Tensors of GPUs go by NCCL. What the processes have to agree about lies on the host and goes by Gloo, for which no
    GPU is waited for. They are patient: the first one may have millions of images to read before the others go on, and
    where one dies torchrun ends them all.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_shares(batch_size: int, chunk_size: int | None) -> None:
    """Raises ValueError if the processes cannot have equal shares of a batch, and of each of its chunks, or their group
    cannot exchange what lies on their hosts."""
    processes = world_size()
    if processes > 1 and "cpu:" not in (backends := dist.get_backend_config()):
        raise ValueError(
            "torch.distributed's default group must take tensors of CPUs too, as after"
            f" init_process_group('cpu:gloo,cuda:nccl'), got one of {backends}"
        )
    if batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the number of processes ({processes}), got {batch_size}")
    if chunk_size is not None and processes > 1 and (chunk_size % processes or batch_size % chunk_size):
        raise ValueError(
            f"chunk_size must be a multiple of the number of processes ({processes}) that divides batch_size"
            f" ({batch_size}), got {chunk_size}"
        )


def start_alike(module: nn.Module) -> None:
    """Gives every process the first one's weights and buffers, and synchronises batch normalisation."""
    if world_size() > 1:
        module.load_state_dict(in_first_process(lambda: on_cpu(module.state_dict())))
        synchronize(module)


def share(x: Tensor, chunk_size: int | None = None) -> Tensor:
    """This process's rows of a batch: an equal share of every chunk, or of the whole."""
    processes = world_size()
    if processes == 1:
        return x
    return x.unflatten(0, (-1, processes, (chunk_size or len(x)) // processes))[:, rank()].flatten(0, 1)


def gather(z: Tensor, chunk_size: int | None = None) -> Tensor:
    """The rows of all processes, each computed from what `share` gave it, in the order of the batch."""
    processes = world_size()
    if processes == 1:
        return z
    rows = len(z) if chunk_size is None else chunk_size // processes
    return gather_rows(z).unflatten(0, (processes, -1, rows)).transpose(0, 1).flatten(0, 2)


def group_of(function: Callable[..., Any]) -> ProcessGroup | None:
    """All processes, if there are several and the function takes a group."""
    return all_processes() if "group" in inspect.signature(function).parameters else None


def average_gradients(module: nn.Module, loss: Tensor) -> Tensor:
    """Replaces each gradient by its mean over the processes, in one exchange, and returns that of the loss. Those of
    weights that are shared out are such means already."""
    if world_size() == 1:
        return loss
    tensors = [loss.detach().clone(), *(p.grad for p in module.parameters() if not (p.grad is None or is_sharded(p)))]
    mean = mean_over_processes(torch.cat([x.flatten() for x in tensors]))
    for x, part in zip(tensors, mean.split([x.numel() for x in tensors]), strict=True):
        x.copy_(part.view_as(x))
    return tensors[0]


def on_cpu(state: Any) -> Any:
    """A state_dict whose tensors can be sent to processes, and read on machines, that have other devices."""
    return tree_map_only(Tensor, Tensor.cpu, state)


def highest(number: int) -> int:
    """Of the processes' numbers."""
    return number if world_size() == 1 else int(gather_rows(torch.tensor([number])).max())


def in_first_process(function: Callable[[], T]) -> T:
    """Calls it in the first process; every process returns what it returned, or raises what it raised."""
    if world_size() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def held_by_first_process(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """Enters and leaves it in the first process alone; every process raises what entering has raised."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        in_first_process(enter)
        yield
