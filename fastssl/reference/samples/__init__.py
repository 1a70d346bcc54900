"""The inputs that every operation is tested on and measured with, beside its formula: `OPS`.

The module of a family registers its operations; a new family is one more name in the list below.
"""

from fastssl.reference.samples import contrastive, correlation, patches, sigmoid
from fastssl.reference.samples._spec import OPS, BadInput, OpSpec, Sample

__all__ = ["OPS", "BadInput", "OpSpec", "Sample", "contrastive", "correlation", "patches", "sigmoid"]
