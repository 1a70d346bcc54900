"""Losses of images and texts in a ring: several processes compute what one computes on the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastssl
from fastssl import distributed
from fastssl._arithmetic import dot
from fastssl.distributed import Ring, gather_rows, rank, world_size
from fastssl.functional import barlow_twins, clip_loss, dcl, info_nce, nt_xent, siglip_loss, sup_con, vicreg
from fastssl.nn import (
    ClipLoss,
    SigLipLoss,
)
from tests.distributed.processes import (
    BATCH,
    DIM,
    all_views,
    assert_empty_mean,
    assert_parts_of,
    check_all,
    mean_of_all,
    own_rows,
    peer,
    run_processes,
    tolerance,
)


def _softmax_losses() -> dict[str, Callable[..., Tensor]]:
    def smoothed_clip(x, y, scale, **kwargs):
        return clip_loss(x, y, scale, label_smoothing=0.1, **kwargs)

    def nce(x, y, scale, **kwargs):
        return info_nce(x, y, temperature=1 / scale, **kwargs)

    def symmetric_nce(x, y, scale, **kwargs):
        return nce(x, y, scale, symmetric=True, **kwargs)

    def plain_nce(x, y, scale, **kwargs):
        return nce(x, y, scale, normalize=False, label_smoothing=0.2, **kwargs)

    def labelled_clip(x, y, scale, **kwargs):
        return clip_loss(x, y, scale, labels=_labels(x, kwargs.get("group")), label_smoothing=0.1, **kwargs)

    losses = (clip_loss, smoothed_clip, labelled_clip, nce, symmetric_nce, plain_nce, *_losses_of_both_views())
    return {f.__name__: f for f in losses}


def _losses_of_both_views() -> tuple[Callable[..., Tensor], ...]:
    """Those in which each row of either view has a loss, of which these have the mean."""

    def of_pairs(losses: Tensor, reduction: str) -> Tensor:
        return losses.view(2, -1).mean(0) if reduction == "none" else losses / 2 if reduction == "sum" else losses

    def xent(x, y, scale, reduction="mean", **kwargs):
        return of_pairs(nt_xent(x, y, temperature=1 / scale, reduction=reduction, **kwargs), reduction)

    def plain_dcl(x, y, scale, reduction="mean", **kwargs):
        options = {"weight_fn": lambda x, y: 1 + dot(x, y).square(), "normalize": False}
        return of_pairs(dcl(x, y, temperature=1 / scale, reduction=reduction, **options, **kwargs), reduction)

    def supervised(x, y, scale, reduction="mean", group=None):
        features = torch.stack([x, y], 1)
        losses = sup_con(features, _labels(x, group), temperature=1 / scale, reduction=reduction, group=group)
        return of_pairs(losses.T.flatten() if reduction == "none" else losses, reduction)

    return xent, plain_dcl, supervised


def _labels(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Of the rows of this process, three in the whole batch: few of a process's own rows have any of them."""
    first = 0 if group is None else group.rank() * len(x)
    return torch.arange(first, first + len(x)) % 3 * 10


def _check_ring() -> None:
    """Of every loss that has a group: values, gradients of features, scale and bias."""
    group, losses = dist.group.WORLD, {**_softmax_losses(), "siglip_loss": siglip_loss}
    for dtype in (torch.float32, torch.float64):
        for name, loss in losses.items():
            # The larger, the more a row's largest similarities differ from process to process, by hundreds.
            for size in (1.0, 6.0) if name != "siglip_loss" else (1.0,):
                for backend in ("auto", "portable"):
                    whole = [(size * x).requires_grad_() for x in all_views(dtype=dtype)[0]]
                    parts = [own_rows(x) for x in whole]
                    scalars = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (2.0, -3.0)]
                    scalars = scalars if name == "siglip_loss" else scalars[:1]
                    with fastssl.use_backend(backend):
                        value = loss(*parts, *scalars, group=group)
                    expected = loss(*whole, *scalars)
                    assert_parts_of([*whole, *scalars], [*parts, *scalars], expected, value, tolerance(dtype))


def _check_ring_of_one_row_each() -> None:
    """A process by itself has no negatives; and these are so unlike the rows that 0 were a bad maximum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(world_size(), DIM, generator=generator) + 1
    y = -30 * (torch.rand(world_size(), DIM, generator=generator) + 1)
    for loss in _softmax_losses().values():
        whole = [t.clone().requires_grad_() for t in (x, y)]
        parts = [t[rank() : rank() + 1].clone().requires_grad_() for t in (x, y)]
        value, expected = loss(*parts, 2.0, group=dist.group.WORLD), loss(*whole, 2.0)
        assert_parts_of(whole, parts, expected, value, 1e-4)


def _check_unequal_gradients() -> None:
    """Each process multiplies its loss by a number of its own."""
    weights = torch.arange(1.0, world_size() + 1, dtype=torch.float64)
    for name, loss in {**_softmax_losses(), "siglip_loss": siglip_loss}.items():
        whole = [x.requires_grad_() for x in all_views(dtype=torch.float64)[0]]
        scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -3.0)]
        parts = [own_rows(x) for x in whole]
        if name == "siglip_loss":
            logits = whole[0] @ whole[1].T * scalars[0] + scalars[1]
            losses = -F.logsigmoid(logits * (2 * torch.eye(len(logits)) - 1)).sum(1)
        else:
            scalars = scalars[:1]
            losses = loss(*whole, *scalars, reduction="none")
        expected = (losses.view(-1, BATCH).mean(1) * weights).mean()
        value = loss(*parts, *scalars, group=dist.group.WORLD) * weights[rank()]
        assert_parts_of([*whole, *scalars], [*parts, *scalars], expected, value, tolerance(torch.float64))


def _check_reductions() -> None:
    for name, loss in _softmax_losses().items():
        whole = [x.requires_grad_() for x in all_views()[0]]
        parts = [own_rows(x) for x in whole]
        each = loss(*parts, 2.0, group=dist.group.WORLD, reduction="none")
        torch.testing.assert_close(each, own_rows(loss(*whole, 2.0, reduction="none").detach()), msg=name)
        total = loss(*parts, 2.0, group=dist.group.WORLD, reduction="sum")
        expected = loss(*whole, 2.0, reduction="sum")
        torch.testing.assert_close(mean_of_all(total) * world_size(), expected.detach())
        for part, x in zip(torch.autograd.grad(total, parts), torch.autograd.grad(expected, whole), strict=True):
            torch.testing.assert_close(part, own_rows(x).detach(), rtol=1e-4, atol=1e-5)


def _check_constants() -> None:
    """Features of one side, or the scale, without gradient: those of a frozen tower, or of a momentum encoder."""
    for name, loss in {**_softmax_losses(), "siglip_loss": siglip_loss}.items():
        scalars = [2.0, -3.0] if name == "siglip_loss" else [2.0]
        for constant in (0, 1):
            whole = [x.requires_grad_() for x in all_views()[0]]
            parts = [own_rows(x) for x in whole]
            learned = 1 - constant
            whole[constant], parts[constant] = whole[constant].detach(), parts[constant].detach()
            assert_parts_of(
                [whole[learned]],
                [parts[learned]],
                loss(*whole, *scalars),
                loss(*parts, *scalars, group=dist.group.WORLD),
                tolerance(torch.float32),
            )
        scale = torch.tensor(2.0, requires_grad=True)
        expected = loss(*(x.detach() for x in whole), scale, *scalars[1:])
        value = loss(*(x.detach() for x in parts), scale, *scalars[1:], group=dist.group.WORLD)
        assert_parts_of([scale], [scale], expected, value, tolerance(torch.float32))


def _check_queue() -> None:
    """Negatives that stay where they are, beside those of the batch."""
    generator = torch.Generator().manual_seed(7)
    for mode in ("unpaired", "paired"):
        whole = [x.requires_grad_() for x in all_views()[0]]
        shape = (9, DIM) if mode == "unpaired" else (len(whole[0]), 3, DIM)
        queue = torch.randn(shape, generator=generator)
        for in_batch in (True, False):
            options = dict(negative_mode=mode, in_batch_negatives=in_batch, temperature=0.5)
            parts = [own_rows(x) for x in whole]
            mine = queue if mode == "unpaired" else own_rows(queue).detach()
            expected = info_nce(*whole, queue, **options)
            value = info_nce(*parts, mine, group=dist.group.WORLD, **options)
            assert_parts_of(whole, parts, expected, value, tolerance(torch.float32))


def _check_half_precision() -> None:
    """Gradients that come from many processes are summed up in float32."""
    for name, loss in {**_softmax_losses(), "siglip_loss": siglip_loss}.items():
        whole = [F.normalize(x, dim=1).bfloat16() for x in all_views()[0]]
        parts = [own_rows(x) for x in whole]
        whole = [x.float().requires_grad_() for x in whole]
        scalars = (5.0, -3.0) if name == "siglip_loss" else (5.0,)
        value, expected = loss(*parts, *scalars, group=dist.group.WORLD), loss(*whole, *scalars)
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(mean_of_all(value.float()), expected.detach(), rtol=1e-2, atol=0)
        for part, x in zip(torch.autograd.grad(value, parts), torch.autograd.grad(expected, whole), strict=True):
            assert part.dtype == torch.bfloat16
            torch.testing.assert_close(
                part.float() / world_size(), own_rows(x).detach(), rtol=2e-2, atol=0.02 * x.abs().max().item()
            )
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*(own_rows(x) for x in whole), *scalars, group=dist.group.WORLD)
        assert value.dtype == torch.float32
        torch.testing.assert_close(mean_of_all(value), expected.detach(), rtol=1e-2, atol=0)


def _check_half_precision_sums() -> None:
    """What comes from many processes is rounded once: as if the same numbers had come in float32."""
    own, scale, gradients = torch.arange(BATCH), torch.tensor(2.0), []
    for dtype in (torch.bfloat16, torch.float32):
        x, y = (own_rows(F.normalize(x, dim=1).bfloat16().to(dtype)) for x in all_views()[0])
        ring = Ring(dist.group.WORLD, x=x, y=y)
        row, _, column, _ = distributed.contrastive.pair_logsumexp(ring, x, y, scale, own, "bfloat16")
        total, _ = distributed.contrastive.similarity_logsumexp(ring, x, y, scale, own, "bfloat16")
        softplus = distributed.sigmoid.similarity_softplus(ring, x, y, scale, torch.tensor(0.0), own, "bfloat16")
        for value in (row.sum() + column.sum(), total.sum(), softplus):
            gradients.append(torch.autograd.grad(value, (x, y)))
    for half, exact in zip(gradients[:3], gradients[3:], strict=True):
        for x, y in zip(half, exact, strict=True):
            torch.testing.assert_close(x, y.bfloat16(), rtol=2**-7, atol=1e-6)


def _check_subgroups() -> None:
    """The processes of even and of odd ranks, in the order of a group's own."""
    half = world_size() // 2
    groups = [dist.new_group(list(range(parity, 2 * half, 2))) for parity in (0, 1)]
    if rank() < 2 * half:
        group, place = groups[rank() % 2], rank() // 2
        views = all_views()[0]
        for loss in (clip_loss, siglip_loss):
            whole = [x[: half * BATCH].clone().requires_grad_() for x in views]
            parts = [x[place * BATCH : (place + 1) * BATCH].detach().clone().requires_grad_() for x in whole]
            expected, value = loss(*whole, 2.0), loss(*parts, 2.0, group=group)
            total = value.detach().clone()
            dist.all_reduce(total, group=group)
            torch.testing.assert_close(total / half, expected.detach())
            for part, x in zip(torch.autograd.grad(value, parts), torch.autograd.grad(expected, whole), strict=True):
                torch.testing.assert_close(part / half, x[place * BATCH : (place + 1) * BATCH], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=f"group must contain this process, got one without process {rank()}"):
        clip_loss(torch.ones(2, 2), torch.ones(2, 2), 1.0, group=groups[1 - rank() % 2])


def _check_no_process_holds_the_batch() -> None:
    """The most that any operation allocates is two parts of the batch; of four, so that one can tell."""
    if world_size() < 4:
        return
    parts = [torch.randn(32, 4096).requires_grad_() for _ in range(2)]
    for name, loss in {**_softmax_losses(), "siglip_loss": siglip_loss}.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss(*parts, 0.01, group=dist.group.WORLD).backward()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        views = 2 if name in {f.__name__ for f in _losses_of_both_views()} else 1  # which are then one part
        assert largest < 2.5 * views * parts[0].nbytes, (name, largest)


class _Products(TorchDispatchMode):
    """Counts the multiplications of rows with rows, in all operations of the family."""

    TIMES = {  # M x N products of rows, or sums over as many, of each
        "self_logsumexp": 0.5, "self_logsumexp_backward": 1.5, "pair_logsumexp": 1, "pair_logsumexp_backward": 3,
        "nt_xent": 0.5, "nt_xent_backward": 1.5, "sup_con": 0.5, "sup_con_backward": 1.5,
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_portable")
        if name in self.TIMES:
            rows = [len(x) for x in args if isinstance(x, Tensor) and x.dim() == 2]
            sides = (sum(rows), sum(rows)) if name.startswith("nt_xent") else (rows[0], rows[-1])
            self.found += self.TIMES[name] * math.prod(sides)
        return function(*args, **(kwargs or {}))


def _check_products_fall_with_the_number_of_processes() -> None:
    """Of P processes each multiplies as many rows as one process alone, divided by P, in both passes."""
    losses, rows = _softmax_losses(), world_size() * BATCH
    for name, times in {"xent": 2 * 2**2, "supervised": 2 * 2**2, "labelled_clip": 4}.items():
        whole = [x.requires_grad_() for x in all_views()[0]]
        with _Products() as alone:
            losses[name](*whole, 2.0).backward()
        with _Products() as together:
            losses[name](*(own_rows(x) for x in whole), 2.0, group=dist.group.WORLD).backward()
        assert alone.found == times * rows**2
        assert together.found * world_size() == alone.found, name


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(DIM, 5), nn.Linear(DIM, 5)
        self.scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        image, text = (F.normalize(f(x), dim=1) for f, x in ((self.image, images), (self.text, texts)))
        return image, text, self.scale.exp(), self.bias


def _check_towers_in_data_parallel() -> None:
    (inputs,) = all_views()
    place = {"rank": rank(), "world_size": world_size()}
    for whole, loss in (
        (ClipLoss(), ClipLoss(gather_with_grad=True, **place)),
        (ClipLoss(), ClipLoss(gather_with_grad=True, local_loss=True, **place)),
        (SigLipLoss(), SigLipLoss(**place)),
    ):
        single, parallel = _Towers(), DistributedDataParallel(_Towers())
        whole(*single(*inputs)).backward()
        loss(*parallel(*(own_rows(x).detach() for x in inputs))).backward()
        for ours, expected in zip(parallel.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6)


def _clip_formula(parts: list[Tensor], scale: Tensor, local_loss: bool, gather_with_grad: bool) -> Tensor:
    """What open_clip's flags say, word for word, with the rows of all processes gathered."""
    if gather_with_grad:
        rows = [gather_rows(x) for x in parts]
    else:
        rows = [gather_rows(x.detach()) for x in parts]
        if not local_loss:
            before, after = rank() * BATCH, (rank() + 1) * BATCH
            rows = [torch.cat([x[:before], part, x[after:]]) for x, part in zip(rows, parts, strict=True)]
    own = torch.arange(len(rows[0]))
    anchors = rows
    if local_loss:
        own, anchors = own[rank() * BATCH : (rank() + 1) * BATCH], parts
    return sum(F.cross_entropy(scale * x @ y.T, own) for x, y in zip(anchors, rows[::-1], strict=True)) / 2


def _check_clip_modules() -> None:
    """Process by process, what open_clip's flags say, and its classes where they are."""
    theirs, place = peer("open_clip"), {"rank": rank(), "world_size": world_size()}
    inputs = [F.normalize(own_rows(x), dim=1).detach().requires_grad_() for x in all_views()[0]]
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (7.0, -3.0))
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            flags = dict(local_loss=local_loss, gather_with_grad=gather_with_grad)
            losses = [_clip_formula(inputs, scale, **flags)]
            if theirs is not None:
                losses.append(theirs.ClipLoss(**flags, **place)(*inputs, scale, bias))
            value = ClipLoss(**flags, **place)(*inputs, scale, bias)
            ours = torch.autograd.grad(value, [*inputs, scale, bias])
            assert ours[3] == 0
            for loss in losses:
                torch.testing.assert_close(value, loss)
                expected = torch.autograd.grad(loss, [*inputs, scale])
                if local_loss and gather_with_grad:
                    expected = *expected[:2], mean_of_all(expected[2])
                for x, y in zip(ours, expected, strict=False):
                    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                torch.testing.assert_close(ClipLoss(**flags, **place)(*inputs, 7.0), losses[0])
    for implementation in ("bidir", "shift", "reduce", "gather") if theirs is not None else ():
        values = [
            module.SigLipLoss(dist_impl=implementation, **place)(*inputs, scale, bias)
            for module in (fastssl.nn, theirs)
        ]
        torch.testing.assert_close(*values)
        for x, y in zip(*(torch.autograd.grad(v, [*inputs, scale, bias]) for v in values), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def _check_unlike_processes_are_refused() -> None:
    """On every process, before anything is waited for."""
    x, y = (own_rows(x) for x in all_views()[0])
    last = rank() == world_size() - 1
    group, losses = dist.group.WORLD, {**_softmax_losses(), "siglip_loss": siglip_loss}
    del losses["supervised"]  # its features are both views together
    for loss in losses.values():
        with pytest.raises(ValueError, match=rf"same shape.*every process.*\({BATCH}, 8\).*\({BATCH - 1}, 8\)"):
            loss(x[: BATCH - last], y[: BATCH - last], 2.0, group=group)
        with pytest.raises(ValueError, match="requires_grad on every process"):
            loss(x.detach() if last else x, y, 2.0, group=group)
        with pytest.raises(ValueError, match="requires_grad on every process"), torch.set_grad_enabled(last):
            loss(x, y, 2.0, group=group)
    with pytest.raises(ValueError, match="every process.*torch.float64.* on 0.*and .*torch.float32"):
        clip_loss(*((x, y) if last else (x.double(), y.double())), 2.0, group=group)
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup or None, got int"):
        clip_loss(x, y, 2.0, group=3)
    with pytest.raises(ValueError, match=r"labels must have the same shape.*got labels \(\(6,\), .*and \(\(0,\)"):
        clip_loss(x, y, 2.0, labels=None if last else _labels(x, group), group=group)
    with pytest.raises(ValueError, match="group must be None with the backend 'reference'"):
        with fastssl.use_backend("reference"):
            clip_loss(x, y, 2.0, group=group)
    with pytest.raises(ValueError, match=r"rank and world_size must be .*default group, \(\d, \d\), got \(9, 10\)"):
        ClipLoss(rank=9, world_size=10)(x, y, 2.0)


def _check_metrics() -> None:
    """They are of this process's rows, among all."""
    whole = all_views(dtype=torch.float64)[0]
    whole = whole[0], whole[0] + whole[1]
    parts = [own_rows(x) for x in whole]
    for name in _softmax_losses().keys() - {f.__name__ for f in _losses_of_both_views()}:
        loss = _softmax_losses()[name]
        expected = loss(*whole, 2.0, return_metrics=True)[1]
        metrics = loss(*parts, 2.0, return_metrics=True, group=dist.group.WORLD)[1]
        assert list(metrics) == list(expected)
        assert name == "labelled_clip" or 0 < next(iter(expected.values())) < 1  # an accuracy
        for name, value in metrics.items():
            torch.testing.assert_close(mean_of_all(value), expected[name])


def _check_no_second_derivatives() -> None:
    x, y = (own_rows(x) for x in all_views()[0])
    for loss in {**_softmax_losses(), "siglip_loss": siglip_loss}.values():
        with pytest.raises(RuntimeError, match="create_graph must be False"):
            torch.autograd.grad(loss(x, y, 2.0, group=dist.group.WORLD), x, create_graph=True)


def _check_compiled_ring() -> None:
    for loss in (clip_loss, siglip_loss):
        parts = [own_rows(x) for x in all_views()[0]]
        pairs = [f(*parts, 2.0, group=dist.group.WORLD) for f in (loss, torch.compile(loss, backend="aot_eager"))]
        torch.testing.assert_close(*pairs)
        for x, y in zip(*(torch.autograd.grad(v, parts) for v in pairs), strict=True):
            torch.testing.assert_close(x, y)


def _check_empty_batches() -> None:
    """NaN, the mean of nothing, and no gradients."""
    losses = {**_softmax_losses(), "siglip_loss": siglip_loss}
    losses = [lambda x, y, loss=loss: loss(x, y, 2.0, group=dist.group.WORLD) for loss in losses.values()]
    for options in (dict(), dict(local_loss=True), dict(gather_with_grad=True)):
        losses.append(partial(ClipLoss(**options, rank=rank(), world_size=world_size()), logit_scale=2.0))
    for loss in losses:
        assert_empty_mean(loss)


def _check_unlike_dtypes_under_autocast() -> None:
    """The numbers of operands that are float32 all, and gradients in each one's own dtype."""
    losses = {**_softmax_losses(), "siglip_loss": siglip_loss, "barlow_twins": barlow_twins, "vicreg": vicreg}
    for name, loss in losses.items():
        scalars = {"barlow_twins": (), "vicreg": (), "siglip_loss": (2.0, -3.0)}.get(name, (2.0,))
        x, y = (own_rows(x) for x in all_views()[0])
        mixed = x, y.detach().bfloat16().requires_grad_()
        alike = x, mixed[1].detach().float().requires_grad_()
        results = []
        for views in (mixed, alike):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(*views, *scalars, group=dist.group.WORLD)
            results.append((value.detach(), *torch.autograd.grad(value, views)))
        value, *gradients = results[0]
        assert value.dtype == torch.float32 and torch.equal(value, results[1][0]), name
        for view, gradient, expected in zip(mixed, gradients, results[1][1:], strict=True):
            assert gradient.dtype == view.dtype and torch.equal(gradient, expected.to(view.dtype)), name


CHECKS = (
    _check_ring,
    _check_ring_of_one_row_each,
    _check_unequal_gradients,
    _check_reductions,
    _check_constants,
    _check_queue,
    _check_half_precision,
    _check_half_precision_sums,
    _check_subgroups,
    _check_no_process_holds_the_batch,
    _check_products_fall_with_the_number_of_processes,
    _check_towers_in_data_parallel,
    _check_clip_modules,
    _check_unlike_processes_are_refused,
    _check_empty_batches,
    _check_no_second_derivatives,
    _check_metrics,
    _check_unlike_dtypes_under_autocast,
)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_equal_one(processes, tmp_path):
    run_processes(partial(check_all, CHECKS), processes, tmp_path)


def test_ring_compiles(tmp_path):
    run_processes(_check_compiled_ring, 2, tmp_path)
