"""What Triton's interpreter lacks to stand for a GPU: bfloat16, which it multiplies and rounds as bit patterns, and
products whose bits do not depend on the shape of the tile they are in, as numpy's do. And what keeps it quick."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
import triton.language as tl
from triton.runtime import Autotuner, interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from fastssl.kernels.common import accumulate, blocks, collect, logits, rows
from fastssl.kernels.common.launch import row_block


def _widen(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(x: TensorHandle) -> TensorHandle:
    values = torch.from_numpy(np.ascontiguousarray(x.data, np.float32)).bfloat16()
    return TensorHandle(values.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def patch() -> None:
    """Cast to bfloat16 with rounding to nearest; multiply values, and round only each sum of a tl.dot."""
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, x, dtype):
        x = _widen(x)
        return _narrow(x) if dtype.scalar == tl.bfloat16 else cast(self, x, dtype)

    def create_dot(self, a, b, acc, *_):
        product = np.matmul(_widen(a).data.astype(np.float64), _widen(b).data.astype(np.float64))
        return TensorHandle(product.astype(acc.data.dtype) + acc.data, acc.dtype.scalar)

    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast_impl)
    InterpreterBuilder.create_fp_to_fp = lambda self, x, dtype, rounding: cast_impl(self, x, dtype)
    InterpreterBuilder.create_dot = create_dot
    # A CPU has no products of 16 bits in float32.
    logits.product = lambda left, right: left.float() @ right.float()
    blocks.add_product = lambda out, left, right, first: out.addmm_(left.float(), right.float(), beta=0 if first else 1)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        # Before Triton 3.8 this is int(array), which numpy 2.5 refuses where the array has a dimension.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def hurry() -> None:
    """One configuration of each kernel, as there is nothing to time; row kernels in few programs, as the interpreter's
    time goes by programs and not by elements; and Triton's functions replaced once, not at every call of a function.

    This for the kernels of kernels/common; a family's checks say the same of its own."""
    prepared = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in prepared:
            prepared.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
    few_programs(rows, collect)
    one_configuration(accumulate.accumulate_narrow, blocks.weigh)


def few_programs(*modules: ModuleType) -> None:
    for module in modules:
        module.row_block = lambda padded: row_block(padded) | {"BR": 32}


def one_configuration(*kernels: Autotuner) -> None:
    for kernel in kernels:
        kernel.configs = [c for c in kernel.configs if c.kwargs.get("BK", 32) == 32][:1]
