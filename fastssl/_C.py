"""What the C++ library was built with, and the instruction sets it uses. Only where it is loaded."""

from __future__ import annotations

import torch

_ops = torch.ops.fastssl_cpu

compiler: str = _ops.compiler()
torch_version: str = _ops.torch_version()
openmp: bool = _ops.openmp()


def built_isas() -> list[str]:
    """Instruction sets that kernels were compiled for."""
    return _ops.built_isas()


def available_isas() -> list[str]:
    """Of those built, what this CPU can run."""
    return _ops.available_isas()


def current_isa() -> str:
    """The instruction set that kernels use."""
    return _ops.current_isa()


def set_current_isa(name: str) -> None:
    """Make kernels use one of available_isas(), in this process."""
    _ops.set_current_isa(name)


def release_kept_memory() -> None:
    """Give the system what is kept of large tensors' memory for the next ones. Linux also takes it when it needs it."""
    _ops.release_kept_memory()


def contrastive_tile_plan(
    rows: int, dim: int, threads: int, symmetric: bool = False, keep: int = 0, narrow: bool = False
) -> dict[str, int]:
    """How the contrastive losses cut rows x rows similarities of dim features into tiles for that many threads, and how
    many tiles' exponentials, float32 or, if narrow, bfloat16, are kept in `keep` bytes between the passes."""
    return _ops.contrastive_tile_plan(rows, dim, threads, symmetric, keep, narrow)
