"""What gathers the rows of all processes computes what one process computes on the whole batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastssl
from fastssl.distributed import gather_rows, rank, world_size
from fastssl.nn import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    InfoNCELoss,
    MemoryBank,
    MemoryBankModule,
    NTXentLoss,
    VICRegLoss,
)
from tests.distributed.processes import (
    BATCH,
    DIM,
    all_views,
    assert_empty_mean,
    assert_parts_of,
    check_all,
    mean_of_all,
    needs_gloo,
    own_rows,
    peer,
    run_processes,
)

pytestmark = needs_gloo


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
        ((out0, out1),) = all_views()
        whole = out0.double().requires_grad_(), out1.double().requires_grad_()
        expected = NTXentLoss(temperature)(*whole)
        gradients = torch.autograd.grad(expected, whole)
        for module in filter(None, (fastssl.nn, peer("lightly"))):
            parts = own_rows(out0), own_rows(out1)
            value = module.NTXentLoss(temperature, gather_distributed=True)(*parts)
            torch.testing.assert_close(mean_of_all(value).double(), expected.detach(), rtol=1e-5, atol=1e-6)
            for part, gradient in zip(torch.autograd.grad(value, parts), gradients, strict=True):
                torch.testing.assert_close(
                    part.double(), world_size() * own_rows(gradient).detach(), rtol=1e-4, atol=1e-6 / temperature
                )


def _check_data_parallel_model() -> None:
    (images,) = all_views()
    single, parallel = _model(), DistributedDataParallel(_model())
    whole = NTXentLoss()(*(single(x) for x in images))
    whole.backward()
    part = NTXentLoss(gather_distributed=True)(*(parallel(own_rows(x)) for x in images))
    part.backward()
    torch.testing.assert_close(mean_of_all(part), whole.detach())
    for ours, expected in zip(parallel.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-7)


def _check_memory_bank() -> None:
    """Every process holds the queue that one process would, and lightly's would; it wraps around on the way."""
    size = (world_size() * BATCH * 2 + 1, DIM)
    torch.manual_seed(3)
    single = NTXentLoss(0.2, size)
    losses = []
    for module in filter(None, (fastssl.nn, peer("lightly"))):
        torch.manual_seed(3)
        losses.append(module.NTXentLoss(0.2, size, gather_distributed=True))
    for out0, out1 in all_views(steps=4):
        whole = out0.clone().requires_grad_(), out1.clone().requires_grad_()
        expected = single(*whole)
        gradients = torch.autograd.grad(expected, whole)
        for loss in losses:
            parts = own_rows(out0), own_rows(out1)
            value = loss(*parts)
            torch.testing.assert_close(mean_of_all(value), expected.detach())
            for part, gradient in zip(torch.autograd.grad(value, parts), gradients, strict=True):
                torch.testing.assert_close(part, world_size() * own_rows(gradient).detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(loss.memory_bank.bank, single.memory_bank.bank)
            assert torch.equal(loss.memory_bank.bank_ptr, single.memory_bank.bank_ptr)


def _check_bfloat16() -> None:
    ((out0, out1),) = all_views(dtype=torch.bfloat16)
    parts = own_rows(out0), own_rows(out1)
    value = NTXentLoss(gather_distributed=True)(*parts)
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(mean_of_all(value.float()), NTXentLoss()(out0.float(), out1.float()), rtol=1e-2, atol=0)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in torch.autograd.grad(value, parts))


def _check_compiled() -> None:
    ((out0, out1),) = all_views()
    loss, parts = NTXentLoss(gather_distributed=True), (own_rows(out0), own_rows(out1))
    compiled = torch.compile(loss, backend="aot_eager")
    for x, y in zip(
        (compiled(*parts), *torch.autograd.grad(compiled(*parts), parts)),
        (loss(*parts), *torch.autograd.grad(loss(*parts), parts)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def _check_dcl() -> None:
    """Against one process, and lightly's classes where they are; it weighs within a process."""
    losses = [(DCLLoss, 0.1), (DCLLoss, 0.5)]
    for loss, temperature in losses:
        whole = [x.requires_grad_() for x in all_views()[0]]
        parts = [own_rows(x) for x in whole]
        scale = torch.tensor(temperature, requires_grad=True)
        expected, value = loss(scale)(*whole), loss(scale, gather_distributed=True)(*parts)
        assert_parts_of([*whole, scale], [*parts, scale], expected, value, 1e-4)
    if (theirs := peer("lightly")) is None:
        return
    for name, args in (("DCLLoss", (0.2, lambda x, y: (x * y).exp().sum(1) + x[:, 0])), ("DCLWLoss", (0.2, 0.7))):
        values = [getattr(module, name)(*args, gather_distributed=True)(*parts) for module in (fastssl.nn, theirs)]
        torch.testing.assert_close(*values)
        for x, y in zip(*(torch.autograd.grad(v, parts) for v in values), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert DCLWLoss(gather_distributed=True)(*parts).isfinite()


def _check_queue_of_all_processes() -> None:
    """Every process holds the queue that one process would."""
    size = world_size() * BATCH + 1
    torch.manual_seed(3)
    single = MemoryBank(size, DIM)
    torch.manual_seed(3)
    bank = MemoryBank(size, DIM, gather_distributed=True)
    for _, keys in all_views(steps=3):
        single.update(keys)
        bank.update(own_rows(keys))
        assert torch.equal(bank.keys, single.keys) and bank.position == single.position


def _check_unlike_rows_are_not_gathered() -> None:
    """ValueError on every process, and queues as they were."""
    x, y = (own_rows(x) for x in all_views()[0])
    last = rank() == world_size() - 1
    unlike = {
        "rows": (x[: BATCH - last], y[: BATCH - last]),
        "no rows": (x[last * BATCH :], y[last * BATCH :]),
        "features": (x[:, : DIM - last], y[:, : DIM - last]),
        "dimensions": (x[None], y[None]) if last else (x, y),
        "dtype": (x.bfloat16(), y.bfloat16()) if last else (x, y),
        "device": (x.to("meta"), y.to("meta")) if last else (x, y),
        "requires_grad": (x.detach(), y.detach()) if last else (x, y),
    }
    queue = (4 * world_size() * BATCH, DIM)
    losses = [NTXentLoss(gather_distributed=True), NTXentLoss(0.5, queue, gather_distributed=True)]
    losses += [DCLLoss(gather_distributed=True), BarlowTwinsLoss(gather_distributed=True)]
    losses += [VICRegLoss(gather_distributed=True), InfoNCELoss(group=dist.group.WORLD)]
    banks = [MemoryBank(*queue, gather_distributed=True), MemoryBankModule(queue, gather_distributed=True)]
    banks.append(losses[1].memory_bank)
    before = [{name: buffer.clone() for name, buffer in bank.named_buffers()} for bank in banks]
    for difference, views in unlike.items():
        for loss in losses:
            # The arguments of a process are looked at before those of all.
            if difference != "dimensions" or isinstance(loss, VICRegLoss):
                with pytest.raises(ValueError, match=r"must have the same shape, dtype.* on every process of group"):
                    loss(*views)
        for bank in banks:
            if difference != "requires_grad":  # which a queue does not ask for
                with pytest.raises(ValueError, match=r"must have the same shape, dtype.* on every process of group"):
                    bank.update(views[1])
        for bank, buffers in zip(banks, before, strict=True):
            assert all(torch.equal(buffer, buffers[name]) for name, buffer in bank.named_buffers())
    with pytest.raises(ValueError, match=rf"got keys \(\({BATCH}, 8\), torch.float32, cpu, requires_grad=False\) on 0"):
        banks[0].update(unlike["rows"][1])
    positions = [x[:, None].expand(-1, 2 + last, -1) for x in (x, y)]
    with pytest.raises(ValueError, match="on every process of group"):
        VICRegLoss(gather_distributed=True)(*positions)


def _check_empty_batches() -> None:
    for loss in (NTXentLoss(gather_distributed=True), DCLLoss(gather_distributed=True)):
        assert_empty_mean(loss)
    for bank in (MemoryBank(8, DIM, gather_distributed=True), MemoryBankModule((8, DIM), gather_distributed=True)):
        before = next(bank.buffers()).clone()
        bank.update(torch.zeros(0, DIM))
        assert torch.equal(next(bank.buffers()), before)


CHECKS = (
    _check_gather,
    _check_loss_and_gradients,
    _check_data_parallel_model,
    _check_memory_bank,
    _check_bfloat16,
    _check_compiled,
    _check_dcl,
    _check_queue_of_all_processes,
    _check_unlike_rows_are_not_gathered,
    _check_empty_batches,
)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_equal_one(processes, tmp_path):
    run_processes(partial(check_all, CHECKS), processes, tmp_path)


def test_one_process_without_a_group():
    assert (rank(), world_size()) == (0, 1)
    views = torch.randn(4, 8), torch.randn(4, 8)
    assert torch.equal(NTXentLoss(gather_distributed=True)(*views), NTXentLoss()(*views))
