"""How an operation meets PyTorch: one class, one call per operation.

`Op` registers with torch.library, in two variants that share schema, fake kernel and autograd formula:

    fastssl::<name>            the kernel of the tensors' device where there is one, else the portable code
    fastssl::<name>_portable   the portable code on every device (`use_backend("portable")`)

PyTorch's dispatcher picks the kernel. The C++ library adds its own under the CPU key when it is loaded
(`fastssl/_native.py`), and hands float64 to the portable variant; `cuda` is a Triton or CUDA launcher. It also adds,
under AutogradCPU, the same autograd formula without Python (csrc/cpu/autograd.cpp lists the operations, and says by
which names of arguments it knows the formula).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._backend import current_backend
from fastssl.ops._precision import autocast_available

_library = torch.library.Library("fastssl", "DEF")


def triton_launcher(family: str, name: str) -> Callable[..., Any] | None:
    """The launcher `name` of fastssl.kernels' `family`, imported at its first call; None where Triton is not installed.

    float64 goes to the portable variant: the last argument is the precision of products.
    """
    if find_spec("triton") is None:
        return None

    def launch(*args: Any) -> Any:
        if args[-1] == "float64":
            return getattr(torch.ops.fastssl, f"{name}_portable")(*args)
        return getattr(import_module(f"fastssl.kernels.{family}"), name)(*args)

    return launch


class Op:
    """An operation registered with torch.library.

    Args:
        schema: torch.library's schema; its name is the operation's name.
        fake: shapes and dtypes of the outputs, from fake inputs.
        portable: the operation in plain PyTorch, for any device and floating dtype, in O(B D) memory.
        setup_context: (ctx, inputs, output) -> None, as torch.autograd.Function's.
        backward: (ctx, backward_op, *grad_outputs) -> a gradient for every input.
        backward_op: the operation that `backward` calls; it gets the variant that ran forward.
        cuda: kernel for CUDA tensors, or None where there is none.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        portable: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        backward_op: Op | None = None,
        cuda: Callable[..., Any] | None = None,
    ) -> None:
        name, signature = schema.split("(", 1)
        self.name = name
        portable = _without_autocast(portable)
        variants = []
        for suffix in ("", "_portable"):
            _library.define(f"{name}{suffix}({signature}")
            _library.impl(f"{name}{suffix}", portable, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastssl::{name}{suffix}", fake, lib=_library)
            op = getattr(torch.ops.fastssl, name + suffix).default
            derivative = backward_op and getattr(backward_op, "portable" if suffix else "auto")
            variants.append(_differentiable(op, setup_context, backward, derivative))
        self.auto, self.portable = variants
        if cuda is not None:
            _library.impl(name, _without_autocast(cuda), "CUDA")

    def __call__(self, *args: Any) -> Any:
        return (self.portable if current_backend() == "portable" else self.auto)(*args)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its products in the dtypes it asks for: what autocast wants came as the precision argument."""

    def run(*args: Any) -> Any:
        device = args[0].device.type
        if not autocast_available(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def _differentiable(
    op: torch._ops.OpOverload,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    backward_op: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """`op` with its autograd formula, callable under torch.func's transforms too.

    torch.library's own autograd registration does not yet work under torch.func, which wants a
    torch.autograd.Function; the same formula serves both.
    """

    def formula(ctx: Any, *grads: Tensor) -> Any:
        return backward(ctx, backward_op, *grads)

    torch.library.register_autograd(op._name, formula, setup_context=setup_context, lib=_library)
    function = type(
        op._opname,
        (torch.autograd.Function,),
        {"forward": staticmethod(op), "setup_context": staticmethod(setup_context), "backward": staticmethod(formula)},
    )

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return op(*args)

    return call
