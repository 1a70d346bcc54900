"""Which operations of `torch.ops.fastssl` run, and with what they are called; which of PyTorch's add atomically."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.reference import OpSpec, Sample
from tests.accuracy import public


class Recorder(TorchDispatchMode):
    """The names of the operations of fastssl that ran."""

    def __enter__(self) -> set[str]:
        self.names: set[str] = set()
        super().__enter__()
        return self.names

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastssl":
            self.names.add(op._opname)
        return op(*args, **(kwargs or {}))


# By torch.use_deterministic_algorithms' documentation; of `index_put` and of indexing only what CUDA does not sort.
ATOMIC = {"index_add", "index_reduce", "scatter_add", "scatter_reduce", "put", "embedding_dense_backward", "cumsum"}


class AtomicSums(TorchDispatchMode):
    """The names of PyTorch's operations on floating-point numbers whose sums CUDA adds up in an order that changes from
    run to run."""

    def __enter__(self) -> set[str]:
        self.names: set[str] = set()
        super().__enter__()
        return self.names

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op._opname.rstrip("_") in ATOMIC and result.is_floating_point():
            self.names.add(op._opname)
        return result


class _Calls(TorchFunctionMode):
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
    calls = _Calls()
    with calls:
        public(spec)(*sample.args, **sample.kwargs)
    return calls.calls
