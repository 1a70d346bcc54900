"""Which operations of `torch.ops.fastssl` a function calls, and with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastssl.reference import OpSpec, Sample
from tests.accuracy import public


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "fastssl":
            self.calls.append((function, _leaves(args)))
        return function(*args, **(kwargs or {}))


def _leaves(x: Any) -> Any:
    """Tensors without the graph that they come from."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(_leaves, x))
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def recorded_calls(spec: OpSpec, sample: Sample) -> list[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    """(operation, arguments) of every call, in order."""
    recorder = _Recorder()
    with recorder:
        public(spec)(*sample.args, **sample.kwargs)
    return recorder.calls
