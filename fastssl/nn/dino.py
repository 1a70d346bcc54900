"""DINO's loss as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastssl._checks import (
    check_flag,
    check_memory,
    check_positive,
    check_positive_number,
    check_rows,
    check_size,
    check_tensors,
    renamed,
)
from fastssl.functional import dino_loss
from fastssl.nn.center import Center


class DINOLoss(Center):
    """DINO's loss (arXiv:2104.14294), with the center of the teacher's logits. It takes the place of lightly's class of
    this name; its state_dict is the same.

    Attributes: as the arguments, and `center`, a buffer of shape (1, 1, output_dim).

    Args:
        output_dim: the number K of prototypes.
        warmup_teacher_temp: the teacher's temperature in epoch 0.
        teacher_temp: the teacher's temperature where forward is given neither temperature nor epoch, and after the
            warm-up.
        warmup_teacher_temp_epochs: the number of epochs in which the temperature goes from one to the other.
        student_temp: the student's temperature.
        center_momentum: of the center's moving average.
        center_mode: "mean", the moving average of the teacher's logits, or "sinkhorn_knopp" (DINOv2, arXiv:2304.07193),
            which finds a center for each batch, and moves none.
        sinkhorn_iterations: of that.
        center_once_per_step: False: each forward pass moves the center, as lightly's does. True: `step_center` does, by
            all forward passes since the last time, which belongs after an optimiser's step that took the gradients of
            several batches.

    Where torch.distributed has a default group, the center is that of the logits of all processes.

    Raises:
        TypeError, ValueError: if an argument is of another type, a temperature not positive, center_momentum not from
            0 to 1, or center_mode unknown.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        sinkhorn_iterations: int = 3,
        center_once_per_step: bool = False,
    ) -> None:
        once = check_flag("center_once_per_step", center_once_per_step)
        size = (1, 1, check_positive("output_dim", output_dim))
        check_memory("output_dim", size, 4)
        super().__init__(size, center_mode, center_momentum, once, sinkhorn_iterations)
        self.warmup_teacher_temp = check_positive_number("warmup_teacher_temp", warmup_teacher_temp)
        self.teacher_temp = check_positive_number("teacher_temp", teacher_temp)
        self.student_temp = check_positive_number("student_temp", student_temp)
        self.warmup_teacher_temp_epochs = check_size("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs)

    @property
    def center_momentum(self) -> float:
        return self.momentum

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | Tensor | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """The mean loss over pairs of unlike views and the batch. The center moves after it, see center_once_per_step.

        Args:
            teacher_out: the teacher's logits (B, K) of each of its views; or (T, B, K). They get no gradient.
            student_out: the student's logits of each view, those of the teacher's views first; or (S, B, K).
            teacher_temp: the teacher's temperature; None: that of the epoch.
            epoch: from 0; None: after the warm-up.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.dino_loss` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.dino_loss`.
        """
        if isinstance(teacher_out, Tensor):
            check_rows("teacher_out", teacher_out, "(T, B, K)", 3)
        else:
            teacher_out = check_tensors("teacher_out", teacher_out)
        if not isinstance(student_out, Tensor):
            student_out = check_tensors("student_out", student_out)
        columns, first = self.center.shape[-1], teacher_out[0] if len(teacher_out) else self.center
        if first.shape[-1:] != (columns,):
            raise ValueError(f"teacher_out must have output_dim, {columns}, columns, got shape {tuple(first.shape)}")
        if teacher_temp is None:
            teacher_temp = self.teacher_temp_of(epoch)
        with renamed(
            student_logits="student_out",
            teacher_logits="teacher_out",
            student_temperature="student_temp",
            teacher_temperature="teacher_temp",
            temperature="teacher_temp",
        ):
            loss = dino_loss(
                student_out,
                teacher_out,
                student_temperature=self.student_temp,
                teacher_temperature=teacher_temp,
                center=self.of(teacher_out, teacher_temp),
            )
            self.update(teacher_out)
        return loss

    def teacher_temp_of(self, epoch: int | None) -> float:
        """The teacher's temperature in this epoch, or after the warm-up."""
        if epoch is None or check_size("epoch", epoch) >= self.warmup_teacher_temp_epochs:
            return self.teacher_temp
        share = epoch / max(self.warmup_teacher_temp_epochs - 1, 1)
        return self.warmup_teacher_temp + share * (self.teacher_temp - self.warmup_teacher_temp)

    def update_center(self, teacher_out: Tensor) -> None:
        """Move the center towards the mean of these logits (T, B, K), as lightly's method does."""
        self.update(teacher_out)

    def step_center(self) -> None:
        """Move the center by the forward passes since the last call; with center_once_per_step only."""
        self.step()
