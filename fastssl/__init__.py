"""fastssl: fused kernels for self-supervised learning."""

from fastssl import functional, nn
from fastssl.ops import use_backend

__all__ = ["functional", "nn", "use_backend"]
__version__ = "0.1.0"
