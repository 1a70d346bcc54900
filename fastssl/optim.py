"""Optimisers that move a teacher, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl._checks import check_adamw, check_flag
from fastssl.functional import adamw_ema_step_, ema_update_
from fastssl.nn import EMA
from fastssl.ops._fake import is_fake

_NUMBERS = ("lr", "betas", "eps", "weight_decay")
_VARIANTS = ("amsgrad", "maximize", "capturable", "differentiable")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` (arXiv:1711.05101) whose step also updates a teacher, in one pass over memory:

        optimizer = AdamW(student.parameters(), lr=1e-3, teacher=teacher, student=student)
        optimizer.step()  # was: optimizer.step(), then teacher.update(student)

    The numbers are the same, and so is the state_dict: each loads the other's. The teacher has a state_dict of its own.
    Schedules, parameter groups, hooks and `torch.amp.GradScaler` work as usual; when the scaler skips a step, the
    teacher does not move either.

    Args:
        params: float32 or float64 parameters, or groups of them; they may include parameters that are not the
            student's, such as a predictor's, and need not include all of the student's.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        foreach, fused: as torch.optim.AdamW's, kept for its checkpoints; the step is always fused.
        amsgrad, maximize, capturable, differentiable: False.
        teacher: the average that `step` updates, with the momentum that is due.
        student: the model that it follows.

    Raises:
        TypeError: if teacher is no EMA, student no Module, params are none, or what should be a number is none.
        ValueError: if numbers are out of range, parameters or gradients are of another dtype, or sparse, parameters of
            student and teacher differ in number or shape, `foreach` and `fused` are both True, or one of `amsgrad`,
            `maximize`, `capturable` and `differentiable` is, perhaps in a loaded group.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        teacher: EMA,
        student: nn.Module,
    ) -> None:
        if not isinstance(teacher, EMA):
            raise TypeError(f"teacher must be a fastssl.nn.EMA, got {type(teacher).__name__}")
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a Module, got {type(student).__name__}")
        shapes = [[tuple(p.shape) for p in model.parameters()] for model in (student, teacher.module)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"student must have the teacher's parameters, of shapes {shapes[1]}, got {shapes[0]}")
        _refuse_variants(dict(zip(_VARIANTS, (amsgrad, maximize, capturable, differentiable), strict=True)))
        how = {"foreach": foreach, "fused": fused}  # torch.optim.AdamW would refuse some, or scale gradients in `step`
        how = {name: flag if flag is None else check_flag(name, flag) for name, flag in how.items()}
        if foreach and fused:
            raise ValueError(f"foreach and fused must not both be True, got {foreach} and {fused}")
        try:
            params = list(params)
        except TypeError:
            raise TypeError(f"params must be parameters, or groups of them, got {type(params).__name__}") from None
        numbers = _checked(lr, betas, eps, weight_decay)
        try:
            super().__init__(params, **numbers)
        except (TypeError, ValueError) as error:
            raise type(error)(f"params must be those of an optimizer: {error}") from error
        self.defaults |= how
        for group in self.param_groups:
            group |= {name: value for name, value in how.items() if group[name] is None}
        self.teacher, self.student = teacher, student

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of AdamW and an update of the teacher. Returns what the closure does, which computes gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.teacher._update(self.student, self._move)
        return loss

    def _move(self, targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
        """Parameters that have a gradient take a step, and every target moves towards its source."""
        teachers = dict(zip(sources, targets, strict=True))
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in params]
            adamw_ema_step_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [teachers.pop(p, p) for p in params],
                [state["step"] for state in states],
                **{name: group[name] for name in _NUMBERS},
                momentum=momentum,
            )
        ema_update_(teachers.values(), teachers, momentum)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        _refuse_variants(param_group)
        numbers = {name: param_group.get(name, self.defaults[name]) for name in _NUMBERS}
        super().add_param_group(param_group | _checked(**numbers))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "teacher": self.teacher, "student": self.student}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            _refuse_variants(group | {"capturable": False})  # of others' checkpoints: what its steps did is the same
        super().__setstate__(state)
        for group in self.param_groups:
            group["capturable"] = False
        for of_param in self.state.values():
            of_param["step"] = of_param["step"].to("cpu", torch.float32)


def _refuse_variants(group: dict[str, Any]) -> None:
    for name in _VARIANTS:
        if check_flag(name, group.get(name, False)):
            raise ValueError(f"{name} must be False, got {group[name]}")


def _checked(lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    """Them by name, and as Python's own numbers, lest checkpoints hold numpy's."""
    lr, betas, eps, weight_decay = check_adamw(lr, betas, eps, weight_decay)
    if not isinstance(lr, Tensor):
        lr = float(lr)
    elif lr.is_meta or is_fake(lr):
        raise ValueError(f"lr must have a value, got a tensor that is {'meta' if lr.is_meta else 'fake'}")
    return {"lr": lr, "betas": tuple(map(float, betas)), "eps": float(eps), "weight_decay": float(weight_decay)}
