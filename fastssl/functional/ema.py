"""Moving averages."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from fastssl import reference
from fastssl._checks import (
    check_adamw,
    check_not_negated,
    check_same_kind,
    check_scalar,
    check_share,
    check_tensor,
    check_tensors,
    check_value,
)
from fastssl.ops import current_backend, ema
from fastssl.ops._fake import mode_of
from fastssl.ops._numbers import as_tensor


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """Exponential moving average, in place: the teacher of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO.

        target = momentum target + (1 - momentum) source

    for all pairs in one pass over memory, in float32 arithmetic where both have 32 or 16 bits.

    Args:
        targets: tensors of any shape, float32, bfloat16, float16 or float64; changed.
        sources: as many, each with its target's shape and device, and of any of those dtypes. No target may share
            memory, from its first element to its last, with another tensor, unless source and target are the same
            tensor. Where a target is a DTensor its source is one, too, sharded alike; each process updates its shard.
        momentum: from 0, which copies, to 1, which leaves the targets as they are: a number, or a 0-d tensor. The
            value of one on a GPU is not checked, so that nothing waits for it.

    Raises:
        TypeError: if a target or a source is no tensor, or momentum neither number nor tensor.
        ValueError: before anything is changed, if numbers, shapes, dtypes or devices do not fit, momentum is below 0 or
            above 1, a target shares memory, or a CUDA graph is captured and momentum is not on the GPU: every replay
            would take the number of the capture.
    """
    lists = {name: check_tensors(name, x) for name, x in (("targets", targets), ("sources", sources))}
    momentum = _check_momentum(momentum, lists["targets"])
    if _captured(lists["targets"]) and not (isinstance(momentum, Tensor) and momentum.is_cuda):
        raise ValueError(f"momentum must be a tensor on the GPU while a CUDA graph is captured, got {momentum}")
    try:
        _update_(lists, momentum)
    except (RuntimeError, AssertionError):
        _explain(lists, momentum=momentum)
        raise


@torch.no_grad()
def adamw_ema_step_(
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    ema_params: Iterable[Tensor],
    steps: Iterable[Tensor],
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    momentum: float | Tensor,
) -> None:
    """AdamW's step (arXiv:1711.05101), then `ema_update_` with the new parameters, in one pass over memory, in place:

        step = step + 1
        exp_avg = beta1 exp_avg + (1 - beta1) grad
        exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) grad^2
        param = (1 - lr weight_decay) param
                - lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
        ema_param = momentum ema_param + (1 - momentum) param

    The arithmetic is torch.optim.AdamW's. `fastssl.optim.AdamW` keeps the states.

    Args:
        params: tensors of any shape, float32 or float64; changed.
        grads: as many, each of its parameter's shape, dtype and device.
        exp_avgs, exp_avg_sqs: likewise; zeros before the first step; changed.
        ema_params: the teacher's parameters, of the same shapes and devices, float32, bfloat16, float16 or float64;
            changed. A parameter that has no teacher is its own.
        steps: 0-d float32 tensors on the CPU, a separate one for each parameter: how many steps it has taken; changed.
        lr: a number, or a 0-d tensor; if it is on a GPU, its value is not checked, and the CPU waits for it.
        betas: of the two averages, from 0 to below 1.
        eps, weight_decay: not negative.
        momentum: as `ema_update_`'s.

    No tensor that is changed may share memory, from its first element to its last, with another tensor.

    Raises:
        TypeError: if one of these is not what it is said to be: a tensor, a number.
        ValueError: before anything is changed, if numbers, shapes, dtypes or devices do not fit, lr, betas, eps,
            weight_decay or momentum is out of range, a gradient is sparse, memory is shared, or a CUDA graph is
            captured: every replay would be the step of the capture.
    """
    states = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    states |= {"ema_params": ema_params, "steps": steps}
    lists = {name: check_tensors(name, x) for name, x in states.items()}
    lr, betas, eps, weight_decay = check_adamw(lr, betas, eps, weight_decay)
    if _captured(lists["params"]):
        raise ValueError("steps must not be taken while a CUDA graph is captured, got one")
    if isinstance(lr, Tensor):
        _check_has_value("lr", lr, lists["params"])
    momentum = _check_momentum(momentum, lists["params"])
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
    try:
        _step_(lists, **numbers)
    except (RuntimeError, AssertionError):
        _explain(lists, **numbers)
        raise


def _update_(lists: dict[str, list[Tensor]], momentum: float | Tensor) -> None:
    targets, sources = _local(lists).values()
    if current_backend() == "reference":
        ema.check_pairs(targets, sources)
        reference.ema.ema_update_(targets, sources, momentum)
        return
    with mode_of(targets):
        momentum = as_tensor(momentum, torch.float64)
    devices = {x.device for x in (*targets, *sources)}
    if len(devices) > 1:
        ema.check_pairs(targets, sources)
    try:
        for part in _by_device(devices, [targets, sources]):
            ema.ema_update_(*part, momentum)
    except ValueError:
        ema.check_pairs(targets, sources)  # a kernel calls torch.int64 "long int"
        raise
    torch.autograd.graph.increment_version(lists["targets"])


def _step_(
    lists: dict[str, list[Tensor]],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum: float | Tensor,
) -> None:
    written = [x for name, xs in lists.items() if name != "grads" for x in xs]
    lists = _local({name: xs for name, xs in lists.items() if name != "steps"}) | {"steps": lists["steps"]}
    if current_backend() == "reference":
        ema.check_parameters(**lists)
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        reference.ema.adamw_ema_step_(**lists, **numbers)
        return
    with mode_of(lists["params"]):
        lr, momentum = as_tensor(lr, torch.float64, "cpu"), as_tensor(momentum, torch.float64)
    *tensors, steps = lists.values()
    devices = {x.device for some in tensors for x in some}
    if len(devices) > 1 or not all(step.is_cpu for step in steps):
        ema.check_parameters(**lists)
    try:
        for part in _by_device(devices, list(lists.values())):
            ema.adamw_ema_step_(*part, lr, *betas, eps, weight_decay, momentum)
    except ValueError:
        ema.check_parameters(**lists)  # likewise
        raise
    torch.autograd.graph.increment_version(written)


def _captured(tensors: list[Tensor]) -> bool:
    """Whether what is done to them now is done again, with the same numbers, at every replay of a CUDA graph."""
    if torch.compiler.is_compiling() or not any(x.is_cuda for x in tensors):
        return False
    return torch.cuda.is_current_stream_capturing()


def _check_momentum(momentum: float | Tensor, targets: list[Tensor]) -> float | Tensor:
    if not isinstance(momentum, Tensor):
        return check_share("momentum", momentum)
    _check_has_value("momentum", momentum, targets)
    momentum = check_scalar("momentum", momentum)
    check_value("momentum", momentum, check_share)
    return momentum


def _check_has_value(name: str, number: Tensor, tensors: list[Tensor]) -> None:
    if number.is_meta and not all(x.is_meta for x in tensors):
        raise ValueError(f"{name} must have a value, got a tensor on {number.device}")


def _explain(lists: dict[str, list[Tensor]], **numbers: object) -> None:
    """Names the tensor that PyTorch refused, if it is one of those that it refuses in its own words. Looking at every
    tensor before each call would cost more than small models take."""
    named = {f"{name}[{i}]": x for name, tensors in lists.items() for i, x in enumerate(tensors)}
    named |= {name: number for name, number in numbers.items() if isinstance(number, Tensor)}
    first = next(iter(named))
    for name, x in named.items():
        check_tensor(name, x)
        check_not_negated(name, x)
        if x.is_complex():
            raise ValueError(f"{name} must be real, got {x.dtype}")
        if not (x.is_meta or named[first].is_meta):
            check_same_kind(first, named[first], name, x)


def _local(lists: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """This process's shards in place of DTensors, which there can be only where their module was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not any(isinstance(x, module.DTensor) for tensors in lists.values() for x in tensors):
        return lists
    first = next(iter(lists))
    for i, (like, *others) in enumerate(zip(*lists.values(), strict=False)):
        for name, x in zip(list(lists)[1:], others, strict=True):
            layouts = [
                (y.shape, y.placements, y.device_mesh) if isinstance(y, module.DTensor) else None for y in (like, x)
            ]
            if layouts[0] != layouts[1]:
                found = " and ".join(
                    "a tensor that is not" if layout is None else f"{tuple(layout[0])} as {layout[1]} on {layout[2]}"
                    for layout in layouts
                )
                raise ValueError(f"{first}[{i}] and {name}[{i}] must be sharded alike, got {found}")
        if isinstance(like, module.DTensor) and any(placement.is_partial() for placement in like.placements):
            raise ValueError(f"{first}[{i}] must not be a partial sum, got {like.placements}")
    return {
        name: [x.to_local() if isinstance(x, module.DTensor) else x for x in tensors] for name, tensors in lists.items()
    }


def _by_device(devices: set[torch.device], lists: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """The lists, of each of the devices that the first one's tensors are on."""
    if len(devices) < 2:
        return [lists]
    pick = [[like.device == device for like in lists[0]] for device in devices]
    return [[list(itertools.compress(tensors, chosen)) for tensors in lists] for chosen in pick]
