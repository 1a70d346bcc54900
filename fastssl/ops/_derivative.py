"""The derivative of an operation, from the names in its signature and in that of its backward pass.

The arguments of the backward operation are called

    grad_<output>   the gradient of an output; outputs without one are not differentiable
    needs_<input>   whether that input needs its gradient. If not, the values of the input are not read, and may have
                    changed since the forward pass; what is returned for it is empty, of no rows
    wants_<input>   the same, of an input whose values are read for other gradients
    size_<input>    the shape of an input, which need not be kept for its shape alone
    others          the input or the output of that name

and it returns grad_<input> of some inputs, each of that input's shape and dtype (autograd rounds a wider one). What
follows from that is said here for Python, and in csrc/cpu/autograd.cpp for C++, which takes no lists of tensors. Here
inputs, outputs and gradients may be such lists.

An operation may take its gradients in the forward pass, while what they need is in the cache. It returns them as

    kept_<input>    the gradient of the only differentiable output, which is 0-d then, by that input; an empty list, or
                    a tensor of no rows, where it was not taken

and the backward operation does not ask for them. The first backward pass multiplies them by the gradient of that
output, in place, and hands them out: if that is 1, as it mostly is, they are not touched. Every other backward pass,
one that is to be differentiated, and one that is traced call the backward operation: what was handed out is never
touched again.

The second derivative is the derivative of the backward operation. With L = sum <grad_output, output> over the outputs,
that operation returns L's derivatives by the inputs. Their product with directions u is L's derivative along u, to be
derived in turn by the inputs and by grad_<output>. L itself is a sum over rows, `share`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._portable import second_derivative

Function = Callable[..., Any]
Formula = tuple[Function, Function]  # setup_context and backward, as torch.library.register_autograd takes them


class Derivative:
    """The derivative of the operation `forward`, whose backward operation is `backward`; both are schemas.

    Raises:
        ValueError: if a name is none of those above.
    """

    def __init__(self, forward: str, backward: str) -> None:
        self.backward = backward
        forward_schema, backward_schema = (
            torch._C.parse_schema(f"fastssl::{schema}") for schema in (forward, backward)
        )
        inputs = [argument.name for argument in forward_schema.arguments]
        outputs = [output.name for output in forward_schema.returns]
        if len({*inputs, *outputs}) < len(inputs) + len(outputs):
            raise ValueError(f"inputs and outputs must have names that differ, got {forward}")
        self._inputs, self._outputs = inputs, outputs
        self._arguments = [argument.name for argument in backward_schema.arguments]
        self._tensors = {a.name for a in backward_schema.arguments for kind in _TENSORS if a.type.isSubtypeOf(kind)}
        # Of the inputs that have gradients, and of the outputs.
        self._point = [_stripped("grad_", result.name, inputs, backward) for result in backward_schema.returns]
        self._cotangents = [name for name in self._arguments if name.startswith("grad_")]
        self._differentiable = [_stripped("grad_", name, outputs, backward) for name in self._cotangents]
        # Where the formula gets each argument from: its own arguments, needs_input_grad, or what was kept.
        self._kept = []
        for name in self._arguments:
            if name.startswith(_NEEDS):
                _stripped(name[: name.index("_") + 1], name, self._point, backward)
            elif name not in self._cotangents:
                self._kept.append(name)
                if name not in {*inputs, *outputs}:
                    _stripped("size_", name, inputs, backward)
        self._unread = {name for name in self._kept if f"needs_{name}" in self._arguments}
        self._taken = [name for name in outputs if name.startswith("kept_") and name not in self._arguments]
        if self._taken:
            if len(self._cotangents) > 1:
                raise ValueError(f"gradients can be taken in the forward pass of one output only, got {backward}")
            if (taken := [_stripped("kept_", name, inputs, forward) for name in self._taken]) != self._point:
                raise ValueError(f"gradients must be kept of {', '.join(self._point)}, got {', '.join(taken)}")

    def fake(self, *arguments: Any) -> Any:
        """What the backward operation returns for fake inputs."""
        values = dict(zip(self._arguments, arguments, strict=True))
        gradients = []
        for name in self._point:
            like = values[name]
            unneeded = not _is_needed(name, values)
            if isinstance(like, (list, tuple)):
                gradients.append([x.new_empty(x.shape) for x in like])
            else:
                gradients.append(like.new_empty((0, *like.shape[1:]) if unneeded else like.shape))
        return tuple(gradients) if len(gradients) > 1 else gradients[0]

    def first(self, backward_op: Function, scale_: Function) -> Formula:
        """The derivative of the operation. It calls `backward_op`, or scale_(tensors, factor), which is in place."""
        saved_names = [name for name in self._kept if name in self._tensors and name not in self._unread]
        other_names = [name for name in self._kept if name not in saved_names]

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            values = dict(zip((*self._inputs, *self._outputs), (*inputs, *outputs), strict=True))
            tensors, ctx.structure = flattened(values[name] for name in saved_names)
            ctx.save_for_backward(*tensors)
            ctx.others = [
                values[name] if name in values else values[name.removeprefix("size_")].shape for name in other_names
            ]
            # save_for_backward would refuse to go on once a tensor has been overwritten, even if nobody reads it.
            ctx.versions = {name: _version_of(values[name]) for name in self._unread}
            constant, _ = flattened(values[name] for name in self._outputs if name not in self._differentiable)
            ctx.mark_non_differentiable(*constant)
            if self._taken:
                ctx.set_materialize_grads(False)  # zeros as large as what was kept, which nobody would read
                taken = [values[name] for name in self._taken]
                ctx.taken = [taken] if any(map(len, taken)) else []  # at most one, for the backward pass that gets it

        def formula(ctx: Any, *grads: Any) -> tuple:
            needs = dict(zip(self._inputs, ctx.needs_input_grad, strict=True))
            if self._taken and (found := _taken(ctx, dict(zip(self._outputs, grads, strict=True)), needs)) is not None:
                return found
            values = dict(zip(other_names, ctx.others, strict=True))
            for name, version in ctx.versions.items():
                _check_version(name, values[name], version, needs[name])
            values.update(zip(saved_names, nested(ctx.saved_tensors, ctx.structure), strict=True))
            values.update(zip((f"grad_{name}" for name in self._outputs), grads, strict=True))
            values.update((prefix + name, needs[name]) for name in self._point for prefix in _NEEDS)
            results = backward_op(*(values[name] for name in self._arguments))
            return _of_inputs(results if len(self._point) > 1 else (results,), needs)

        def _taken(ctx: Any, grads: dict[str, Any], needs: dict[str, Any]) -> tuple | None:
            """What the forward pass took, or None."""
            (name,) = self._differentiable
            if grads[name] is None:
                return _of_inputs([None] * len(self._point), needs)
            if torch.is_grad_enabled() or not ctx.taken:
                return None
            gradients = ctx.taken.pop()
            tensors, _ = flattened(gradients)
            if not all(type(x) is Tensor for x in tensors):  # a tracer's: it would take what is in place for the output
                return None
            scale_(tensors, grads[name])
            return _of_inputs(gradients, needs)

        def _of_inputs(gradients: Sequence[Any], needs: dict[str, Any]) -> tuple:
            """Of all inputs: what `needs` has a list for gets one."""
            given = dict(zip(self._point, gradients, strict=True))
            return tuple(_where_needed(given.get(name), needs[name]) for name in self._inputs)

        return setup_context, formula

    def second(self, share: Function, blocks: Function | None) -> Formula:
        """The derivative of the backward operation. `share` and `blocks` are those of `Op`."""
        share_names, block_names = list(inspect.signature(share).parameters)[1:], []
        if blocks is not None:
            block_names = list(inspect.signature(blocks).parameters)
        used = {*share_names, *block_names, *self._cotangents, *self._point}
        tensor_names = [name for name in self._arguments if name in used and name in self._tensors]
        other_names = [name for name in self._arguments if name not in self._tensors]

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            values = dict(zip(self._arguments, inputs, strict=True))
            tensors, ctx.structure = flattened(values[name] for name in tensor_names)
            ctx.save_for_backward(*tensors)
            ctx.others = [values[name] for name in other_names]

        def formula(ctx: Any, *directions: Any) -> tuple:
            others = (x.item() if isinstance(x, Tensor) else x for x in ctx.others)  # numbers
            saved = nested(ctx.saved_tensors, ctx.structure)
            values = dict(zip((*tensor_names, *other_names), (*saved, *others), strict=True))
            needed = [_is_needed(name, values) for name in self._point]
            (cotangents, structure), (point, point_structure) = (
                flattened(values[name] for name in names) for names in (self._cotangents, self._point)
            )
            directions = zip(directions, needed, self._point, strict=True)
            directions, _ = flattened(u if n else torch.zeros_like(values[name]) for u, n, name in directions)
            structure = structure + point_structure

            def by_name(tensors: Sequence[Tensor]) -> dict[str, Any]:
                return dict(zip((*self._cotangents, *self._point), nested(tensors, structure), strict=True))

            def sum_of(rows: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
                given = by_name((*cotangents, *point))
                return share(rows, *(given.get(name, values.get(name)) for name in share_names))

            slices = [slice(None)] if blocks is None else blocks(*(values[name] for name in block_names))
            gradients = by_name(second_derivative(sum_of, slices, cotangents, point, directions, cotangents[0].dtype))
            return tuple(
                _where_needed(gradients.get(name), needs)
                for name, needs in zip(self._arguments, ctx.needs_input_grad, strict=True)
            )

        return setup_context, formula

    def of_linear(self, op: Function) -> Formula:
        """The derivative of the backward operation of `op`, which is linear: `op` of the directions."""
        names = [name for name in self._kept if name in self._inputs]

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            values = dict(zip(self._arguments, inputs, strict=True))
            ctx.save_for_backward(*(values[name] for name in names))
            ctx.needs = [_is_needed(name, values) for name in self._point]

        def formula(ctx: Any, *directions: Tensor) -> tuple:
            values = dict(zip(names, ctx.saved_tensors, strict=True))
            along = (
                (name, u if needed else None)
                for name, u, needed in zip(self._point, directions, ctx.needs, strict=True)
            )
            values.update(along)
            result = op(*(values[name] for name in self._inputs))
            return tuple(result if name in self._cotangents else None for name in self._arguments)

        return setup_context, formula


_TENSORS = torch.OptionalType(torch.TensorType.get()), torch.ListType(torch.TensorType.get())
_NEEDS = "needs_", "wants_"


def _is_needed(name: str, values: dict[str, Any]) -> bool:
    """Whether an input's gradient is, as the backward operation's arguments say."""
    return all(values.get(prefix + name, True) for prefix in _NEEDS)


def flattened(values: Iterable[Any]) -> tuple[list[Any], list[int | None]]:
    """The tensors among `values` and in lists among them; and the lengths of the lists, None for what is none."""
    flat, structure = [], []
    for x in values:
        is_list = isinstance(x, (list, tuple)) and all(y is None or isinstance(y, Tensor) for y in x)
        flat += x if is_list else [x]
        structure.append(len(x) if is_list else None)
    return flat, structure


def nested(flat: Sequence[Any], structure: Iterable[int | None]) -> list[Any]:
    """The inverse of `flattened`."""
    rest = iter(flat)
    return [next(rest) if count is None else list(islice(rest, count)) for count in structure]


def _where_needed(gradient: Any, needs: Any) -> Any:
    """None where it is not needed; both may be lists."""
    if isinstance(needs, (list, tuple)):
        return [_where_needed(*pair) for pair in zip(gradient or [None] * len(needs), needs, strict=True)]
    return gradient if needs else None


def _stripped(prefix: str, name: str, names: Sequence[str], schema: str) -> str:
    """`name` without `prefix`, one of `names`."""
    stripped = name.removeprefix(prefix)
    if not name.startswith(prefix) or stripped not in names:
        raise ValueError(f"{name} must be {prefix}<name> of one of {', '.join(names)}, in {schema}")
    return stripped


def _version_of(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _check_version(name: str, x: Tensor, version: int, needed: bool) -> None:
    if (needed or torch.is_grad_enabled()) and _version_of(x) != version:
        what = "its gradient" if needed else "a second derivative"
        raise RuntimeError(
            f"{name} was modified in place after the forward pass, and {what} needs its values:"
            f" it is at version {_version_of(x)}, expected {version}"
        )
