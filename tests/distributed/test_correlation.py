"""Barlow Twins and VICReg over several processes: together they compute what one computes on the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastssl
from fastssl.distributed import rank, world_size
from fastssl.functional import barlow_twins, cross_correlation, vicreg
from fastssl.nn import BarlowTwinsLoss, VICRegLoss
from tests.distributed.processes import assert_parts_of, needs_gloo, peer, run_processes

BATCH = 5
# Of up to 20 rows: D x D correlations are the smaller message, or rows are, and then either algorithm runs.
DIMS = (3, 8, 18, 64)

pytestmark = needs_gloo


def _whole(dim: int, batch: int = BATCH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Views that have something in common, and features whose means and deviations differ from process to process."""
    generator = torch.Generator().manual_seed(0)
    common, *own = (torch.randn(world_size() * batch, dim, generator=generator) for _ in range(3))
    shift = torch.arange(world_size()).repeat_interleave(batch)[:, None] / 3
    return [((common + x) * (0.4 + shift) + shift).to(dtype).requires_grad_() for x in own]


def _mine(x: Tensor) -> Tensor:
    batch = len(x) // world_size()
    return x[rank() * batch : (rank() + 1) * batch].detach().requires_grad_()


def _gathered(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts)


def _losses() -> dict[str, Callable[..., Tensor]]:
    paper = dict(invariance_reduction="batchmean", variance_reduction="sum", unbiased=False)
    return {
        "barlow_twins": barlow_twins,
        "algorithm 1": functools.partial(barlow_twins, lambda_param=0.7, eps=0.0, unbiased=True),
        "vicreg": vicreg,
        "vicreg of the paper": functools.partial(
            vicreg, lambda_param=2.0, mu_param=3.0, nu_param=4.0, eps=0.1, **paper
        ),
        "cross_correlation": lambda a, b, **kwargs: cross_correlation(a, b, **kwargs).square().sum(),
    }


def _check_losses() -> None:
    for dtype, backend, tolerance in (
        (torch.float64, "portable", 1e-10),
        (torch.float32, "portable", 2e-4),
        (torch.float32, "auto", 2e-4),
    ):
        for dim in DIMS:
            for loss in _losses().values():
                whole = _whole(dim, dtype=dtype)
                parts = [_mine(x) for x in whole]
                with fastssl.use_backend(backend):
                    value = loss(*parts, group=dist.group.WORLD)
                assert_parts_of(whole, parts, loss(*whole), value, tolerance)
                assert (_gathered(value.reshape(1)) == value).all()


def _check_metrics() -> None:
    for dim in DIMS:
        for name, loss in _losses().items():
            if name == "cross_correlation":
                continue
            whole = _whole(dim)
            expected = loss(*whole, return_metrics=True)[1]
            metrics = loss(*map(_mine, whole), return_metrics=True, group=dist.group.WORLD)[1]
            assert list(metrics) == list(expected)
            for key, value in metrics.items():
                assert value.dtype == torch.float32 and not value.requires_grad
                torch.testing.assert_close(value, expected[key])


def _check_one_row_each() -> None:
    """Of which a process alone has no variance."""
    for dim in (1, 2, 3, 16):
        for loss in (barlow_twins, vicreg):
            whole = _whole(dim, batch=1)
            parts = [_mine(x) for x in whole]
            value = loss(*parts, eps=0.1, group=dist.group.WORLD)
            assert_parts_of(whole, parts, loss(*whole, eps=0.1), value, 1e-10)


def _check_constant_columns() -> None:
    """Exactly uncorrelated, also where they are the same on all processes and far from 0."""
    for dim in (4, 64):
        whole = _whole(dim, dtype=torch.float32)
        for z in whole:
            z.data[:, 1] = 1000.1
        C = cross_correlation(*map(_mine, whole), group=dist.group.WORLD)
        assert C[1].abs().max() < 1e-6 and C[:, 1].abs().max() < 1e-6
        for loss in (barlow_twins, vicreg):
            torch.testing.assert_close(loss(*map(_mine, whole), group=dist.group.WORLD), loss(*whole))


def _check_half_precision() -> None:
    for dim in (4, 64):
        for loss in (barlow_twins, vicreg):
            whole = _whole(dim, dtype=torch.bfloat16)
            parts = [_mine(x) for x in whole]
            whole = [x.detach().float().requires_grad_() for x in whole]
            value = loss(*parts, group=dist.group.WORLD)
            assert value.dtype == torch.bfloat16
            torch.testing.assert_close(value.float(), loss(*whole).detach(), rtol=1e-2, atol=0)
            for part, x in zip(
                torch.autograd.grad(value, parts), torch.autograd.grad(loss(*whole), whole), strict=True
            ):
                assert part.dtype == torch.bfloat16
                expected = world_size() * _mine(x).detach()
                torch.testing.assert_close(part.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(*(_mine(x) for x in whole), group=dist.group.WORLD)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, loss(*whole), rtol=1e-2, atol=0)


def _check_products_under_autocast() -> None:
    """Those of exchanged correlations are in the dtype of sums."""
    parts = [_mine(x) for x in _whole(4, dtype=torch.float32)]
    for loss in (barlow_twins, vicreg, cross_correlation, BarlowTwinsLoss(gather_distributed=True)):
        group = {} if isinstance(loss, nn.Module) else {"group": dist.group.WORLD}
        expected = loss(*parts, **group)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(*parts, **group), expected)


def _check_one_view_differentiable() -> None:
    for dim in (4, 64):
        for loss in (barlow_twins, vicreg):
            whole = _whole(dim)
            whole[1] = whole[1].detach()
            parts = [_mine(whole[0]), _mine(whole[1]).detach()]
            assert_parts_of(whole[:1], parts[:1], loss(*whole), loss(*parts, group=dist.group.WORLD), 1e-10)


def _model(dim: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, dim)).double()


def _check_data_parallel_model() -> None:
    """With functions of a group, and lightly's meaning of VICReg: the gradients of one process on the whole batch."""
    images = [x.detach() for x in _whole(6)]
    group = {"group": dist.group.WORLD}
    for dim in (4, 64):
        for whole, part in (
            (barlow_twins, functools.partial(barlow_twins, **group)),
            (vicreg, functools.partial(vicreg, **group)),
            (VICRegLoss(), VICRegLoss(gather_distributed=True)),
        ):
            single, parallel = _model(dim), DistributedDataParallel(_model(dim))
            whole(*(single(x) for x in images)).backward()
            part(*(parallel(_mine(x)) for x in images)).backward()
            for ours, expected in zip(parallel.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-8, atol=1e-10)


def _barlow_twins_of_local_statistics(whole: list[Tensor], lambda_param: float) -> Tensor:
    """What lightly's flag says, in one process that has the rows of all."""
    views = []
    for z in whole:
        parts = z.chunk(world_size())
        views.append(torch.cat([(x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in parts]))
    C = views[0].T @ views[1] / len(views[0])
    eye = torch.eye(len(C), dtype=C.dtype)
    weight = eye + lambda_param * (1 - eye)
    return ((C - eye).square() * weight).sum()


def _check_modules() -> None:
    """lightly's classes where they are, and what their flag says."""
    lightly = peer("lightly")
    for dim in DIMS:
        whole = _whole(dim)
        parts = [_mine(x) for x in whole]
        value = BarlowTwinsLoss(0.3, gather_distributed=True)(*parts)
        assert_parts_of(whole, parts, _barlow_twins_of_local_statistics(whole, 0.3), value, 1e-10)
        assert_parts_of(whole, parts, VICRegLoss()(*whole), VICRegLoss(gather_distributed=True)(*parts), 1e-10)
        for name in ("BarlowTwinsLoss", "VICRegLoss") if lightly is not None else ():
            values = [getattr(m, name)(gather_distributed=True)(*parts) for m in (fastssl.nn, lightly)]
            torch.testing.assert_close(*values)
            for x, y in zip(*(torch.autograd.grad(v, parts) for v in values), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def _check_positions() -> None:
    """Of feature maps."""
    if (lightly := peer("lightly")) is None:
        return
    parts = [_mine(x).detach().view(BATCH, 3, 4).requires_grad_() for x in _whole(12)]
    values = [module.VICRegLoss(gather_distributed=True)(*parts) for module in (fastssl.nn, lightly)]
    torch.testing.assert_close(*values)
    for x, y in zip(*(torch.autograd.grad(v, parts) for v in values), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def _check_subgroups() -> None:
    """The processes of even and of odd ranks."""
    half = world_size() // 2
    groups = [dist.new_group(list(range(parity, 2 * half, 2))) for parity in (0, 1)]
    if rank() < 2 * half:
        place = rank() // 2
        for dim in (4, 64):
            for loss in (barlow_twins, vicreg):
                whole = [x[: half * BATCH].detach() for x in _whole(dim)]
                parts = [x[place * BATCH : (place + 1) * BATCH] for x in whole]
                torch.testing.assert_close(loss(*parts, group=groups[rank() % 2]), loss(*whole))


def _check_unlike_processes_are_refused() -> None:
    group, last = dist.group.WORLD, rank() == world_size() - 1
    for dim in (4, 64):
        x, y = (_mine(x) for x in _whole(dim))
        for loss in (barlow_twins, vicreg, cross_correlation):
            with pytest.raises(ValueError, match=rf"same shape.*on every process.*\({BATCH}, {dim}\).*\({BATCH - 1}, "):
                loss(x[: BATCH - last], y[: BATCH - last], group=group)
            with pytest.raises(ValueError, match="requires_grad on every process"):
                loss(x.detach() if last else x, y, group=group)
            with pytest.raises(ValueError, match=rf"z_a must have at least 2 rows, got shape \(0, {dim}\)"):
                loss(x[:0], y[:0], group=group)
        for module in (BarlowTwinsLoss(gather_distributed=True), VICRegLoss(gather_distributed=True)):
            with pytest.raises(ValueError, match="same shape.*on every process"):
                module(x[: BATCH - last], y[: BATCH - last])
    with pytest.raises(ValueError, match=r"z_a must have at least 2 rows, got shape \(1, 64\)"):
        BarlowTwinsLoss(gather_distributed=True)(x[:1], y[:1])
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup or None, got int"):
        barlow_twins(x, y, group=3)
    with pytest.raises(ValueError, match="group must be None with the backend 'reference'"):
        with fastssl.use_backend("reference"):
            vicreg(x, y, group=group)


def _check_the_smaller_message() -> None:
    """No process holds D x D correlations where the rows are fewer, nor all rows where features are."""
    for dim, batch in ((1024, 8), (8, 512)):
        parts = [_mine(x) for x in _whole(dim, batch, torch.float32)]
        limit = 4 * dim**2 / 2 if dim > batch else 1.5 * parts[0].nbytes
        for loss in (barlow_twins, vicreg, BarlowTwinsLoss(gather_distributed=True)):
            group = {} if isinstance(loss, nn.Module) else {"group": dist.group.WORLD}
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
                loss(*parts, **group).backward()
            largest = max(event.self_cpu_memory_usage for event in profile.events())
            assert largest < limit, (loss, dim, batch, largest)


def _check_compiled() -> None:
    for loss, dim in ((barlow_twins, 4), (vicreg, 64)):
        parts = [_mine(x) for x in _whole(dim)]
        pairs = [f(*parts, group=dist.group.WORLD) for f in (loss, torch.compile(loss, backend="aot_eager"))]
        torch.testing.assert_close(*pairs)
        for x, y in zip(*(torch.autograd.grad(v, parts) for v in pairs), strict=True):
            torch.testing.assert_close(x, y)


def _check_everything() -> None:
    for check in (
        _check_losses,
        _check_metrics,
        _check_one_row_each,
        _check_constant_columns,
        _check_half_precision,
        _check_products_under_autocast,
        _check_one_view_differentiable,
        _check_data_parallel_model,
        _check_modules,
        _check_positions,
        _check_subgroups,
        _check_unlike_processes_are_refused,
        _check_the_smaller_message,
        *((_check_compiled,) if world_size() == 2 else ()),  # which takes long
    ):
        check()


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_equal_one(processes, tmp_path):
    run_processes(_check_everything, processes, tmp_path)
