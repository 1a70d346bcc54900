"""The precision in which an operation multiplies: PyTorch's own settings, read once, in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT32_PRODUCTS = {"highest": "float32", "high": "tf32", "medium": "bfloat16"}
_PRODUCTS = {torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def product_precision(x: Tensor) -> str:
    """The precision of products of `x`: "float64", "float32", "tf32", "bfloat16" or "float16".

    It is that of x's dtype, or autocast's where autocast is on for x's device. For float32 it follows
    `torch.set_float32_matmul_precision`. Sums are taken in float32 (float64 for "float64") whatever it is.
    """
    dtype = x.dtype
    if autocast_enabled(x) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if dtype == torch.float32:
        return _FLOAT32_PRODUCTS[_float32_matmul_precision()]
    return _PRODUCTS[dtype]


def _float32_matmul_precision() -> str:
    return torch.get_float32_matmul_precision()


def autocast_available(device_type: str) -> bool:
    """Whether there is an autocast for devices of that type at all."""
    if device_type not in _available:
        _available[device_type] = torch.amp.is_autocast_available(device_type)
    return _available[device_type]


_available: dict[str, bool] = {}


# torch.compile cannot trace the first, and recompiles when it changes; in PyTorch 2.11 it cannot trace the second,
# which never changes. This is what torch.compiler.assume_constant_result does once it has imported torch._dynamo, which
# takes longer than all else here.
_float32_matmul_precision._dynamo_marked_constant = True
autocast_available._dynamo_marked_constant = True


def device_type_of(x: Tensor) -> str:
    """`x.device.type`, which takes ten microseconds when a batch has just been through the caches."""
    return "cpu" if x.is_cpu else x.device.type


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    device_type = device_type_of(x)
    return autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-sum-exps and losses over inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype that its sums have: half precision becomes float32, float64 remains."""
    return x.to(accumulate_dtype(x.dtype))


def round_operand(x: Tensor, precision: str) -> Tensor:
    """`x` rounded to `precision`, held in its own dtype, so that a product of such tensors rounds only its sums."""
    if precision in ("bfloat16", "float16"):
        return x.to(getattr(torch, precision)).to(x.dtype)
    return x


def round_weights(weight: Tensor, precision: str) -> Tensor:
    """`round_operand` for the weights of a sum, which may be too small for float16: relative to the largest of them."""
    if precision != "float16" or weight.numel() == 0:
        return round_operand(weight, precision)
    peak = weight.abs().amax()
    factor = 8192 / peak.where(peak != 0, 1)
    return round_operand(weight * factor, precision) / factor
