"""How an operation meets PyTorch: one class, one call per operation.

An operation is two signatures, in the language of torch.library's schemas, and the code that computes it:

    sup_con = Op(
        "sup_con(Tensor z, Tensor labels, Tensor scale, bool normalize, SymInt keep, str precision)"
        " -> (Tensor loss, Tensor shift, Tensor total, Tensor kept)",
        backward="(Tensor grad_loss, Tensor z, Tensor labels, Tensor scale, Tensor shift, Tensor total, Tensor kept,"
        " bool normalize, str precision) -> (Tensor grad_z, Tensor grad_scale)",
        fake=_fake,                      # shapes and dtypes of the outputs
        portable=(_forward, _backward),  # plain PyTorch
        share=_share,                    # what some rows add to <grad_loss, loss>: its derivatives are the second ones
        triton="contrastive",            # the file of its CUDA kernels, sup_con and sup_con_backward
    )

Names say the rest (`_derivative.py`): what the forward pass keeps for the backward pass, which outputs have gradients,
which inputs get them. That, and what `backward` returns for fake inputs, is derived. The backward pass is an operation
of its own, `<name>_backward`, so that kernels, torch.compile and second derivatives see it. Every operation is
registered twice:

    fastssl::<name>            the kernel of the tensors' device where there is one, else the portable code
    fastssl::<name>_portable   the portable code on every device (`use_backend("portable")`)

What ran forward runs backward: each has a backward operation of its own kind. PyTorch's dispatcher picks the kernel.
The C++ library adds its own under the key CPU when it is loaded (`fastssl/_native.py`), and hands float64 to the
portable variant. It also adds, under AutogradCPU, the same derivative without Python (csrc/cpu/autograd.cpp). A
kernel's arguments have the names that they have here.

What is not regular, and why:

- What a signature calls `float` is a 0-d tensor to PyTorch, see `_numbers.py`.
- `distillation_loss` and `prototype_distillation_loss` take lists of tensors, and take gradients in the forward pass;
  see `_derivative.py`.
- `clip_loss` and `info_nce` reduce the losses of rows themselves, as their `reduction` says: in a small batch,
  PyTorch's mean and its derivative would take a tenth of the time of the products.
- An operation in place, whose name ends in "_", and one that has no floating-point inputs, has no `backward`.
- `gather_tokens` and `scatter_tokens`, `gather_patches` and `scatter_patches`, `take_rows` and `sum_rows` are each
  other's derivatives, and need no backward operations: their `derivative` is written by hand.
- `restore_tokens` is linear: the derivative of its backward pass is the operation itself (`linear`). Its backward pass
  takes only the sizes of inputs, so that these need not be kept, and so has a fake of its own.
- `siglip_loss` has no Triton kernels of its own, but code that calls those of another operation (`cuda`). The backward
  passes of the sigmoid losses, which multiply by a number, have none either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._backend import current_backend
from fastssl.ops._derivative import Derivative, flattened, nested
from fastssl.ops._numbers import as_tensors, numbers_in, taking_tensors, with_tensors
from fastssl.ops._precision import autocast_available

_library = torch.library.Library("fastssl", "DEF")
Function = Callable[..., Any]


class Op:
    """An operation registered with torch.library, in two variants, with its derivatives.

    Args:
        schema: its name and signature. A name that ends in "_" is that of an operation in place.
        backward: the signature of its backward pass, an operation too; see `_derivative.py` for the names in it. None
            where there is no derivative.
        fake: the outputs, of their shapes and dtypes, from fake inputs; a pair where that of `backward` is not derived.
            None for operations in place.
        portable: the operation in plain PyTorch, for any device and floating dtype, in O(B D) memory; with `backward` a
            pair, of both passes.
        share: (rows, *arguments) -> 0-d, where `arguments` are some of `backward`'s, by their names: what these rows
            add to the sum of <grad_output, output> over the outputs. Second derivatives are computed from it.
        blocks: (*arguments) -> slices of rows that `share` takes one at a time; None: all at once.
        linear: in place of `share`: the operation is linear in the inputs that have gradients.
        derivative: in place of `backward`: (setup_context, formula) as of a torch.autograd.Function, but that formula
            is (ctx, variant, *grads), `variant` the attribute of an Op that ran forward, "auto" or "portable".
        triton: the file of fastssl.kernels with the Triton launchers, which have the names of the operation and of its
            backward operation.
        cuda: in place of `triton`: code for CUDA tensors, or a pair as `portable`; None: the portable code.
    """

    def __init__(
        self,
        schema: str,
        *,
        portable: Function | tuple[Function, Function],
        fake: Function | tuple[Function, Function] | None = None,
        backward: str | None = None,
        share: Function | None = None,
        blocks: Function | None = None,
        linear: bool = False,
        derivative: tuple[Function, Function] | None = None,
        triton: str | None = None,
        cuda: Function | tuple[Function | None, Function | None] | None = None,
    ) -> None:
        self.name = name = schema.split("(", 1)[0]
        (fake, backward_fake), (portable, backward_portable), (cuda, backward_cuda) = map(_pair, (fake, portable, cuda))
        self._numbers = numbers_in(schema)
        if triton is not None:
            cuda = triton_launcher(triton, name, self._numbers)
            if backward is not None:
                backward_cuda = triton_launcher(triton, f"{name}_backward", numbers_in(f"{name}_backward{backward}"))
        self.auto, self.portable = _register(schema, fake or _nothing, portable, cuda)
        if backward is not None:
            names = Derivative(schema, f"{name}_backward{backward}")
            backward_ops = _register(names.backward, backward_fake or names.fake, backward_portable, backward_cuda)
            for variant, backward_op in zip(_VARIANTS, backward_ops, strict=True):
                second = names.of_linear(partial(_call, self, variant)) if linear else names.second(share, blocks)
                scale_ = partial(_scale_, variant)
                self._differentiate(variant, *names.first(_differentiable(backward_op, *second), scale_))
        elif derivative is not None:
            setup_context, formula = derivative
            for variant in _VARIANTS:
                self._differentiate(variant, setup_context, partial(_in_variant, formula, variant))

    def _differentiate(self, variant: str, setup_context: Function, formula: Function) -> None:
        setattr(self, variant, _differentiable(getattr(self, variant), setup_context, formula))

    def __call__(self, *args: Any) -> Any:
        return (self.portable if current_backend() == "portable" else self.auto)(*as_tensors(args, self._numbers))


_VARIANTS = "auto", "portable"


def _pair(x: Any) -> tuple[Any, Any]:
    return x if isinstance(x, tuple) else (x, None)


def _nothing(*_: Any) -> None:
    """The result of an operation in place."""


def _call(op: Op, variant: str, *args: Any) -> Any:
    return getattr(op, variant)(*args)


def _scale_(variant: str, tensors: list[Tensor], factor: Tensor) -> None:
    """`scale_` of its own file, as the operation that calls it is registered."""
    getattr(torch.ops.fastssl, "scale_" if variant == "auto" else portable_name("scale_"))(tensors, factor)


def _in_variant(formula: Function, variant: str, ctx: Any, *grads: Tensor) -> Any:
    return formula(ctx, variant, *grads)


def _register(
    schema: str, fake: Function, portable: Function, cuda: Function | None
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Both variants of an operation, without derivatives."""
    name, signature = schema.split("(", 1)
    portable = _without_autocast(taking_tensors(portable, numbers_in(schema)))
    variants = name, portable_name(name)
    for variant in variants:
        _library.define(f"{variant}({with_tensors(signature)}")
        _library.impl(variant, portable, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastssl::{variant}", fake, lib=_library)
    if cuda is not None:
        _library.impl(name, _without_autocast(cuda), "CUDA")
    return tuple(getattr(torch.ops.fastssl, variant).default for variant in variants)


def portable_name(name: str) -> str:
    """The name of an operation's portable variant: "nt_xent_portable", or "enqueue_portable_" of "enqueue_"."""
    return f"{name}portable_" if name.endswith("_") else f"{name}_portable"


def triton_launcher(family: str, name: str, numbers: Sequence[int] = ()) -> Function | None:
    """The launcher `name` of fastssl.kernels' `family`, imported at its first call; None where Triton is not installed.

    float64 goes to the portable variant. The last argument is the precision of products; where there are none, the
    dtype of the first argument says.
    """
    if find_spec("triton") is None:
        return None

    def launch(*args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if (args[-1] == "float64") if isinstance(args[-1], str) else (first.dtype == torch.float64):
            return getattr(torch.ops.fastssl, portable_name(name))(*args)
        run = taking_tensors(getattr(import_module(f"fastssl.kernels.{family}"), name), numbers)
        with torch.cuda.device_of(first):  # where Triton launches: not always the current device
            return run(*args)

    return launch


def _without_autocast(function: Function) -> Function:
    """`function`, with its products in the dtypes it asks for: autocast's dtype is already in the precision
    argument."""

    def run(*args: Any) -> Any:
        first = args[0]
        if not isinstance(first, Tensor) or not autocast_available(first.device.type):  # lists are not multiplied
            return function(*args)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args)

    return run


def _differentiable(op: torch._ops.OpOverload, setup_context: Function, formula: Function) -> Function:
    """`op` with its derivative, callable under torch.func's transforms too.

    torch.library's own autograd registration does not yet work under torch.func, which needs a torch.autograd.Function;
    the same formula serves both.
    """
    torch.library.register_autograd(op._name, formula, setup_context=setup_context, lib=_library)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return _apply(op, setup_context, formula, args)
        return op(*args)

    return call


def _apply(op: torch._ops.OpOverload, setup_context: Function, formula: Function, args: Sequence[Any]) -> Any:
    """`op` as a torch.autograd.Function, which takes tensors, but no lists of them."""
    flat, inputs = flattened(args)
    outputs: list[int | None] = []
    single = len(op._schema.returns) == 1

    def forward(*flat: Any) -> Any:
        result = op(*nested(flat, inputs))
        tensors, outputs[:] = flattened([result] if single else result)
        return tuple(tensors)

    def setup(ctx: Any, flat: tuple, output: Any) -> None:
        result = nested(output, outputs)
        setup_context(ctx, tuple(nested(flat, inputs)), result[0] if single else tuple(result))

    def backward(ctx: Any, *grads: Tensor) -> tuple:
        needs = tuple(nested(ctx.needs_input_grad, inputs))
        gradients = formula(_Context(ctx, needs), *nested(grads, outputs))
        pairs = zip(gradients, inputs, strict=True)
        return tuple(flattened(g if n is None else g or [None] * n for g, n in pairs)[0])

    methods = {"forward": forward, "setup_context": setup, "backward": backward}
    function = type(op._opname, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})
    result = nested(function.apply(*flat), outputs)
    return result[0] if single else tuple(result)


class _Context:
    """That of a torch.autograd.Function, but that `needs_input_grad` is as the arguments are, with lists."""

    def __init__(self, ctx: Any, needs_input_grad: tuple) -> None:
        self._ctx, self.needs_input_grad = ctx, needs_input_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)
