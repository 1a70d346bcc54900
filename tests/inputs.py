"""Inputs that tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """From a normal distribution."""
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of length 1."""
    return F.normalize(normal(*shape, seed=seed), dim=-1).to(dtype)


def alike(batch: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two views that have something in common, and deviations about 1."""
    common = normal(batch, dim, seed=seed)
    return tuple((0.7 * (common + normal(batch, dim, seed=seed + i)) + 0.5).to(dtype) for i in (1, 2))


def some_ids(batch: int, count: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """With repetitions."""
    return torch.randint(below, (batch, count), generator=seeded(1)).to(dtype)


def ragged(dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Of sizes about a vector's and a run's length; 0-d, empty, transposed, with gaps, misaligned."""
    generator = seeded(seed)

    def x(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    flat = [x(n) for n in (0, 1, 3, 15, 16, 17, 511, 513, 32767, 32769)]
    return [*flat, x(()), x(2, 3, 5), x(30, 40).T, x(30, 80)[:, ::2], x(9, 7)[1:, 2:], x(100)[1:]]
