"""Huge batches in small memory: every chunk is embedded twice, in the manner of GradCache (arXiv:2101.06983).

A contrastive loss L needs the embeddings z of all samples at once. It needs the encoder's activations, which take the
memory, only chunk by chunk, since the gradients of the encoder's parameters theta are

    dL/dtheta = sum over chunks c of  (dz_c/dtheta)^T dL/dz_c

So embed every chunk without a graph, take L and dL/dz, which the fused losses do in O(B D) memory, and embed every
chunk again, now with a graph, to go back from dL/dz_c. That costs a second forward pass, about a third of a plain step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastssl._arithmetic import without_autocast
from fastssl._checks import check_positive, check_tensor

Flag = bool | int | float | str | None
Inputs = Tensor | Sequence[Tensor | Flag] | Mapping[str, Tensor | Flag]
Encoder = Callable[..., Tensor | Sequence | Mapping]
Buffers = list[tuple[nn.Module, str, Tensor, Callable[[], bool]]]  # the last tells whether it is what it was
RandomState = tuple[Tensor, list[Tensor]]  # of the CPU, and of every CUDA device


def grad_cache(
    encoders: Encoder | Sequence[Encoder],
    inputs: Inputs | Sequence[Inputs],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int,
) -> Tensor:
    """The loss of a batch and its gradients, with the activations of one chunk in memory (arXiv:2101.06983).

    It takes the place of this, with gradients that are equal except for rounding:

        loss = loss_fn(*(encoder(x) for encoder, x in zip(encoders, inputs)))
        loss.backward()

    - Dropout and augmentation: both passes of a chunk start from the same random state of the default generators of the
      CPU and of CUDA.
    - Buffers are set back in between, so that a chunk updates them once. Batch normalisation takes its statistics from
      the chunk, as in gradient accumulation, not from the batch: this differs from the above. Buffers of a module that
      is called inside a function cannot be seen, and are updated twice.
    - Autocast: both forward passes run under the surrounding autocast block, backward passes without it. Gradient
      scaling: `loss_fn=lambda *z: scaler.scale(clip_loss(*z))`.
    - DistributedDataParallel, as an encoder or inside one, reduces gradients once, with its last chunk; in a function,
      where it cannot be seen, with every chunk, to the same result. Parameters that only loss_fn uses are not reduced.

    A batch of a single chunk is embedded once.

    Args:
        encoders: a module, a method of one, or a function; or a tuple or list of these, in which one may occur twice.
            Each returns embeddings, a tensor or a tuple, list or mapping of tensors, nested or not, such as a
            ModelOutput of transformers, with a row for each sample; None may be among them.
        inputs: of the encoder: a tensor x for encoder(x), a tuple or list for encoder(*x), a mapping for encoder(**x).
            It is cut along the first dimension of its tensors, and gets no gradient. None and flags (numbers and
            strings) among them go to every chunk as they are. Of several encoders: a tuple or list with one such input
            for each; they may differ in length, as queries and documents do.
        loss_fn: the loss of the outputs of all encoders, in their order, of which tuples and lists are unpacked. Other
            tensors in it, such as a learnable temperature, get their gradients too.
        chunk_size: the most samples that a chunk may have, at least 1. Chunks are alike in size, but for one sample.

    Returns:
        0-d loss without a graph. As after `backward`, gradients have been added to `.grad`.

    Raises:
        TypeError: if an encoder is not callable, inputs are not as above, chunk_size is no integer, or an encoder or
            loss_fn returns no tensors.
        ValueError: if there is not one input for each encoder, an input has no tensors or tensors that differ in
            length, or are not dense, chunk_size is not positive, an embedding has not a row for each sample, or the
            loss is not 0-d.
        RuntimeError: if the loss depends on nothing that requires a gradient.
    """
    if not isinstance(encoders, (tuple, list)):
        encoders, inputs = [encoders], [inputs]
    _check(encoders, inputs)
    chunk_size = check_positive("chunk_size", chunk_size)
    tasks = [_Task(encoder, x, chunk_size) for encoder, x in zip(encoders, inputs, strict=True)]
    if all(len(task.chunks) == 1 for task in tasks):
        return _differentiate(loss_fn, [z for task in tasks for z in task.arguments(task.embed(task.chunks[0]))])

    loss = _differentiate(loss_fn, [z for task in tasks for z in task.arguments(task.first_pass())])
    random_state, buffers = _random_state(), [buffer for task in tasks for buffer in task.copy_of_buffers()]
    learning = [task for task in tasks if any(z.grad is not None for z in task.embeddings)]
    last = {ddp: task for task in learning for ddp in task.parallel}
    for task in learning:
        task.second_pass(reduced=[ddp for ddp in task.parallel if last[ddp] is task])
    _set_random_state(random_state)
    _set_buffers(buffers)
    return loss


class _Task:
    """An encoder and its input, in chunks.

    Attributes:
        embeddings: after the first pass, as leaves.
        structure, is_tensor: of the last output, as a tree, and which of its leaves are embeddings.
    """

    def __init__(self, encoder: Encoder, x: Inputs, chunk_size: int) -> None:
        self.encoder = encoder
        self.chunks = _split(x, chunk_size)
        owner = getattr(encoder, "__self__", encoder)  # of a method
        self.modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
        self.parallel = [module for module in self.modules if isinstance(module, DistributedDataParallel)]

    def copy_of_buffers(self) -> Buffers:
        named = ((module, name, b) for module in self.modules for name, b in module.named_buffers(recurse=False))
        kept = ((module, name, b) for module, name, b in named if not is_lazy(b) and not _is_expanded(b))
        return [(module, name, b.clone(), _unwritten(module, name)) for module, name, b in kept]

    def embed(self, x: Inputs) -> list[Tensor]:
        """All embeddings; `arguments` makes of them what the loss is called with."""
        encoder = self.encoder
        output = encoder(x) if isinstance(x, Tensor) else encoder(**x) if isinstance(x, Mapping) else encoder(*x)
        outputs = list(output) if isinstance(output, (tuple, list)) else [output]
        outputs = tree_map(lambda leaf: dict(leaf) if isinstance(leaf, Mapping) else leaf, outputs)  # of unknown types
        leaves, self.structure = tree_flatten(outputs)
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        embeddings = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and leaf is not None]
        if others or not embeddings:
            raise TypeError(
                "encoders must return a tensor, or a tuple, list or mapping of tensors, got"
                f" {_type(others[0] if others else output)}"
            )
        rows = _length(x)
        for z in embeddings:
            if z.shape[:1] != (rows,):
                raise ValueError(f"encoders must return a row for each of {rows} samples, got shape {tuple(z.shape)}")
        return embeddings

    def arguments(self, embeddings: Sequence[Tensor]) -> list[Any]:
        """The encoder's output, in a list, or if it is a tuple or list what is in it, with those embeddings."""
        following = iter(embeddings)
        return tree_unflatten([next(following) if is_tensor else None for is_tensor in self.is_tensor], self.structure)

    def first_pass(self) -> list[Tensor]:
        """Embeds all chunks without a graph."""
        self.buffers, self.random_states, embeddings = self.copy_of_buffers(), [], []
        for x in self.chunks:
            self.random_states.append(_random_state())
            # The first chunk has a graph, dropped at once, which tells what embeddings require a gradient.
            with torch.set_grad_enabled(not embeddings), _no_reduction(self.parallel):
                embeddings.append([z.detach().requires_grad_(z.requires_grad) for z in self.embed(x)])
        whole = zip(*embeddings, strict=True)
        self.embeddings = [torch.cat(z).detach().requires_grad_(z[0].requires_grad) for z in whole]
        return self.embeddings

    def second_pass(self, reduced: list[DistributedDataParallel]) -> None:
        """Embeds all chunks again and goes back from the gradients of their embeddings; the last chunk reduces."""
        count = len(self.chunks)
        none = [None] * count
        gradients = zip(*(none if z.grad is None else z.grad.tensor_split(count) for z in self.embeddings), strict=True)
        _set_buffers(self.buffers)
        for i, (x, state, z_gradients) in enumerate(zip(self.chunks, self.random_states, gradients, strict=True)):
            _set_random_state(state)
            with _no_reduction(ddp for ddp in self.parallel if ddp not in reduced or i < count - 1):
                _backward(self.embed(x), z_gradients)


def _check(encoders: Sequence[Encoder], inputs: Sequence[Inputs]) -> None:
    for encoder in encoders:
        if not callable(encoder):
            raise TypeError(f"encoders must be callable, got {_type(encoder)}")
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(f"inputs of several encoders must be a tuple or list, got {_type(inputs)}")
    if not encoders or len(encoders) != len(inputs):
        raise ValueError(f"encoders and inputs must be as many, at least one, got {len(encoders)} and {len(inputs)}")
    for x in inputs:
        for value in _values(x):
            if not isinstance(value, Tensor) and (value is x or not isinstance(value, Flag)):
                raise TypeError(
                    "inputs must be tensors, or tuples, lists or mappings of tensors, None and flags, got"
                    f" {_type(value)}"
                )
        for value in _values(x):
            if isinstance(value, Tensor):
                check_tensor("a tensor of inputs", value)
        shapes = [tuple(value.shape) for value in _values(x) if isinstance(value, Tensor)]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(f"inputs of an encoder must have one length in common, got shapes {shapes}")


def _values(x: Inputs) -> list[Tensor | Flag]:
    return list(x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else [x])


def _length(x: Inputs) -> int:
    return next(len(value) for value in _values(x) if isinstance(value, Tensor))


def _split(x: Inputs, chunk_size: int) -> list[Inputs]:
    count = max(1, math.ceil(_length(x) / chunk_size))
    parts = (v.detach().tensor_split(count) if isinstance(v, Tensor) else [v] * count for v in _values(x))
    chunks = zip(*parts, strict=True)
    if isinstance(x, Mapping):
        return [dict(zip(x, chunk, strict=True)) for chunk in chunks]
    return [chunk[0] if isinstance(x, Tensor) else chunk for chunk in chunks]


def _differentiate(loss_fn: Callable[..., Tensor], arguments: list[Any]) -> Tensor:
    """The loss, whose gradients are added to those of the embeddings and of the loss's parameters."""
    loss = loss_fn(*arguments)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {_type(loss)}")
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a 0-d tensor, got shape {tuple(loss.shape)}")
    _backward([loss], [torch.ones_like(loss)])
    return loss.detach()


def _backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Back from those tensors that have a gradient; without autocast, which is for forward passes."""
    pairs = [(z, gradient) for z, gradient in zip(tensors, gradients, strict=True) if gradient is not None]
    with without_autocast(pairs[0][0]):
        torch.autograd.backward(*zip(*pairs, strict=True))


def _no_reduction(parallel: Iterable[DistributedDataParallel]) -> ExitStack:
    """Context in which their gradients stay in this process."""
    stack = ExitStack()
    for module in parallel:
        stack.enter_context(module.no_sync())
    return stack


def _random_state() -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])


def _set_buffers(buffers: Buffers) -> None:
    with torch.no_grad():
        for module, name, value, unwritten in buffers:
            if not unwritten():
                getattr(module, name).copy_(value)


def _unwritten(module: nn.Module, name: str) -> Callable[[], bool]:
    """Whether nothing has been written to an integer since. Writing it back, though the same, would make others, such
    as `EMA`, read it anew. Of other numbers nobody knows: batch normalisation does not count what it writes."""
    then = getattr(module, name)
    version = -1 if then.is_floating_point() or then.is_complex() or then.is_inference() else then._version
    return lambda: version >= 0 and getattr(module, name) is then and then._version == version


def _is_expanded(buffer: Tensor) -> bool:
    """Whether elements share memory. Nothing can write to them in place, so they need not be set back."""
    strided = buffer.layout == torch.strided
    return strided and any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))


def _type(value: object) -> str:
    return type(value).__name__
