"""The inputs that every operation is tested on and measured with, beside its formula: `OPS`.

The module of a family registers its operations; a new family is one more name in the list below.
"""

from fastssl.reference.samples import (
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
    sinkhorn,
    tokens,
    topk_similarity,
    uniformity,
)
from fastssl.reference.samples._spec import (
    COMPILED,
    EDGE,
    OPS,
    POISONED,
    RAGGED,
    SHAPES,
    TRACED,
    BadInput,
    OpSpec,
    Sample,
)

__all__ = [
    "COMPILED",
    "EDGE",
    "OPS",
    "POISONED",
    "RAGGED",
    "SHAPES",
    "TRACED",
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
    "sinkhorn",
    "tokens",
    "topk_similarity",
    "uniformity",
]
