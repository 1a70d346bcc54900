"""The contract of every operation: schema, fake kernel, autograd formula, portable code."""

from fastssl.ops import (
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
    row_sums,
    scale,
    sigmoid,
    tokens,
)
from fastssl.ops._backend import current_backend, use_backend

__all__ = [
    "contrastive",
    "correlation",
    "current_backend",
    "distillation",
    "ema",
    "koleo",
    "linear_categorical",
    "linear_cross_entropy",
    "masking",
    "memory_bank",
    "patches",
    "row_sums",
    "scale",
    "sigmoid",
    "tokens",
    "use_backend",
]
