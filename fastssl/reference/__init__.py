"""The specification: every operation as naive, readable PyTorch.

Nothing here is fast, and nothing here imports anything but torch. The inputs that tests and benchmarks give to each
operation are in `fastssl.reference.samples`, which is imported when `OPS` is asked for.
"""

from __future__ import annotations

from typing import Any

from fastssl.reference import (
    contrastive,
    correlation,
    distillation,
    ema,
    koleo,
    linear_categorical,
    linear_cross_entropy,
    masking,
    memory_bank,
    patches,
    sigmoid,
    tokens,
    topk_similarity,
    uniformity,
)

__all__ = [
    "OPS",
    "BadInput",
    "OpSpec",
    "Sample",
    "contrastive",
    "correlation",
    "distillation",
    "ema",
    "koleo",
    "linear_categorical",
    "linear_cross_entropy",
    "masking",
    "memory_bank",
    "patches",
    "sigmoid",
    "tokens",
    "topk_similarity",
    "uniformity",
]


def __getattr__(name: str) -> Any:
    if name not in ("OPS", "BadInput", "OpSpec", "Sample"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastssl.reference import samples

    return getattr(samples, name)
