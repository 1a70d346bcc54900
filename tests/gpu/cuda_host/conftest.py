"""The operations of csrc/cuda, compared with the portable ones: a file per family of kernels.

tests/gpu/test_cuda.py runs each in a process of its own, where FASTSSL_CUDA_HOST names the library that was compiled
for the CPU (common/cuda_runtime.h says how): the sanitizers must be there from the start. Every test runs three times,
with the threads of a block in another order. Without that variable it runs once, on the GPU. Memory that nobody has
written is NaN.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.gpu.cuda_host.common.operations import DEVICE, LIBRARY, ORDERS


@pytest.fixture(params=ORDERS.values(), ids=ORDERS, autouse=True)
def _order_of_threads(request):
    if LIBRARY:
        ctypes.CDLL(LIBRARY).cuda_host_order(request.param)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what it allocates with NaN
    with torch.device(DEVICE):
        yield
