"""Exponential moving averages of lists of tensors, in place, alone and after AdamW's step: schemas and portable code.

    target = momentum target + (1 - momentum) source

There is no derivative. `momentum` is a 0-d tensor: on the CPU its value is read, on other devices nothing waits for it.
So is `lr`, which is on the CPU, like `steps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastssl.ops._op import Op

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BLOCK = 1 << 15  # elements


def check_pairs(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Checked by the kernels themselves, so that not every tensor is looked at in Python."""
    _check_lists({"targets": targets, "sources": sources}, ("targets",), "sources")


def check_parameters(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    """Checked by the kernels themselves, too."""
    alike = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if len(steps) != len(params):
        raise ValueError(f"params and steps must have the same length, got {len(params)} and {len(steps)}")
    for i, step in enumerate(steps):
        if step.dim() or step.dtype != torch.float32 or step.device.type != "cpu":
            found = f"{step.dtype} on {step.device} of shape {list(step.shape)}"
            raise ValueError(f"steps[{i}] must be a 0-d tensor, float32, on the CPU, got {found}")
    written = ("params", "exp_avgs", "exp_avg_sqs", "ema_params")
    _check_lists({"params": params, **alike, "ema_params": ema_params}, written, "ema_params", steps)
    for i, param in enumerate(params):
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params[{i}] must be float32 or float64, got {param.dtype}")
        for name, tensors in alike.items():
            if tensors[i].dtype != param.dtype:
                dtypes = f"{param.dtype} and {tensors[i].dtype}"
                raise ValueError(f"params[{i}] and {name}[{i}] must have the same dtype, got {dtypes}")


def _check_lists(
    lists: dict[str, Sequence[Tensor]], written: Sequence[str], may_be_first: str, steps: Sequence[Tensor] = ()
) -> None:
    """The lists must fit the first one, tensor by tensor, and what is written, as steps are, may share memory with
    nothing, but that a tensor of the list `may_be_first` may be that of the first."""
    first, likes = next(iter(lists.items()))
    for name, tensors in lists.items():
        if len(tensors) != len(likes):
            lengths = f"{len(likes)} and {len(tensors)}"
            raise ValueError(f"{first} and {name} must have the same length, got {lengths}")
    spans = []
    for i, like in enumerate(likes):
        for name, tensors in lists.items():
            x = tensors[i]
            if x.shape != like.shape:
                shapes = f"{list(like.shape)} and {list(x.shape)}"
                raise ValueError(f"{first}[{i}] and {name}[{i}] must have the same shape, got {shapes}")
            if x.device != like.device:
                devices = f"{like.device} and {x.device}"
                raise ValueError(f"{first}[{i}] and {name}[{i}] must be on the same device, got {devices}")
            if x.layout != torch.strided:
                raise ValueError(f"{name}[{i}] must be a dense tensor, got {x.layout}")
            if x.dtype not in _DTYPES:
                raise ValueError(f"{name}[{i}] must be of 16, 32 or 64 bits, floating-point, got {x.dtype}")
            if x.device.type == "meta" or x.numel() == 0:
                continue
            if x.untyped_storage().nbytes() == 0:
                raise ValueError(f"{name}[{i}] must have memory, got a tensor whose storage was freed")
            if name in written and _elements(x) < x.numel():
                raise ValueError(f"{name}[{i}] must have no two elements in one place, got strides {x.stride()}")
            same = (x.data_ptr(), x.stride(), x.dtype) == (like.data_ptr(), like.stride(), like.dtype)
            if name != may_be_first or not same:
                spans.append((*_span(x), f"{name}[{i}]", name in written))
    spans += [(*_span(step), f"steps[{i}]", True) for i, step in enumerate(steps)]
    last_end, last_name, written_end, written_name = 0, "", 0, ""
    for begin, end, name, is_written in sorted(spans):
        if begin < (last_end if is_written else written_end):
            pair = f"{name} and {last_name if is_written else written_name}"
            names = f"{', '.join(written)} and steps" if steps else written[0]
            raise ValueError(f"{names} must not share memory, got {pair}")
        if end > last_end:
            last_end, last_name = end, name
        if is_written and end > written_end:
            written_end, written_name = end, name


def _elements(x: Tensor) -> int:
    """From the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses from its first element to the end of its last."""
    return x.data_ptr(), x.data_ptr() + _elements(x) * x.element_size()


def _portable(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor) -> None:
    check_pairs(targets, sources)
    number = momentum.item() if momentum.device.type == "cpu" else momentum
    for batch in _batches(targets, sources):
        flat = [of[0] if len(of) == 1 else torch.cat([x.reshape(-1) for x in of]) for of in zip(*batch, strict=True)]
        wide = torch.promote_types(flat[0].dtype, torch.float32)
        averages = _average(*(x.to(wide) for x in flat), number)
        into = [target for target, _ in batch]
        parts = averages.split([target.numel() for target in into]) if len(into) > 1 else [averages]
        torch._foreach_copy_(into, [part.view_as(target) for part, target in zip(parts, into, strict=True)])


def _batches(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pairs, small ones together and large ones in parts: as much at a time as a cache holds and is worth a call."""
    batch, count, kind = [], 0, None
    for target, source in zip(targets, sources, strict=True):
        limit = _BLOCK if target.device.type == "cpu" else _BLOCK << 9
        parts = [(target, source)]
        if target.numel() > limit:
            rows = max(1, limit * target.shape[0] // target.numel())
            parts = zip(target.split(rows), source.split(rows), strict=True)
        for part in parts:
            size, alike = part[0].numel(), (target.device, target.dtype, source.dtype)
            if batch and (count + size > limit or alike != kind):
                yield batch
                batch, count = [], 0
            batch.append(part)
            count, kind = count + size, alike
    if batch:
        yield batch


def _average(target: Tensor, source: Tensor, momentum: float | Tensor) -> Tensor:
    """From the nearer of both, which leaves equal values as they are, -0 too; but where their difference is infinite or
    NaN, as that of infinities and of huge numbers may be, the sum. A momentum on another device is not waited for."""
    choose = torch.where if isinstance(momentum, Tensor) else _choose
    weight = 1 - momentum
    either = zip((source, target, momentum), (target, source, weight), strict=True)
    near, far, share = (choose(momentum < 0.5, x, y) for x, y in either)
    moved = near - (near - far) * share
    if target.device.type != "cpu" or not moved.sum().isfinite():
        moved = torch.where(moved.isfinite(), moved, momentum * target + weight * source)
    return choose(momentum == 0, source, choose(momentum == 1, target, moved))


def _choose(condition: bool, x: Tensor, y: Tensor) -> Tensor:
    return x if condition else y


def _portable_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum: Tensor,
) -> None:
    check_parameters(params, grads, exp_avgs, exp_avg_sqs, ema_params, steps)
    adamw(
        *map(list, (params, grads, exp_avgs, exp_avg_sqs, (), steps)),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr.item(),
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    _portable(ema_params, params, momentum)


ema_update_ = Op("ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum) -> ()", portable=_portable)

adamw_ema_step_ = Op(
    "adamw_ema_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] ema_params, Tensor(e!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay,"
    " Tensor momentum) -> ()",
    portable=_portable_adamw,
)
