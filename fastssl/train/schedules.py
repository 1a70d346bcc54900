"""Numbers that change in the course of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A linear way from `first` to `peak`, then half a cosine to `last`.

    Args:
        first: at the beginning.
        peak: after the warm-up.
        last: at the end.
        warmup: the share of the run that the way up takes; 0: the run begins with `peak`.
    """

    first: float
    peak: float
    last: float
    warmup: float = 0.0

    def __call__(self, progress: float) -> float:
        """progress: the share of the run that is done, from 0 to 1."""
        if progress < self.warmup:
            return self.first + (self.peak - self.first) * progress / self.warmup
        rest = (progress - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 1.0
        return self.last + (self.peak - self.last) * 0.5 * (1 + math.cos(math.pi * rest))
