"""The operations of csrc/cuda as compiled for this process, the portable ones, and what compares the two."""

from __future__ import annotations

import ctypes
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.gpu.cuda_host.common.compile import OPERATIONS

LIBRARY = os.environ.get("FASTSSL_CUDA_HOST")
DEVICE = "cpu" if LIBRARY else "cuda"
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2} if LIBRARY else {"on the GPU": 0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# How many kernels an operation launches for tensors as it takes them; the gradients of restored tokens for more than 32
# samples.
LAUNCHES = {
    "adamw_ema_step_": 1,
    "ema_update_": 1,
    "enqueue_": 2,
    "gather_patches": 1,
    "gather_tokens": 1,
    "masked_feature_loss": 1,
    "masked_feature_loss_backward": 1,
    "masked_patch_loss": 1,
    "masked_patch_loss_backward": 1,
    "masking_ids": 1,
    "restore_tokens": 1,
    "restore_tokens_backward": 4,
    "scatter_patches": 1,
    "scatter_tokens": 1,
}

portable = cuda = torch.ops.fastssl
if LIBRARY:
    _library = torch.library.Library("fastssl_cuda_host", "DEF")
    for _name in OPERATIONS:
        _library.define(str(getattr(portable, _name).default._schema).removeprefix("fastssl::"))
    torch.ops.load_library(LIBRARY)
    _launches = ctypes.CDLL(LIBRARY).cuda_host_launches
    cuda = torch.ops.fastssl_cuda_host


def layouts(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """The same numbers contiguous, misaligned, with gaps, and transposed."""
    x = torch.randn(*shape).to(dtype)
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(shape).copy_(x)
    gaps = torch.full((*shape[:-2], 2 * shape[-2], shape[-1] + 3), math.nan, dtype=dtype)[..., ::2, 1:-2].copy_(x)
    return [x, shifted, gaps, x.mT.contiguous().mT]


def permutations(batch: int, length: int) -> Tensor:
    return torch.rand(batch, length).argsort(1)


def assert_as_accurate(name: str, *args) -> None:
    """At most twice the error of the portable operation in the same dtype, against it in float64, and rounding."""
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    eager_op = getattr(portable, f"{name}_portable")
    outputs = getattr(cuda, name)(*args), eager_op(*exact), eager_op(*args)
    outputs = [(x,) if isinstance(x, Tensor) else x for x in outputs]
    for result, truth, eager in zip(*outputs, strict=True):
        assert result.shape == truth.shape and result.dtype == eager.dtype and result.is_contiguous()
        if not result.numel():
            continue
        error, allowed = ((x.double() - truth).abs().max().item() for x in (result, eager))
        rounding = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps * max(1, truth.abs().max().item())
        assert error <= 2 * allowed + 4 * rounding  # not so if the error is NaN


def assert_launches(name: str, *args) -> None:
    if LIBRARY:
        before = _launches()
        getattr(cuda, name)(*args)
        assert _launches() - before == LAUNCHES[name]


def assert_aborts(call: Callable[[], Any]) -> None:
    """In a process of its own, as an assertion of a kernel ends it."""
    child = os.fork()
    if not child:
        call()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGABRT
