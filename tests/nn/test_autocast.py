"""Modules under autocast, whose operands are of unlike dtypes: a tower that is frozen, cached features, a queue."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastssl
from fastssl.distributed import rank, world_size
from fastssl.functional import info_nce
from fastssl.nn import (
    BarlowTwinsLoss,
    ClipLoss,
    CoCaLoss,
    DCLLoss,
    DCLWLoss,
    DistillClipLoss,
    InfoNCELoss,
    MemoryBank,
    NTXentLoss,
    SigLipLoss,
    VICRegLoss,
)
from tests.distributed.processes import run_processes

LOSSES = {
    "NTXentLoss": lambda: NTXentLoss(),
    "NTXentLoss with a memory bank": lambda: NTXentLoss(memory_bank_size=(32, 16)),
    "InfoNCELoss": lambda: InfoNCELoss(symmetric=True),
    "DCLLoss": lambda: DCLLoss(),
    "DCLWLoss": lambda: DCLWLoss(),
    "BarlowTwinsLoss": lambda: BarlowTwinsLoss(),
    "VICRegLoss": lambda: VICRegLoss(),
    "ClipLoss": lambda: _with_scale(ClipLoss()),
    "SigLipLoss": lambda: _with_scale(SigLipLoss(), -10.0),
    "CoCaLoss": lambda: _with_captions(CoCaLoss(1.0, 2.0)),
    "DistillClipLoss": lambda: _with_teacher(DistillClipLoss()),
}


def _with_scale(loss, *bias):
    return lambda x, y: loss(x, y, torch.tensor(10.0), *bias)


def _with_captions(loss):
    return lambda x, y: sum(loss(x, y, torch.ones(8, 3, 5), torch.ones(8, 3, dtype=torch.int64), torch.tensor(10.0)))


def _with_teacher(loss):
    """One of its towers is of the other dtype, too."""
    return lambda x, y: sum(loss(x, y, 10.0, y.detach(), x.detach().flip(1), 12.0))


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_unlike_dtypes(name, narrow, backend):
    torch.manual_seed(0)
    views = [torch.randn(8, 16) for _ in range(2)]
    views[narrow] = views[narrow].bfloat16()
    mixed, alike = ([x.detach().to(dtype or x.dtype).requires_grad_() for x in views] for dtype in (None, torch.float))
    results = []
    for operands in (mixed, alike):
        torch.manual_seed(1)
        with fastssl.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[name]()(*operands)
            results.append((loss.detach(), *torch.autograd.grad(loss, operands)))
    assert results[0][0].dtype == torch.float32
    # Where both views are in one matrix, sums over it are rounded to the dtype of a gradient later.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for view, gradient, expected in zip(mixed, *(r[1:] for r in results), strict=True):
        assert gradient.dtype == view.dtype
        torch.testing.assert_close(gradient.float(), expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
@pytest.mark.parametrize("compiled", [False, True])
def test_momentum_contrast(backend, compiled):
    """A training step of MoCo, whose queue is float32, and whose features are what autocast makes them."""
    torch.manual_seed(0)
    model, momentum_model = torch.nn.Linear(12, 16), torch.nn.Linear(12, 16)
    bank, images = MemoryBank(64, 16), torch.randn(8, 12)
    loss_of = torch.compile(info_nce, backend="aot_eager", fullgraph=True) if compiled else info_nce
    losses = []
    for enabled in (True, False):
        with fastssl.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            query = model(images)
            with torch.no_grad():
                key = F.normalize(momentum_model(images), dim=1)
            loss = loss_of(F.normalize(query, dim=1), key, bank.keys, temperature=0.2, normalize=False)
        model.zero_grad()
        loss.backward()
        losses.append((loss.detach(), model.weight.grad.clone()))
    bank.update(key)
    assert losses[0][0].dtype == losses[0][1].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], rtol=0.1, atol=0.02)


def _check_processes() -> None:
    """The numbers of operands that are float32 all, and gradients in each one's own dtype."""
    place = {"rank": rank(), "world_size": world_size()}
    losses = {
        "NTXentLoss": lambda: NTXentLoss(gather_distributed=True),
        "NTXentLoss with a memory bank": lambda: NTXentLoss(0.5, (32, 16), gather_distributed=True),
        "InfoNCELoss": lambda: InfoNCELoss(symmetric=True, group=dist.group.WORLD),
        "DCLLoss": lambda: DCLLoss(gather_distributed=True),
        "BarlowTwinsLoss": lambda: BarlowTwinsLoss(gather_distributed=True),
        "VICRegLoss": lambda: VICRegLoss(gather_distributed=True),
        "SigLipLoss": lambda: _with_scale(SigLipLoss(**place), -10.0),
    }
    for flags in itertools.product((False, True), repeat=2):
        losses[f"ClipLoss {flags}"] = lambda flags=flags: _with_scale(ClipLoss(*flags, **place))
        losses[f"DistillClipLoss {flags}"] = lambda flags=flags: _with_teacher(DistillClipLoss(*flags, **place))
    for (name, loss), narrow in itertools.product(losses.items(), (0, 1)):
        torch.manual_seed(rank())
        views = [torch.randn(8, 16) for _ in range(2)]
        views[narrow] = views[narrow].bfloat16()
        results = []
        for dtype in (None, torch.float32):
            operands = [x.to(dtype or x.dtype).requires_grad_() for x in views]
            torch.manual_seed(9)
            with torch.autocast("cpu", torch.bfloat16):
                value = loss()(*operands)
            results.append((value.detach(), *torch.autograd.grad(value, operands)))
        assert results[0][0].dtype == torch.float32, name
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6, msg=name)
        for view, gradient, expected in zip(views, results[0][1:], results[1][1:], strict=True):
            assert gradient.dtype == view.dtype, name
            close = dict(rtol=2e-2, atol=1e-2 * expected.abs().max().item())
            torch.testing.assert_close(gradient.float(), expected, **close, msg=name)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")
def test_processes(tmp_path):
    run_processes(_check_processes, 2, tmp_path)
