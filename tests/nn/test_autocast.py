"""Modules under autocast, whose operands are of unlike dtypes: a tower that is frozen, cached features, a queue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastssl
from fastssl.functional import info_nce
from fastssl.nn import (
    BarlowTwinsLoss,
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    InfoNCELoss,
    MemoryBank,
    NTXentLoss,
    SigLipLoss,
    VICRegLoss,
)

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
}


def _with_scale(loss, *bias):
    return lambda x, y: loss(x, y, torch.tensor(10.0), *bias)


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
