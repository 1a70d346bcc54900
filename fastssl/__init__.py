"""fastssl: fused kernels for self-supervised learning."""

from fastssl import _native, functional, nn, optim  # noqa: F401  (_native loads the C++ kernels)
from fastssl.grad_cache import grad_cache
from fastssl.ops import use_backend
from fastssl.patch import patch

__all__ = ["functional", "grad_cache", "nn", "optim", "patch", "use_backend"]
__version__ = "0.1.0"
