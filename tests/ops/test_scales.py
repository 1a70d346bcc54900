"""Scales, and rows, as large and as small as float32 holds: a softmax is then a maximum, and no less exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import (
    clip_loss,
    covariance_loss,
    dcl,
    info_nce,
    nt_xent,
    siglip_loss,
    similarity_logsumexp,
    sup_con,
    uniformity,
    variance_loss,
)

SCALES = (1e9, 3e9, 1e12, 1e20, 1e30, 3e38)
ROWS = 150  # of several tiles
LABELS = torch.arange(ROWS) // 7 % 11
QUEUE = torch.nn.functional.normalize(torch.randn(70, 24, generator=torch.Generator().manual_seed(2)))


def _siglip(a: Tensor, b: Tensor, s: float) -> Tensor:
    # Of the sum of all losses, not of one: 3e38 times several weights is more than float32 holds.
    return siglip_loss(a, b, a.new_tensor(s / ROWS), a.new_tensor(-1.0), reduction="sum")


# What the public functions make of two sides and a scale.
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "nt_xent": lambda a, b, s: nt_xent(a, b, temperature=1 / s, normalize=False, reduction="none"),
    "nt_xent, normalized": lambda a, b, s: nt_xent(a, b, temperature=1 / s, reduction="none"),
    "info_nce": lambda a, b, s: info_nce(a, b, temperature=1 / s, normalize=False, reduction="none"),
    "info_nce, queue": lambda a, b, s: info_nce(
        a, b, negative_keys=QUEUE.to(a) * b.detach().norm(dim=1).mean(), temperature=1 / s, normalize=False,
        reduction="none",
    ),
    "sup_con": lambda a, b, s: sup_con(a + 0 * b, LABELS, temperature=1 / s, normalize=False, reduction="none"),
    "dcl": lambda a, b, s: dcl(a, b, temperature=1 / s, normalize=False, reduction="none"),
    "clip_loss": lambda a, b, s: clip_loss(a, b, a.new_tensor(s), reduction="none"),
    "clip_loss, labels": lambda a, b, s: clip_loss(a, b, a.new_tensor(s), labels=LABELS, reduction="none"),
    "similarity_logsumexp": lambda a, b, s: similarity_logsumexp(a, b, scale=s),
    "siglip_loss": _siglip,
}  # fmt: skip


def _sides(size: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, ROWS, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (torch.nn.functional.normalize(x, dim=2) * size).float()
    return x[0].requires_grad_(), x[1].requires_grad_()


def _with_gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    output = loss(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, torch.full_like(output, 0.25))


def _check(loss: Callable[..., Tensor], sides: tuple[Tensor, ...], tolerance: float, overflow: bool = False) -> None:
    """Values and gradients are float64's, infinite where that is more than float32 holds; where eager float32 loses
    them on the way, they may be infinite too, and NaN where eager's are or where similarities overflow."""
    results = _with_gradients(loss, *sides)
    with fastssl.use_backend("reference"):
        eager = _with_gradients(loss, *sides)
        truth = _with_gradients(loss, *(x.detach().double().requires_grad_() for x in sides))
    for result, rough, true in zip(results, eager, truth, strict=True):
        expected = true.float()
        assert overflow or rough.isnan().any() or not result.isnan().any()
        if not overflow and rough.isfinite().all():
            assert torch.equal(result.isfinite(), expected.isfinite())
        settled = expected.isfinite() & result.isfinite()
        error, size = (result.double() - true)[settled].norm(), true[settled].norm()
        assert error <= tolerance * size


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", LOSSES)
def test_large_scales(name, scale, sign, kernels):
    scale = sign * torch.tensor(scale).item()
    for size in (1, 1e-3, 1e3):
        _check(lambda a, b: LOSSES[name](a, b, scale), _sides(size), 1e-4, abs(scale) * size**2 > torch.finfo().max)


@pytest.mark.parametrize("t", [1e9, -3e9, 1e18, 1e30, 1e38])
def test_uniformity(t, kernels):
    x = _sides(1)[0]
    value, gradient = _with_gradients(lambda x: uniformity(x, t=t), x)
    truth = uniformity(x.detach().double(), t=t)
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [1e15, 1e19, 1e30])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_huge_views(shape, size, kernels):
    """Deviations above 1 cost nothing; the squares of the covariances are more than float32 holds."""
    z = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size).requires_grad_()
    variance, gradient = _with_gradients(variance_loss, z)
    assert variance == 0 and not gradient.any()
    covariance = covariance_loss(z)
    assert covariance.isinf() if size < 1e19 else not covariance.isfinite()  # the sums of either sign overflow
