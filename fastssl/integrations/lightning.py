"""PyTorch Lightning, installed as `lightning` or as `pytorch_lightning`: a moving average as a callback, and
`fastssl.grad_cache` in a training step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import fastssl
from fastssl.grad_cache import Encoder, Inputs
from fastssl.nn import EMA

__all__ = ["EMACallback", "grad_cache"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[type, ...]:
    """Of what is imported, or installed: a trainer of either takes what is a Callback of both."""
    names = [name for name in _PACKAGES if name in sys.modules]
    names = names or [name for name in _PACKAGES if find_spec(name.split(".")[0])]
    if not names:
        raise ModuleNotFoundError("lightning or pytorch_lightning must be installed, and neither is", name="lightning")
    return tuple(import_module(name).Callback for name in names)


class EMACallback(*_callback_classes()):  # type: ignore[misc]
    """Keeps a moving average of a LightningModule, or of a part of it, and evaluates with it.

    It moves after every step of the optimiser, so not with every batch where gradients are accumulated. It is saved in
    checkpoints, and goes on from there where a run is resumed.

    Args:
        part: the name of a submodule, such as "backbone"; "": the whole.
        evaluate: whether validation, tests and predictions run with the averaged weights, in the module's place.
        **options: of `fastssl.nn.EMA`: momentum, schedule, total_steps, ...

    Attributes:
        teacher: the `fastssl.nn.EMA`; None before `fit`.
    """

    def __init__(self, part: str = "", *, evaluate: bool = True, **options: Any) -> None:
        super().__init__()
        self.part, self.evaluate, self.options = part, evaluate, options
        self.teacher: EMA | None = None
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, for a teacher that is not made yet
        self._step = 0
        self._students: dict[str, Tensor] | None = None  # what the teacher's weights stand in for

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._make(pl_module)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._step = trainer.global_step  # restored by now

    def _make(self, pl_module: nn.Module) -> None:
        student = pl_module.get_submodule(self.part)
        if self.teacher is None:
            self.teacher = EMA(student, **self.options)
        if self._loaded is not None:
            self.teacher.load_state_dict(self._loaded)
            self._loaded = None
        self.teacher.to(next(student.parameters()).device)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *args: Any) -> None:
        if self.teacher is not None and trainer.global_step != self._step:
            self._step = trainer.global_step
            self.teacher.update(pl_module.get_submodule(self.part))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.teacher is None else {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict.get("teacher")

    @torch.no_grad()
    def _swap_in(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._loaded is not None:
            self._make(pl_module)
        if self.evaluate and self.teacher is not None and self._students is None:
            student = pl_module.get_submodule(self.part)
            self._students = {name: x.clone() for name, x in student.state_dict().items()}
            student.load_state_dict(self.teacher.module.state_dict())

    @torch.no_grad()
    def _swap_out(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._students is not None:
            pl_module.get_submodule(self.part).load_state_dict(self._students)
            self._students = None

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        self._swap_out(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Checkpoints that are written in the midst of validation have the student's weights, too."""
        if self._students is not None:
            prefix = f"{self.part}." if self.part else ""
            checkpoint["state_dict"].update({f"{prefix}{name}": x for name, x in self._students.items()})


def grad_cache(
    pl_module: Any,
    encoders: Encoder | list[Encoder] | tuple[Encoder, ...],
    inputs: Inputs | list[Inputs] | tuple[Inputs, ...],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int,
) -> Tensor:
    """`fastssl.grad_cache` in the training step of a LightningModule with manual optimisation:

        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = grad_cache(self, (self.encoder, self.encoder), batch, self.loss, chunk_size=256)
            optimizer.step()

    It scales the loss where the trainer's precision is "16-mixed", and takes the mean of the gradients of all processes
    where there are several.

    Args:
        pl_module: the LightningModule.
        encoders, inputs, loss_fn, chunk_size: as of `fastssl.grad_cache`.

    Returns:
        0-d loss of this process, not scaled, without a graph.

    Raises:
        TypeError, ValueError, RuntimeError: as `fastssl.grad_cache`, or if the optimisation is automatic.
    """
    if pl_module.automatic_optimization:
        raise ValueError("pl_module.automatic_optimization must be False where gradients come from grad_cache")
    trainer, losses = pl_module.trainer, []

    def scaled(*embeddings: Any) -> Tensor:
        losses.append(loss_fn(*embeddings))
        return trainer.precision_plugin.pre_backward(losses[0], pl_module)

    fastssl.grad_cache(encoders, inputs, scaled, chunk_size=chunk_size)
    if trainer.world_size > 1:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
    return losses[0].detach()
