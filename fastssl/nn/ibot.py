"""iBOT's loss of masked patches as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl._checks import (
    check_flag,
    check_memory,
    check_positive,
    check_positive_number,
    check_rows,
    check_same_kind,
    check_tensor,
    renamed,
)
from fastssl.functional import ibot_loss
from fastssl.nn.center import Center


class IBOTPatchLoss(nn.Module):
    """iBOT's loss of masked patches (arXiv:2111.07832; DINOv2, arXiv:2304.07193), with the center of the teacher's
    logits. It takes the place of lightly's class of this name; its state_dict is the same.

    Attributes: as the arguments, and `center`, a module with a buffer `center` of shape (1, output_dim).

    Args:
        output_dim: the number K of prototypes.
        teacher_temp: the teacher's temperature where forward is given none.
        student_temp: the student's temperature.
        center_mode, center_momentum, sinkhorn_iterations, center_once_per_step: as of `DINOLoss`.

    Raises:
        TypeError, ValueError: as `DINOLoss`.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        *,
        sinkhorn_iterations: int = 3,
        center_once_per_step: bool = False,
    ) -> None:
        super().__init__()
        self.teacher_temp = check_positive_number("teacher_temp", teacher_temp)
        self.student_temp = check_positive_number("student_temp", student_temp)
        once = check_flag("center_once_per_step", center_once_per_step)
        size = (1, check_positive("output_dim", output_dim))
        check_memory("output_dim", size, 4)
        self.center = Center(size, center_mode, center_momentum, once, sinkhorn_iterations)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | Tensor | None = None,
    ) -> Tensor:
        """The mean over the images of the mean loss of their masked patches. The center moves after it.

        Args:
            teacher_out: (N, K) logits of the N masked patches, in the order of the mask. They get no gradient.
            student_out: (N, K) likewise, of the student.
            mask: (B, H, W) bool, N times True. It may lie on another device.
            teacher_temp: the teacher's temperature.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.ibot_loss` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.ibot_loss`, or if the mask has another shape or dtype.
        """
        prototypes = self.center.center.shape[-1]
        for name, x in (("teacher_out", teacher_out), ("student_out", student_out)):
            check_rows(name, x, "(N, K)")
            if x.shape[1] != prototypes:
                raise ValueError(f"{name} must have output_dim, {prototypes}, columns, got shape {tuple(x.shape)}")
        check_tensor("mask", mask)
        if mask.dtype != torch.bool or mask.dim() != 3:
            raise ValueError(f"mask must be bool of shape (B, H, W), got {mask.dtype} of shape {tuple(mask.shape)}")
        check_same_kind("mask", mask, "student_out", student_out)
        weights = patch_weights(mask.flatten(1)).to(student_out.device)
        if weights.shape[0] != student_out.shape[0]:
            found = f"{weights.shape[0]} in mask and {student_out.shape[0]} in student_out"
            raise ValueError(f"mask and student_out must have the same number of masked patches, got {found}")
        teacher_temp = self.teacher_temp if teacher_temp is None else teacher_temp
        with renamed(
            student_logits="student_out",
            teacher_logits="teacher_out",
            student_temperature="student_temp",
            teacher_temperature="teacher_temp",
            temperature="teacher_temp",
        ):
            loss = ibot_loss(
                student_out,
                teacher_out,
                student_temperature=self.student_temp,
                teacher_temperature=teacher_temp,
                center=self.center.of(teacher_out, teacher_temp),
                weights=weights,
                reduction="sum",
            )
            self.center.update(teacher_out)
        return loss / mask.shape[0]

    def step_center(self) -> None:
        """Move the center by the forward passes since the last call; with center_once_per_step only."""
        self.center.step()


def patch_weights(mask: Tensor) -> Tensor:
    """1 / (masked patches of the image), for each of the masked patches of (B, L)."""
    return (1 / mask.sum(1, keepdim=True).clamp_min(1)).expand(mask.shape)[mask]
