"""Several processes on one machine: together they compute what one process computes on the whole batch."""

from __future__ import annotations

import datetime
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import gather_rows, rank, world_size
from fastssl.nn import NTXentLoss

BATCH, DIM, SECONDS = 6, 8, 120

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")


def _process(index: int, processes: int, file: str, check) -> None:
    torch.set_num_threads(1)
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


def _run(check, processes: int, tmp_path) -> None:
    """`check` in each of several processes; the first failure ends them all, and so does silence."""
    context = torch.multiprocessing.spawn(
        _process, (processes, str(tmp_path / "rendezvous"), check), nprocs=processes, join=False
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes did not finish within {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()


def _all_views(steps: int = 1, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (world_size() * BATCH, DIM)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)) for _ in range(steps)]


def _mine(x: torch.Tensor) -> torch.Tensor:
    return x[rank() * BATCH : (rank() + 1) * BATCH].detach().requires_grad_()


def _mean(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


def _lightly():
    from peers import lightly_nt_xent_loss

    return lightly_nt_xent_loss()


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, 16), nn.Tanh(), nn.Linear(16, DIM))


def _check_gather() -> None:
    x = torch.full((2, 3), float(rank()), requires_grad=True)
    rows = gather_rows(x)
    assert rows[:, 0].tolist() == [r for r in range(world_size()) for _ in range(2)]
    weight = torch.arange(rows.numel()).view_as(rows).float() * (rank() + 1)
    (gradient,) = torch.autograd.grad((rows**2 * weight).sum(), x, create_graph=True)
    mine = torch.arange(rows.numel()).view_as(rows)[2 * rank() : 2 * rank() + 2] * sum(range(1, world_size() + 1))
    torch.testing.assert_close(gradient, 2 * x * mine)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 2.0 * mine)


def _check_loss_and_gradients() -> None:
    """Of the rows: the sum over processes; with lightly's class beside."""
    for temperature in (0.5, 0.05):
        ((out0, out1),) = _all_views()
        whole = out0.double().requires_grad_(), out1.double().requires_grad_()
        expected = NTXentLoss(temperature)(*whole)
        gradients = torch.autograd.grad(expected, whole)
        losses = [NTXentLoss]
        try:
            losses.append(_lightly())
        except ImportError:
            pass
        for loss in losses:
            parts = _mine(out0), _mine(out1)
            value = loss(temperature, gather_distributed=True)(*parts)
            torch.testing.assert_close(_mean(value).double(), expected.detach(), rtol=1e-5, atol=1e-6)
            for part, gradient in zip(torch.autograd.grad(value, parts), gradients, strict=True):
                torch.testing.assert_close(
                    part.double(), world_size() * _mine(gradient).detach(), rtol=1e-4, atol=1e-6 / temperature
                )


def _check_data_parallel_model() -> None:
    (images,) = _all_views()
    single, parallel = _model(), DistributedDataParallel(_model())
    whole = NTXentLoss()(*(single(x) for x in images))
    whole.backward()
    part = NTXentLoss(gather_distributed=True)(*(parallel(_mine(x)) for x in images))
    part.backward()
    torch.testing.assert_close(_mean(part), whole.detach())
    for ours, expected in zip(parallel.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-7)


def _check_memory_bank() -> None:
    """Every process holds the queue that one process would, and lightly's would; it wraps around on the way."""
    size = (world_size() * BATCH * 2 + 1, DIM)
    torch.manual_seed(3)
    single = NTXentLoss(0.2, size)
    losses = {}
    for name, loss in (("ours", NTXentLoss), ("lightly", None)):
        try:
            torch.manual_seed(3)
            losses[name] = (loss or _lightly())(0.2, size, gather_distributed=True)
        except ImportError:
            pass
    for out0, out1 in _all_views(steps=4):
        whole = out0.clone().requires_grad_(), out1.clone().requires_grad_()
        expected = single(*whole)
        gradients = torch.autograd.grad(expected, whole)
        for loss in losses.values():
            parts = _mine(out0), _mine(out1)
            value = loss(*parts)
            torch.testing.assert_close(_mean(value), expected.detach())
            for part, gradient in zip(torch.autograd.grad(value, parts), gradients, strict=True):
                torch.testing.assert_close(part, world_size() * _mine(gradient).detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(loss.memory_bank.bank, single.memory_bank.bank)
            assert torch.equal(loss.memory_bank.bank_ptr, single.memory_bank.bank_ptr)


def _check_bfloat16() -> None:
    ((out0, out1),) = _all_views(dtype=torch.bfloat16)
    parts = _mine(out0), _mine(out1)
    value = NTXentLoss(gather_distributed=True)(*parts)
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(_mean(value.float()), NTXentLoss()(out0.float(), out1.float()), rtol=1e-2, atol=0)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in torch.autograd.grad(value, parts))


def _check_compiled() -> None:
    ((out0, out1),) = _all_views()
    loss, parts = NTXentLoss(gather_distributed=True), (_mine(out0), _mine(out1))
    compiled = torch.compile(loss, backend="aot_eager")
    for x, y in zip(
        (compiled(*parts), *torch.autograd.grad(compiled(*parts), parts)),
        (loss(*parts), *torch.autograd.grad(loss(*parts), parts)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def _check_everything() -> None:
    _check_gather()
    _check_loss_and_gradients()
    _check_data_parallel_model()
    _check_memory_bank()
    _check_bfloat16()
    _check_compiled()


def _check_that_fails() -> None:
    assert rank() != 1, "as it should"
    gather_rows(torch.ones(1, 1))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_equal_one(processes, tmp_path):
    _run(_check_everything, processes, tmp_path)


def test_a_process_that_dies_ends_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(Exception, match="as it should|Process 0 terminated"):  # whichever is heard of first
        _run(_check_that_fails, 2, tmp_path)
    assert time.monotonic() - start < SECONDS / 2


def test_one_process_without_a_group():
    assert (rank(), world_size()) == (0, 1)
    views = torch.randn(4, 8), torch.randn(4, 8)
    assert torch.equal(NTXentLoss(gather_distributed=True)(*views), NTXentLoss()(*views))
