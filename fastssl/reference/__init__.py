"""The specification: every operation as naive, readable PyTorch, with the inputs it is tested on.

Nothing here is fast, and nothing here imports anything but torch. Tests and benchmarks find the
operations through `OPS`; an operation is registered by the module of its family.
"""

from fastssl.reference import contrastive, correlation, ema, masking, memory_bank, patches, sigmoid
from fastssl.reference._spec import OPS, BadInput, OpSpec, Sample

__all__ = [
    "OPS",
    "BadInput",
    "OpSpec",
    "Sample",
    "contrastive",
    "correlation",
    "ema",
    "masking",
    "memory_bank",
    "patches",
    "sigmoid",
]
