"""Numbers among the arguments of operations: what a signature calls `float` is a 0-d float64 tensor to PyTorch.

torch.compile makes one program for all values of a number that varies from call to call if operations take it as a
tensor, and else one for each. The tensor is on the CPU; kernels get Python's float, C++'s double.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._fake import mode_of


def as_tensor(number: float | Tensor, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """0-d; device None: where the tensor is, or the CPU."""
    if isinstance(number, Tensor):
        if number.dtype == dtype and (device is None or number.device == device):
            return number  # a small batch notices a call of `to` that does nothing
        return number.to(device=device, dtype=dtype)
    if torch.compiler.is_compiling():
        # A number that varies is compiled once where it multiplies a tensor, and elsewhere anew for each value.
        return torch.ones((), dtype=dtype, device=device or _CPU) * number
    return torch.scalar_tensor(number, dtype=dtype, device=device or _CPU)


_CPU = torch.device("cpu")  # which need not be parsed


def numbers_in(schema: str) -> list[int]:
    """Which of an operation's arguments are numbers."""
    arguments = torch._C.parse_schema(f"fastssl::{schema}").arguments
    return [i for i, argument in enumerate(arguments) if argument.type.kind() == "FloatType"]


def with_tensors(signature: str) -> str:
    """A signature as PyTorch sees it."""
    return re.sub(r"\bfloat (?=\w)", "Tensor ", signature)


def as_tensors(args: Sequence[Any], numbers: Sequence[int]) -> Sequence[Any]:
    if not numbers:
        return args
    args = list(args)
    with mode_of(args[0]):
        for i in numbers:
            args[i] = as_tensor(args[i], torch.float64)
    return args


def taking_tensors(function: Callable[..., Any], numbers: Sequence[int]) -> Callable[..., Any]:
    """`function`, which takes numbers, of the tensors that stand for them."""
    if not numbers:
        return function

    def run(*args: Any) -> Any:
        return function(*(x.item() if i in numbers else x for i, x in enumerate(args)))

    return run
