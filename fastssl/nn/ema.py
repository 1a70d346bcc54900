"""A teacher whose weights are an exponential moving average of a student's."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import functional
from fastssl._checks import check_choice, check_flag, check_number, check_positive, check_share, check_size

_MOMENTUM = 0.996


class EMA(nn.Module):
    """The moving average of a model: the teacher of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO
    (arXiv:2104.14294), or the weights that are evaluated.

        teacher = momentum teacher + (1 - momentum) student

    It begins as a copy of the model, is in evaluation mode, and gets no gradients. As in timm's ModelEmaV3, parameters
    and buffers are averaged if they are floating-point numbers, else copied (counts, complex numbers), and buffers that
    are not in the model's state_dict (masks, caches) are each model's own.

    16-bit parameters and buffers are kept in float32: a step of (1 - momentum) would be lost among their digits. A call
    of the teacher rounds them, and so takes what the model takes; `module` itself takes float32.

    A model that is to be sharded by torch.distributed.fsdp.fully_shard is given to EMA first; then both the model and
    `module` are sharded, alike.

    Args:
        model: the student. It is not kept: every `update` is given it.
        momentum: from 0 to 1.
        schedule: None, or what gives update k = 0, 1, ... its momentum:
            "cosine", BYOL's, from momentum up to 1 at update total_steps:
                1 - (1 - momentum) (cos(pi k / total_steps) + 1) / 2,
            "warmup", timm's, from 0, a copy, up to momentum:
                min(momentum, 1 - (1 + k / warmup_gamma)^-warmup_power).
        total_steps: of "cosine".
        warmup_gamma, warmup_power: of "warmup"; above 0.
        update_buffers: whether buffers are averaged and copied, such as a batch normalisation's statistics and its
            count. False leaves them alone: for teachers in training mode, which have their own.
        decay: timm's name for momentum, in its place.

    Attributes:
        module: the teacher.
        momentum, decay: the same number, which may be changed.
        step: () int64, how often it was updated; saved in state_dict. `load_state_dict` also takes a state_dict of the
            model, or of timm's ModelEmaV3, which have none: it stays what it is.

    Raises:
        TypeError: if model is no Module, or another argument of the wrong type.
        ValueError: if momentum is not from 0 to 1, the schedule and its numbers do not fit, or there can be no moving
            average of the model: parameters or buffers are not initialised yet, are sparse or of 8 bits, or it has been
            given to `fully_shard`.
    """

    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        momentum: float = _MOMENTUM,
        *,
        schedule: str | None = None,
        total_steps: int | None = None,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        update_buffers: bool = True,
        decay: float | None = None,
    ) -> None:
        super().__init__()
        if decay is not None and momentum != _MOMENTUM:
            raise ValueError(f"momentum or decay must be given, not both, got {momentum} and {decay}")
        check_choice("schedule", schedule, (None, "cosine", "warmup"))
        if (schedule != "cosine") != (total_steps is None):
            raise ValueError(f"total_steps must be a positive number with 'cosine', else None, got {total_steps}")
        if total_steps is not None:
            total_steps = check_positive("total_steps", total_steps)
        for name, number, default in (("gamma", warmup_gamma, 1.0), ("power", warmup_power, 2 / 3)):
            number = check_number(f"warmup_{name}", number)
            if number <= 0 or (schedule != "warmup" and number != default):
                raise ValueError(f"warmup_{name} must be positive, and is for 'warmup' alone, got {number}")
        self._momentum = torch.zeros((), dtype=torch.float64, device="cpu")  # a number would be compiled in
        self.momentum = check_share("momentum", momentum) if decay is None else check_share("decay", decay)
        self.schedule, self.total_steps = schedule, total_steps
        self.warmup_gamma, self.warmup_power = float(warmup_gamma), float(warmup_power)
        self.update_buffers = check_flag("update_buffers", update_buffers)
        self.module, self._low = _copy(model)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._known: tuple[Tensor, int, int] | None = None  # `step`, its version, and its value then

    @property
    def momentum(self) -> float:
        return self._momentum.item()

    @momentum.setter
    def momentum(self, momentum: float) -> None:
        self._momentum.fill_(check_share("momentum", momentum))

    @property
    def decay(self) -> float:
        return self.momentum

    @decay.setter
    def decay(self, decay: float) -> None:
        self.momentum = check_share("decay", decay)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output."""
        if not self._low:
            return self.module(*args, **kwargs)
        parameters = self.module.named_parameters()
        if next(_sharded(self.module), None):
            parameters = ()  # their dtype is what fully_shard was told
        tensors = *parameters, *self.module.named_buffers()
        kept = {name: x for name, x in tensors if name in self._low}
        low = {name: x.to(self._low[name]) for name, x in kept.items()}
        buffers = [name for name, _ in self.module.named_buffers() if name in low] if self.module.training else []
        before = {name: low[name].clone() for name in buffers}
        output = torch.func.functional_call(self.module, low, args, kwargs)
        with torch.no_grad():
            for name, x in before.items():  # what the call has written into buffers
                kept[name].copy_(torch.where(low[name] == x, kept[name], low[name]))
        return output

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> float | Tensor:
        """Move the teacher towards the student, and return the momentum with which it did.

        Args:
            model: the student, perhaps wrapped, as by DistributedDataParallel.
            step: None, or how many steps the student has taken, as timm counts them: the momentum is that of update
                step - 1, and 0 for the first if there is no schedule. The teacher counts on from there.

        Returns:
            A number; in what torch.compile compiles, a 0-d tensor.

        Raises:
            TypeError: if model is no Module, or step no integer.
            ValueError: if step is negative, or the model's parameters or buffers are not those of the model that the
                teacher is a copy of. Nothing is changed.
        """
        return self._update(model, functional.ema_update_, step)

    def _update(
        self,
        model: nn.Module,
        move: Callable[[list[Tensor], list[Tensor], float | Tensor], None],
        step: int | None = None,
    ) -> float | Tensor:
        """`update`, where move(targets, sources, momentum) takes the place of `ema_update_`."""
        _check_model(model)
        step = None if step is None else check_size("step", step)
        for sharded in (*_sharded(self.module), *_sharded(model)):
            sharded.reshard()  # what is gathered for a forward pass is not what is kept
        averaged, copied = self._pairs(model)
        momentum = self._momentum_now(step)
        move([target for target, _ in averaged], [source for _, source in averaged], momentum)
        for target, source in copied:
            target.copy_(source)
        self._advance(step)
        return momentum

    def _pairs(self, model: nn.Module) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Targets with their sources: those to average, and those to copy."""
        ours, theirs = (
            [*m.named_parameters(), *(_saved_buffers(m) if self.update_buffers else ())] for m in (self.module, model)
        )
        if len(ours) != len(theirs):
            names = [{name for name, _ in some} for some in (ours, theirs)]
            unlike = ", ".join(sorted(names[0] ^ names[1])[:5])
            raise ValueError(
                f"model must have the teacher's {len(ours)} tensors, got {len(theirs)}; not in both: {unlike}"
            )
        averaged, copied = [], []
        for (name, target), (_, source) in zip(ours, theirs, strict=True):
            if target.shape != source.shape:
                shapes = f"{tuple(target.shape)}, got {tuple(source.shape)}"
                raise ValueError(f"{name} of model must have the teacher's shape {shapes}")
            (averaged if target.is_floating_point() else copied).append((target, source))
        return averaged, copied

    def _momentum_now(self, step: int | None) -> float | Tensor:
        if torch.compiler.is_compiling():  # a number would be compiled in
            if self.schedule is None and step is None:
                return self._momentum
            at = self.step if step is None else torch.full((), max(step - 1, 0), device=self.step.device)
            return self._momentum_at(at.to(torch.float64))
        if self.schedule is None and step is None:
            return self.momentum
        at = self._count() if step is None else max(step - 1, 0)
        return self._momentum_at(torch.tensor(at, dtype=torch.float64, device="cpu")).item()

    def _momentum_at(self, step: Tensor) -> Tensor:
        """Of update `step`, which only where the caller counts updates matters without a schedule."""
        momentum = self._momentum.to(step.device)
        if self.schedule is None:
            return momentum * (step > 0)
        if self.schedule == "warmup":
            return torch.minimum(momentum, 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power)
        progress = (step / self.total_steps).clamp(max=1)
        return 1 - (1 - momentum) * (torch.cos(math.pi * progress) + 1) / 2

    def _count(self) -> int:
        """The value of `step`, which is read only where something else has written it: a GPU would be waited for."""
        if self._known is None or self._known[0] is not self.step or self._known[1] != self.step._version:
            self._known = self.step, self.step._version, int(self.step)
        return self._known[2]

    def _advance(self, step: int | None) -> None:
        if torch.compiler.is_compiling():
            self.step.add_(1) if step is None else self.step.fill_(step)
            return
        count = self._count() + 1 if step is None else step
        self.step.fill_(count)
        self._known = self.step, self.step._version, count

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = self.module.state_dict()
        is_ours = any(f"{prefix}module.{name}" in state_dict for name in names)
        if not is_ours and any(f"{prefix}{name}" in state_dict for name in names):  # it is the model's
            for name in [name for name in state_dict if name.startswith(prefix)]:
                state_dict[f"{prefix}module.{name.removeprefix(prefix)}"] = state_dict.pop(name)
            is_ours = True
        if is_ours and "step" not in self._non_persistent_buffers_set:
            state_dict.setdefault(f"{prefix}step", self.step)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, schedule={self.schedule!r}, total_steps={self.total_steps}"


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")


def _copy(model: nn.Module) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """One whose moving average can be kept, and which of its tensors had 16 bits."""
    _check_model(model)
    if next(_sharded(model), None):
        raise ValueError("model must not be sharded by fully_shard yet: shard it and the teacher's module afterwards")
    for name, x in model.named_parameters():
        if nn.parameter.is_lazy(x):
            raise ValueError(f"model must be initialised, but {name} waits for a first batch")
    module = copy.deepcopy(model).eval().requires_grad_(False)
    low = {}
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        if x.dtype in (torch.bfloat16, torch.float16):
            low[name], wide = x.dtype, x.data.float()
            wide = nn.Parameter(wide, requires_grad=False) if isinstance(x, nn.Parameter) else wide
            torch.utils.swap_tensors(x, wide)  # of a DTensor, .data cannot be set to another dtype
    for buffer in module.buffers():
        buffer.data = buffer.data.clone()  # to be written, it may be neither expanded nor a view of another one
    tensors = *module.named_parameters(), *_saved_buffers(module)
    averaged = {name: x for name, x in tensors if x.is_floating_point()}
    try:
        functional.ema_update_(averaged.values(), averaged.values(), 1.0)  # changes nothing
    except ValueError as error:
        names = list(averaged)
        found = re.sub(r"(?:targets|sources)\[(\d+)\]", lambda match: names[int(match[1])], str(error))
        raise ValueError(f"model must be one that can be averaged, but {found}") from None
    return module, low


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that its state_dict has, each once."""
    seen = set()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and buffer not in seen:
                seen.add(buffer)
                yield f"{path}.{name}" if path else name, buffer


def _sharded(model: nn.Module) -> Iterator[Any]:
    """Its modules that fully_shard was applied to, of which there can be any only where it was imported."""
    if fsdp := sys.modules.get("torch.distributed.fsdp"):
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))
