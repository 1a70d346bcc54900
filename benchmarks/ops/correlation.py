"""Losses on the correlation and covariance of features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import peers
from benchmarks.ops.registry import Benchmark, LossAndGradients, Size

LAMBDA = 5e-3  # Barlow Twins'


def _views(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Two views whose features have a deviation of 1, and a correlation of 1/2 with themselves in the other view."""
    generator = torch.Generator().manual_seed(0)
    z_a, noise = (torch.randn(*size, generator=generator) for _ in range(2))
    return tuple(z.to(dtype).requires_grad_() for z in (z_a, z_a / 2 + 0.75**0.5 * noise))


def _squares_off_the_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """sum_{i != j} (a^T b)_ij^2 in float64, by the smaller of two matrices."""
    squares = (a @ a.T * (b @ b.T)).sum() if a.shape[0] < a.shape[1] else (a.T @ b).square().sum()
    return squares - (a * b).sum(0).square().sum()


def _barlow_twins(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    invariance = ((a * b).mean(0) - 1).square().sum()
    return invariance + LAMBDA * _squares_off_the_diagonal(a, b) / len(a) ** 2


def _covariance_loss(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    return _squares_off_the_diagonal(centred, centred) / (len(z) - 1) ** 2 / z.shape[1]


def _vicreg(z_a: Tensor, z_b: Tensor) -> Tensor:
    loss = 25 * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        loss = loss + 25 / 2 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() + _covariance_loss(z)
    return loss


def _oracle(loss: Callable[..., Tensor]) -> Callable[..., LossAndGradients]:
    def oracle(*inputs: Tensor) -> LossAndGradients:
        leaves = tuple(x.detach().double().requires_grad_() for x in inputs)
        value = loss(*leaves)
        return value.detach(), torch.autograd.grad(value, leaves)

    return oracle


def _flops(size: Size) -> float:
    """Three products, of rows x rows or of features x features."""
    rows, dim = size
    return 3 * 2 * rows * dim * min(rows, dim)


def _needs(**count: float) -> Callable[[Size, int], dict[str, float]]:
    """By the number of features x features and of rows x features matrices alive at once."""
    return lambda size, itemsize: {n: (m * size[1] ** 2 + 6 * size[0] * size[1]) * itemsize for n, m in count.items()}


_SIZES = ((256, 2048), (256, 8192), (2048, 8192), (4096, 1024))

Benchmark(
    "barlow_twins",
    sizes=_SIZES,
    memory_sizes=((256, 16384),),
    inputs=_views,
    flops=_flops,
    # Both views are read twice, and their gradients written.
    traffic=lambda size, itemsize: 6 * size[0] * size[1] * itemsize,
    needs=_needs(naive=5, compile=3, lightly=5),
    peers={"lightly": lambda: peers.lightly().BarlowTwinsLoss(LAMBDA)},
    oracle=_oracle(_barlow_twins),
)

Benchmark(
    "vicreg",
    sizes=_SIZES,
    memory_sizes=((256, 16384),),
    inputs=_views,
    flops=_flops,
    traffic=lambda size, itemsize: 6 * size[0] * size[1] * itemsize,
    needs=_needs(naive=8, compile=5, lightly=12),
    peers={"lightly": lambda: peers.lightly().VICRegLoss()},
    oracle=_oracle(_vicreg),
)

Benchmark(
    "covariance_loss",
    sizes=_SIZES,
    memory_sizes=((256, 16384),),
    inputs=lambda size, dtype: _views(size, dtype)[:1],
    flops=lambda size: _flops(size) / 2,
    traffic=lambda size, itemsize: 3 * size[0] * size[1] * itemsize,
    needs=_needs(naive=5, compile=3, lightly=6),
    peers={"lightly": lambda: peers.lightly().vicreg_loss.covariance_loss},
    oracle=_oracle(_covariance_loss),
)
