"""Random numbers by their position: the i-th of a seed, the same one on every device.

The hash is SplitMix64's: a position's number, times an odd constant, added to the seed, is mixed by shifts and
multiplications. csrc/cpu/common/random.h has it in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP, _MIX1, _MIX2 = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def seeds(seed: Tensor, positions: Tensor) -> Tensor:
    """A seed for each of the positions."""
    return _mix(seed + (positions + 1) * _STEP)


def numbers_at(seed: Tensor, positions: Tensor) -> Tensor:
    """Of a seed, random numbers of 63 bits: those at `positions`."""
    return _shift(seeds(seed, positions), 1)


def numbers(seed: Tensor, first: int, count: int) -> Tensor:
    """(..., count) of them, from number `first` of the seed, (..., 1) or 0-d."""
    return numbers_at(seed, torch.arange(first, first + count, device=seed.device))
