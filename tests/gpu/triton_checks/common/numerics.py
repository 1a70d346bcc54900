"""What checks of kernels' values share. They run on the GPU, or in Triton's interpreter.

A process can be in only one of the two modes, so tests/gpu/test_triton.py runs the files of the families in processes
of their own: with TRITON_INTERPRET=1 everywhere, and without it where there is a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fastssl.kernels.common.launch import DTYPES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Everything on a GPU; in the interpreter, which is slow and knows no TF32, a selection unless a sweep is wanted.
THOROUGH = not INTERPRETED or os.environ.get("FASTSSL_TRITON_SWEEP") == "1"
PRECISIONS = [precision for precision in DTYPES if precision != "tf32" or THOROUGH]

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.patch()
    interpreter.hurry()


@contextmanager
def poisoned() -> Iterator[None]:
    """What kernels leave unwritten is NaN."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_gradient(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(DEVICE)


def far_apart(x: Tensor) -> Tensor:
    """The same rows, with offsets that 32 bits do not hold."""
    far = torch.empty((len(x) - 1) * 2**30 + x.shape[1], dtype=x.dtype, device=DEVICE)
    return far.as_strided(x.shape, (2**30, 1)).copy_(x)


def assert_as_accurate(
    ours: Mapping[str, Tensor], exact: Mapping[str, Tensor], theirs: Mapping[str, Tensor], floor: Mapping[str, float]
) -> None:
    """Errors against float64 are at most twice eager's in the dtype of the products, and what rounding explains."""
    for name, mine in ours.items():
        error = (mine.double() - exact[name]).norm().item()
        allowed = 2 * (theirs[name].double() - exact[name]).norm().nan_to_num(0.0).item() + floor[name]
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, size {exact[name].norm():.3g}"
