"""How much memory a batch takes, and the largest batch that fits into a budget: each measured in a process of its own.

That process may take at most three quarters of the memory that the machine has left (Linux's RLIMIT_DATA): beyond that
its allocations fail, and the result is "more than that".
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.twins.agreement import running
from fastssl._meter import Meter, available_memory, own_memory
from fastssl.train import METHODS, Method, Run, create, fit

SMALLEST = 256
_SHARE = 0.75  # of the memory left


@dataclass(frozen=True)
class Memory:
    """Peak extra bytes of the work on a batch; infinite where it ran out of memory."""

    batch_size: int
    bytes: float


def largest_batch(
    name: str, method: Method, embeddings: Sequence[Tensor], budget: float, largest: int
) -> tuple[list[Memory], float]:
    """A method's loss, forward and backward, on twice as many rows each time, until it takes more than `budget` bytes.

    Args:
        embeddings: of a batch, which are repeated to make larger ones.
        largest: the last batch to try.

    Returns:
        Every batch that was measured, the last of which took too much unless it is `largest`; and the limit in bytes
        under which they were.
    """
    sample = [(z.detach(), z.requires_grad) for z in embeddings]
    return _alone(_grow, name, method.impl, dict(method.options), sample, budget, largest)


def training_step(
    name: str, impl: str, batch_size: int, chunk_size: int, data: str | None, seed: int
) -> tuple[Memory, float]:
    """The second step of `python -m fastssl.train`, by chunks; and the limit in bytes under which it was taken."""
    return _alone(_train, name, impl, batch_size, chunk_size, data, seed)


def _alone(task: Callable[..., Any], *arguments: Any) -> Any:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(task, *arguments).result()


def _limit() -> float:
    """Limit this process, and return by how much."""
    if sys.platform != "linux":
        return math.nan
    import resource

    used, more = own_memory("VmData"), int(_SHARE * available_memory())
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, used + more))
    return more


def _grow(
    name: str, impl: str, options: dict[str, Any], sample: Sequence[tuple[Tensor, bool]], budget: float, largest: int
) -> tuple[list[Memory], float]:
    method, limit = METHODS[name](**options), _limit()
    method.impl = impl

    def once(rows: int) -> int | None:
        own = torch.arange(rows)
        embeddings = [z[own % len(z)].requires_grad_(grad) for z, grad in sample]
        with Meter(memory=True) as meter, running(method):
            method.loss(*embeddings).backward()
        return meter.extra

    _bytes(once, min(SMALLEST, largest))  # libraries and threads
    found = []
    for batch_size in sizes(largest):
        found.append(Memory(batch_size, _bytes(once, batch_size)))
        if not found[-1].bytes <= budget:
            break
    return found, limit


def _train(name: str, impl: str, batch_size: int, chunk_size: int, data: str | None, seed: int) -> tuple[Memory, float]:
    torch.manual_seed(seed)
    dataset = METHODS[name].load(data)
    examples, method = METHODS[name].training_data(dataset), create(name, 2, dataset)
    method.impl, limit = impl, _limit()
    run = Run(batch_size=batch_size, chunk_size=chunk_size, steps=2, seed=seed)

    def second_step() -> int | None:
        history = fit({impl: method}, examples, run, console=Console(quiet=True))
        return history[impl][1].peak_bytes

    return Memory(batch_size, _bytes(second_step)), limit


def _bytes(measured: Callable[..., int | None], *arguments: Any) -> float:
    """What it returns; NaN for None, infinite if it runs out of memory."""
    try:
        found = measured(*arguments)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return math.inf
    return math.nan if found is None else found


def sizes(largest: int) -> list[int]:
    """`SMALLEST`, doubled each time, up to `largest`, which is the last."""
    doubled = [SMALLEST << i for i in range(32) if SMALLEST << i < largest]
    return [*doubled, largest]
