"""How many kernels a GPU would be told to run: Triton's, and those of PyTorch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter


class _Operations(TorchDispatchMode):
    """Counts operations that compute or check: no views, no new tensors without values, nothing of no elements."""

    count = 0
    in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        computed = any(isinstance(t, torch.Tensor) and t.numel() for t in tree_leaves(results))
        computed &= not func.is_view and "empty" not in func.name()
        if (computed or "_assert_async" in func.name()) and not self.in_kernel:
            self.count += 1
        return results


def count_launches(run: Callable[[], Any]) -> int:
    """Of `run`, in Triton's interpreter."""
    execute = interpreter.GridExecutor.__call__
    operations = _Operations()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        operations.count += 1
        operations.in_kernel = True
        try:
            return execute(self, *args, **kwargs)
        finally:
            operations.in_kernel = False

    interpreter.GridExecutor.__call__ = call
    try:
        with operations:
            run()
    finally:
        interpreter.GridExecutor.__call__ = execute
    return operations.count
