"""The contract of every operation: schema, fake kernel, autograd formula, portable code."""

from fastssl.ops import contrastive, correlation, ema, masking, memory_bank, patches, sigmoid
from fastssl.ops._backend import current_backend, use_backend

__all__ = [
    "contrastive",
    "correlation",
    "current_backend",
    "ema",
    "masking",
    "memory_bank",
    "patches",
    "sigmoid",
    "use_backend",
]
