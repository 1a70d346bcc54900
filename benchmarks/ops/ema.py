"""Moving averages of a model's parameters, alone and after AdamW's step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.ops.registry import Benchmark, Inputs, Size, in_place
from fastssl.functional import ema_update_

MOMENTUM = 0.996  # BYOL's, before training
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}


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


@torch.no_grad()
def _step_and(update: Callable[..., None], *lists: list[Tensor], momentum: float, **options: Any) -> None:
    """PyTorch's AdamW, then a moving average."""
    *states, ema_params, steps = lists
    beta1, beta2 = options.pop("betas")
    adamw(*states, [], steps, beta1=beta1, beta2=beta2, amsgrad=False, maximize=False, **options)
    update(ema_params, states[0], momentum)


def _fused() -> Callable[..., None]:
    """PyTorch's fused kernel wants the numbers of steps where the parameters are, and so keeps its own."""
    own: dict[torch.device, list[Tensor]] = {}
    step = functools.partial(_step_and, ema_update_, fused=True, **ADAMW, momentum=MOMENTUM)

    def run(*lists: list[Tensor]) -> None:
        device = lists[0][0].device
        if device not in own:
            own[device] = [x.to(device) for x in lists[-1]]
        step(*lists[:-1], own[device])

    return run


def _training(shapes: list[tuple[int, ...]]) -> Inputs:
    """params, grads, exp_avgs, exp_avg_sqs, ema_params, steps, after the first step."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(*shape, generator=generator) for shape in shapes] for _ in range(5)]
    for x in lists[3]:
        x.square_()
    return *lists, [torch.tensor(1.0) for _ in shapes]


Benchmark(
    "adamw_ema_step_",
    sizes=((12, 768),),
    memory_sizes=(),
    inputs=lambda size, dtype: _training(vit_shapes(*size)),
    traffic=lambda size, itemsize: 36 * _vit_elements(size),  # only gradients are not written
    needs=lambda size, itemsize: {"naive": 0, "fused": 0, "foreach": 8 * _vit_elements(size)},
    arguments={**ADAMW, "momentum": MOMENTUM},
    naive=functools.partial(_step_and, _loop, foreach=False),
    peers={
        "fused": _fused,
        "foreach": lambda: functools.partial(_step_and, _foreach, foreach=True, **ADAMW, momentum=MOMENTUM),
    },
    step=in_place,
    timed="one step and update",
    settle=lambda inputs, outputs: (*outputs, *inputs[4]),  # the teacher, too
    on_cpu=(5,),
    modes=("float32",),
)
