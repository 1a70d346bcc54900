"""Moving averages of a model's parameters."""

from __future__ import annotations

import functools
import math

import torch
from registry import Benchmark, Inputs, Size, in_place
from torch import Tensor

MOMENTUM = 0.996  # BYOL's, before training


@torch.no_grad()
def _loop(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.mul_(momentum).add_(source, alpha=1 - momentum)


@torch.no_grad()
def _assign(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.data = momentum * target + (1 - momentum) * source


@torch.no_grad()
def _foreach(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    torch._foreach_lerp_(targets, [x.to(y.dtype) for x, y in zip(sources, targets, strict=True)], 1 - momentum)


def vit_shapes(depth: int, width: int) -> list[tuple[int, ...]]:
    """Of a ViT/16's parameters, for images of 224 x 224, without a head."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    embedding = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*embedding, *depth * block, (width,), (width,)]


def _tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Inputs:
    """float32 targets, sources of `dtype`, momentum."""
    generator = torch.Generator().manual_seed(0)
    targets, sources = ([torch.randn(*shape, generator=generator) for shape in shapes] for _ in range(2))
    return targets, [x.to(dtype) for x in sources], MOMENTUM


def _traffic(elements: int, itemsize: int) -> float:
    """Targets are read and written, sources read."""
    return elements * (8 + itemsize)


def _needs(elements: int, itemsize: int) -> dict[str, float]:
    return {"naive": 0, "assign": 12 * elements, "foreach": 0 if itemsize == 4 else 4 * elements}


def _vit_elements(size: Size) -> int:
    return sum(map(math.prod, vit_shapes(*size)))


_update = functools.partial(
    Benchmark,
    "ema_update_",
    memory_sizes=(),
    naive=_loop,
    peers={"assign": lambda: _assign, "foreach": lambda: _foreach},
    step=in_place,
    timed="one update",
    modes=("float32", "bfloat16"),
)

_update(
    sizes=((12, 768),),  # depth x width: ViT-B
    inputs=lambda size, dtype: _tensors(vit_shapes(*size), dtype),
    traffic=lambda size, itemsize: _traffic(_vit_elements(size), itemsize),
    needs=lambda size, itemsize: _needs(_vit_elements(size), itemsize),
)
_update(
    name="ema_of_small_tensors",
    sizes=((2000, 1000), (200, 1000)),  # tensors x elements
    inputs=lambda size, dtype: _tensors([size[1:]] * size[0], dtype),
    traffic=lambda size, itemsize: _traffic(math.prod(size), itemsize),
    needs=lambda size, itemsize: _needs(math.prod(size), itemsize),
)
