"""Which operations of fastssl run."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


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
