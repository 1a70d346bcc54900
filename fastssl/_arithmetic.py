"""Arithmetic that functions and modules of several families share: scalars, unit rows, log-sum-exps, reductions."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._reductions import reduce
from fastssl.ops._numbers import as_tensor
from fastssl.ops._precision import accumulate_dtype, autocast_enabled, widen


def as_scalar(scalar: float | Tensor, x: Tensor) -> Tensor:
    """On x's device, in the dtype of sums."""
    dtype = accumulate_dtype(x.dtype)
    if isinstance(scalar, Tensor) or torch.compiler.is_compiling():
        return as_tensor(scalar, dtype, x.device)
    return x.new_full((), scalar, dtype=dtype)  # fake, if x is


def inverse(temperature: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return as_scalar(temperature, x).reciprocal()
    if torch.compiler.is_compiling():  # PyTorch 2.10 would compile Python's arithmetic anew for each value
        return as_scalar(as_tensor(temperature, torch.float64).reciprocal(), x)
    return as_scalar(1 / temperature, x)


def multiple(number: float, factor: int) -> float | Tensor:
    """factor number; where torch.compile runs, a tensor, as in `inverse`."""
    return factor * (as_tensor(number, torch.float64) if torch.compiler.is_compiling() else number)


def unit(x: Tensor) -> Tensor:
    """Unit rows, in the dtype of sums."""
    return F.normalize(widen(x), dim=-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Products of rows with rows, in the dtype of sums, under autocast too, where vecdot would not be."""
    dtype = accumulate_dtype(x.dtype)
    return (x.to(dtype) * y.to(dtype)).sum(-1)


def kept(y: Tensor) -> Tensor:
    """y, for the reference to keep: a constant may be overwritten before the backward pass, as a queue is."""
    return y if y.requires_grad else y.clone()


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def logsumexp(total: Tensor, shift: Tensor) -> Tensor:
    some = total != 0  # the gradient of log(0) is NaN
    return total.where(some, 1).log().where(some, float("-inf")) + shift


def cross_entropy(negatives: Tensor, positive: Tensor) -> Tensor:
    """log(exp(positive) + exp(negatives)) - positive, without cancellation."""
    return -F.logsigmoid(positive - negatives) * (1 + 0 * positive.detach())  # NaN, not 0, where positive is infinite


def finish(loss: Tensor, reduction: str, x: Tensor) -> Tensor:
    loss = reduce(loss, reduction)
    return loss if loss.dtype == x.dtype or autocast_enabled(x) else loss.to(x.dtype)


def of_reference(result: Tensor | tuple[Tensor, dict[str, Tensor]], x: Tensor) -> Any:
    """What a loss of the reference returned, in float32 where a product under autocast was its last step."""
    if not autocast_enabled(x):
        return result
    if isinstance(result, tuple):
        return of_reference(result[0], x), result[1]
    return widen(result)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else contextlib.nullcontext()
