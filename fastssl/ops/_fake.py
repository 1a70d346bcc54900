"""Fake tensors, which have shapes and no values: those of torch._subclasses that a caller passes.

Those that torch.compile makes are its own affair: all that it traces is fake.
"""

from __future__ import annotations

import contextlib

import torch


def is_fake(x: object) -> bool:
    return not torch.compiler.is_compiling() and isinstance(x, torch._subclasses.FakeTensor)


def mode_of(x: object) -> contextlib.AbstractContextManager:
    """In which tensors are made that may stand beside x, or a list's first: of its mode, if it is fake."""
    if isinstance(x, (list, tuple)):
        x = x[0] if x else None
    return x.fake_mode if is_fake(x) else _NO_MODE


_NO_MODE = contextlib.nullcontext()
