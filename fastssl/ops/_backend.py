"""Which backend computes: `use_backend` chooses it, for the thread or asyncio task that calls it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

_BACKENDS = ("auto", "portable", "reference")
_choices: ContextVar[tuple[list[str], ...]] = ContextVar("fastssl.use_backend", default=())  # of the blocks entered
_traced: list[str] = []  # of the blocks that torch.compile has entered, which cannot trace a ContextVar


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose, inside a `with` block, what computes fastssl's operations.

    The choice is that of the thread, or of the asyncio task, that enters the block; others keep theirs, and a new
    thread starts with "auto". What ran a forward pass also runs its backward pass, wherever that is called.
    `torch.utils.checkpoint` runs a forward pass anew: in the backend of the block in which the backward pass is called,
    or of `context_fn=lambda: (use_backend(name), use_backend(name))`. torch.compile recompiles when the choice changes.

    Args:
        name: "auto", the kernels of the device (the default); "portable", blocks of plain PyTorch in
            O(B D) memory; or "reference", the naive formula, which is slow and large but easy to trust.

    Raises:
        ValueError: if `name` is none of these.
    """
    if not isinstance(name, str) or name not in _BACKENDS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _BACKENDS))}, got {name!r}")
    if torch.compiler.is_compiling():
        _traced.append(name)
        try:
            yield
        finally:
            _traced.pop()
        return
    choice = [name]  # a list, so that this block can tell its own: blocks may be left in any order
    _choices.set((*_choices.get(), choice))
    try:
        yield
    finally:
        _choices.set(tuple(other for other in _choices.get() if other is not choice))


def current_backend() -> str:
    """The backend that `use_backend` chose here: "auto" outside of any `with` block."""
    if torch.compiler.is_compiling():
        return _traced[-1] if _traced else _module.chosen
    return _chosen()


def __getattr__(name: str) -> Any:
    """The attribute `chosen` of this module, which torch.compile reads, and guards, as it does any attribute."""
    if name != "chosen":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _chosen()


def _chosen() -> str:
    choices = _choices.get()
    # A thread of autograd has no choices of its own. From PyTorch 2.12 on it is told the context that called backward;
    # 2.12 puts None in the context's place afterwards.
    if not choices and torch._C._is_key_in_tls("context") and (context := torch._C._get_obj_in_tls("context")):
        choices = context.get(_choices, ())
    return choices[-1][0] if choices else "auto"


_module = sys.modules[__name__]
