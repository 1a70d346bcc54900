"""A teacher whose weights are an exponential moving average of a student's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import functional
from fastssl._checks import check_number, check_share


class EMA(nn.Module):
    """The moving average of a model: the teacher of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO
    (arXiv:2104.14294), or the weights that are evaluated.

        teacher = momentum teacher + (1 - momentum) student

    It begins as a copy of the model, is in evaluation mode, and gets no gradients. 16-bit parameters and buffers are
    kept in float32: a step of (1 - momentum) would be lost among their digits.

    Args:
        model: the student. It is not kept: every `update` is given it.
        momentum: from 0 to 1; timm calls it decay.
        schedule: None, or what gives update k = 0, 1, ... its momentum:
            "cosine", BYOL's, from momentum up to 1 at update total_steps:
                1 - (1 - momentum) (cos(pi k / total_steps) + 1) / 2,
            "warmup", timm's, from 0, a copy, up to momentum:
                min(momentum, 1 - (1 + k / warmup_gamma)^-warmup_power).
        total_steps: of "cosine".
        warmup_gamma, warmup_power: of "warmup"; above 0.
        update_buffers: whether floating-point buffers are averaged, and others copied, such as a batch
            normalisation's statistics and its count. False leaves them alone: for teachers in training mode, which
            have their own.

    Attributes:
        module: the teacher.
        step: () int64, how often it was updated; saved in state_dict.

    Raises:
        ValueError: if momentum is not from 0 to 1, or the schedule and its numbers do not fit.
    """

    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.996,
        *,
        schedule: str | None = None,
        total_steps: int | None = None,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        update_buffers: bool = True,
    ) -> None:
        super().__init__()
        check_share("momentum", momentum)
        if schedule not in (None, "cosine", "warmup"):
            raise ValueError(f"schedule must be None, 'cosine' or 'warmup', got {schedule!r}")
        if (schedule != "cosine") != (total_steps is None) or (total_steps is not None and total_steps < 1):
            raise ValueError(f"total_steps must be a positive number with 'cosine', else None, got {total_steps}")
        for name, number, default in (("gamma", warmup_gamma, 1.0), ("power", warmup_power, 2 / 3)):
            check_number(f"warmup_{name}", number)
            if number <= 0 or (schedule != "warmup" and number != default):
                raise ValueError(f"warmup_{name} must be positive, and is for 'warmup' alone, got {number}")
        self.momentum, self.schedule, self.total_steps = momentum, schedule, total_steps
        self.warmup_gamma, self.warmup_power = warmup_gamma, warmup_power
        self.update_buffers = update_buffers
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        for x in (*self.module.parameters(), *self.module.buffers()):
            if x.dtype in (torch.bfloat16, torch.float16):
                x.data = x.data.float()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._steps: int | None = None  # the value of `step`, once read

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> float:
        """Move the teacher towards the student, and return the momentum with which it did.

        Raises:
            ValueError: if the model's parameters or buffers are not those of the model that the teacher is a copy of.
        """
        return self._update(model, functional.ema_update_)

    def _update(self, model: nn.Module, move: Callable[[list[Tensor], list[Tensor], float], None]) -> float:
        """`update`, where move(targets, sources, momentum) takes the place of `ema_update_`."""
        if self._steps is None:
            self._steps = int(self.step)
        momentum = self._momentum_at(self._steps)
        targets, sources = list(self.module.parameters()), list(model.parameters())
        copied = []
        if self.update_buffers:
            buffers, others = list(self.module.buffers()), list(model.buffers())
            if len(buffers) != len(others):
                raise ValueError(f"model must have as many buffers as the teacher, {len(buffers)}, got {len(others)}")
            for buffer, other in zip(buffers, others, strict=True):
                if buffer.shape != other.shape:
                    shapes = f"{tuple(buffer.shape)} and {tuple(other.shape)}"
                    raise ValueError(f"buffers of teacher and model must have the same shape, got {shapes}")
                if buffer.is_floating_point():
                    targets.append(buffer)
                    sources.append(other)
                else:
                    copied.append((buffer, other))
        move(targets, sources, momentum)
        for buffer, other in copied:
            buffer.copy_(other)
        self._steps += 1
        self.step += 1
        return momentum

    def _momentum_at(self, step: int) -> float:
        if self.schedule is None:
            return self.momentum
        if self.schedule == "warmup":
            return min(self.momentum, 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power)
        progress = min(step / self.total_steps, 1)
        return 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._steps = None

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, schedule={self.schedule!r}, total_steps={self.total_steps}"
