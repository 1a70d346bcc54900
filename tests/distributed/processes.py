"""What tests of several processes on one machine share: how they run, and parts of a whole batch."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ops import peers
from fastssl.distributed import rank, world_size
from tests.distributed import nccl

BATCH, DIM, SECONDS = 6, 8, 240

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")


def _process(index: int, processes: int, file: str, check: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    nccl.imitate()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=index,
        world_size=processes,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    try:
        check()
    finally:
        dist.destroy_process_group()


def run_processes(check, processes: int, tmp_path) -> None:
    """`check` in each of several processes, which take what NCCL would; the first failure ends them all, and so does
    silence."""
    # They are forked from a process that has imported what they need, and done nothing else.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["fastssl", __name__])
    context = torch.multiprocessing.start_processes(
        _process,
        (processes, str(tmp_path / "rendezvous"), check),
        nprocs=processes,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes did not finish within {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()


def all_views(steps: int = 1, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (world_size() * BATCH, DIM)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)) for _ in range(steps)]


def own_rows(x: torch.Tensor) -> torch.Tensor:
    return x[rank() * BATCH : (rank() + 1) * BATCH].detach().requires_grad_()


def mean_of_all(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


def peer(name: str) -> ModuleType | None:
    try:
        return getattr(peers, name)()
    except ImportError:
        return None


def assert_parts_of(whole: list[Tensor], parts: list[Tensor], expected: Tensor, value: Tensor, rtol: float) -> None:
    """That the mean of the processes' values is the expected one, and their gradients make up the whole's.

    Of what is as long as the batch a process has its rows, and the gradient of the sum of all values; of other things
    each has a share of that. An error is relative to the largest element.
    """
    torch.testing.assert_close(mean_of_all(value), expected.detach(), rtol=rtol, atol=rtol)
    ours = torch.autograd.grad(value, parts)
    for x, part, gradient in zip(torch.autograd.grad(expected, whole), ours, parts, strict=True):
        assert part.dtype == gradient.dtype and part.shape == gradient.shape
        if part.shape != x.shape:
            part, x, size = part / world_size(), x[rank() * len(part) :][: len(part)], x.abs().max().item()
        else:
            part, size = mean_of_all(part), x.abs().max().item()
        torch.testing.assert_close(part, x, rtol=0, atol=rtol * size)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 1e-11


def check_all(checks: Sequence[Callable[[], None]]) -> None:
    for check in checks:
        check()


def assert_empty_mean(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Of a batch without rows: NaN, and no gradients."""
    x, y = (torch.zeros(0, DIM, requires_grad=True) for _ in range(2))
    value = loss(x, y)
    assert value.shape == () and value.isnan()
    value.backward()
    assert x.grad.shape == (0, DIM)
