"""The loss classes of DINOv2 (arXiv:2304.07193), under their names and with their methods; and DINOv3's KoLeo.

In its training loop the teacher's methods return matrices of probabilities, which the losses then read. Here they
return a `TeacherDistribution`, which has the logits, the center and the temperature, so that no such matrix is written:
with Sinkhorn-Knopp, too, whose result is softmax((logits - center) / temperature). The losses take either. As they are
there, they are sums over all pairs of a student's and a teacher's view, those of the same number included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastssl._checks import check_positive, check_positive_number, check_rows, check_share, check_tensors
from fastssl.distributed import all_processes
from fastssl.functional import dino_loss, ibot_loss, koleo_loss, sinkhorn_center, update_center_
from fastssl.nn.ibot import patch_weights

__all__ = ["DINOLoss", "KoLeoLoss", "KoLeoLossDistributed", "TeacherDistribution", "iBOTPatchLoss"]


@dataclass(frozen=True)
class TeacherDistribution:
    """softmax((logits - center) / temperature), not computed.

    Indexing, iteration, and the methods that change a tensor's shape but for its last dimension, are those of the
    probabilities.
    """

    logits: Tensor  # (..., K)
    center: Tensor | None  # (K,)
    temperature: float | Tensor

    def materialize(self) -> Tensor:
        """The probabilities, of logits' shape, in float32."""
        logits = self.logits.float()
        return ((logits if self.center is None else logits - self.center) / self.temperature).softmax(-1)

    @property
    def shape(self) -> torch.Size:
        return self.logits.shape

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: Any) -> TeacherDistribution:
        return self._of(self.logits[index])

    def _of(self, logits: Tensor) -> TeacherDistribution:
        if logits.shape[-1:] != self.logits.shape[-1:]:
            raise ValueError(f"the last dimension must stay {self.logits.shape[-1]}, got shape {tuple(logits.shape)}")
        return TeacherDistribution(logits, self.center, self.temperature)


def _like_tensor(name: str) -> Callable[..., TeacherDistribution]:
    def method(self: TeacherDistribution, *args: Any, **kwargs: Any) -> TeacherDistribution:
        return self._of(getattr(self.logits, name)(*args, **kwargs))

    method.__name__, method.__doc__ = name, f"As torch.Tensor.{name}."
    return method


for _name in ("view", "reshape", "flatten", "squeeze", "unsqueeze", "detach", "contiguous"):
    setattr(TeacherDistribution, _name, _like_tensor(_name))


class _Loss(nn.Module):
    """The center of both losses."""

    def __init__(self, center: Tensor, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = check_positive_number("student_temp", student_temp)
        self.center_momentum = check_share("center_momentum", center_momentum)
        self.register_buffer("center", center)
        self._batch: list[Tensor] = []  # what is to move the center before it is next used

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> TeacherDistribution:
        """The distribution of logits (..., K) about the center, which the last `update_center` has moved."""
        self.apply_center_update()
        return TeacherDistribution(teacher_output.detach(), self.center.flatten().clone(), teacher_temp)

    def update_center(self, teacher_output: Tensor) -> None:
        """Let the mean of these logits, of all processes, move the center before it is next used."""
        self._batch = [teacher_output.detach()]

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Move the center now, if it has not moved since `update_center`."""
        if self._batch:
            rows = [x.flatten(0, -2) for x in self._batch]
            update_center_(self.center.view(-1), rows, self.center_momentum, all_processes())
            self._batch = []


class DINOLoss(_Loss):
    """DINOv2's loss of class tokens.

    Args:
        out_dim: the number K of prototypes.
        student_temp: the student's temperature.
        center_momentum: of the center's moving average.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__(torch.zeros(1, check_positive("out_dim", out_dim)), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> TeacherDistribution:
        """The assignments of logits (N, K) of this process to prototypes, by those of all processes."""
        return _sinkhorn(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_output_list: Sequence[Tensor],
        teacher_out_softmaxed_centered_list: TeacherDistribution | Tensor | Sequence[TeacherDistribution | Tensor],
    ) -> Tensor:
        """The sum over all pairs of views of the mean cross-entropy.

        Args:
            student_output_list: logits (B, K) of each view.
            teacher_out_softmaxed_centered_list: (B, K) distributions, or probabilities, of each of the teacher's views;
                or all of them in one, (T, B, K).

        Returns:
            0-d loss, in the dtype that `fastssl.functional.dino_loss` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.dino_loss`.
        """
        student = check_tensors("student_output_list", student_output_list)
        if not student:
            raise ValueError("student_output_list must have at least one view, got an empty list")
        student, teacher, center, temperature = _logits_of(student, list(teacher_out_softmaxed_centered_list))
        options = dict(student_temperature=self.student_temp, teacher_temperature=temperature, center=center)
        same = min(len(student), len(teacher))  # pairs of views of one number
        loss = sum(ibot_loss(*pair, **options) for pair in zip(student[:same], teacher[:same], strict=True))
        if unlike := len(student) * len(teacher) - same:
            loss = loss + unlike * dino_loss(student, teacher, **options)
        return loss


class iBOTPatchLoss(_Loss):
    """DINOv2's loss of masked patches.

    Args:
        patch_out_dim: the number K of prototypes.
        student_temp, center_momentum: as of `DINOLoss`.
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        size = (1, 1, check_positive("patch_out_dim", patch_out_dim))
        super().__init__(torch.zeros(size), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> TeacherDistribution:
        """The assignments of logits (N, K) of this process to prototypes, by those of all processes.

        n_masked_patches_tensor, their number, is that of the rows, and not read.
        """
        return _sinkhorn(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_patch_tokens: Tensor,
        teacher_patch_tokens: TeacherDistribution | Tensor,
        student_masks_flat: Tensor,
    ) -> Tensor:
        """The mean over the images of the mean loss of their masked patches.

        Args:
            student_patch_tokens: (B, L, K) logits of all patches.
            teacher_patch_tokens: (B, L, K) distributions, or probabilities.
            student_masks_flat: (B, L) bool, True where masked.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.ibot_loss` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.ibot_loss`.
        """
        check_rows("student_patch_tokens", student_patch_tokens, "(B, L, K)", 3)
        masks = student_masks_flat
        return self.forward_masked(student_patch_tokens[masks], teacher_patch_tokens[masks], masks)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: TeacherDistribution | Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """The same of the masked patches alone.

        Args:
            student_patch_tokens_masked: (N, K) logits; rows from n_masked_patches on are padding.
            teacher_patch_tokens_masked: (N, K) distributions, or probabilities; likewise.
            student_masks_flat: (B, L) bool, True where masked.
            n_masked_patches: None: all N.
            masks_weight: (n_masked_patches,) weights; None: 1 / (masked patches of the image).

        Returns:
            0-d loss, in the dtype that `fastssl.functional.ibot_loss` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.ibot_loss`.
        """
        check_rows("student_patch_tokens_masked", student_patch_tokens_masked, "(N, K)")
        student, teacher = (
            x[:n_masked_patches] for x in (student_patch_tokens_masked, teacher_patch_tokens_masked)
        )  # fmt: skip
        if masks_weight is None:
            masks_weight = patch_weights(student_masks_flat)
        (student,), (logits,), center, temperature = _logits_of([student], [teacher])
        loss = ibot_loss(
            student,
            logits,
            student_temperature=self.student_temp,
            teacher_temperature=temperature,
            center=center,
            weights=masks_weight,
            reduction="sum",
        )
        return loss / student_masks_flat.shape[0]


class KoLeoLoss(nn.Module):
    """DINOv2's KoLeo (arXiv:1806.03198)."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """The loss of (B, D) features; in float32, whatever autocast says."""
        with torch.autocast(student_output.device.type, enabled=False):
            return koleo_loss(student_output, eps=eps)


class KoLeoLossDistributed(nn.Module):
    """DINOv3's KoLeo (arXiv:2508.10104): the neighbours are rows of all processes, which may hold unlike numbers.

    Args:
        topk: neighbours of each row.
        loss_group_size: rows of a group of consecutive ones, within which neighbours are looked for; it divides the
            number of rows of all processes. None: all are one group.

    Raises:
        TypeError, ValueError: if topk or loss_group_size is no positive integer.
    """

    def __init__(self, topk: int = 1, loss_group_size: int | None = None) -> None:
        super().__init__()
        self.topk = check_positive("topk", topk)
        if loss_group_size is not None:
            loss_group_size = check_positive("loss_group_size", loss_group_size)
        self.loss_group_size = loss_group_size

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """The loss of this process's (B, D) features; in float32, whatever autocast says. Its gradient is that of the
        sum of all processes' losses.

        Raises:
            TypeError, ValueError: as `fastssl.functional.koleo_loss`.
        """
        with torch.autocast(student_output.device.type, enabled=False):
            return koleo_loss(
                student_output, eps=eps, topk=self.topk, group_size=self.loss_group_size, group=all_processes()
            )


def _sinkhorn(logits: Tensor, temperature: float, iterations: int) -> TeacherDistribution:
    logits = logits.detach()
    center = sinkhorn_center(logits, temperature=temperature, iterations=iterations, group=all_processes())
    return TeacherDistribution(logits, center, temperature)


def _logits_of(
    student: Sequence[Tensor], teacher: Sequence[TeacherDistribution | Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor | None, float | Tensor]:
    """Logits of both, in one dtype; the teacher's center and temperature. Probabilities are the softmax of their
    logarithms."""
    if not teacher:
        raise ValueError("teacher_out_softmaxed_centered_list must have at least one view, got an empty list")
    first = teacher[0]
    if all(isinstance(x, Tensor) for x in teacher):
        logits, center, temperature = [x.log() for x in teacher], None, 1.0
    elif all(isinstance(x, TeacherDistribution) for x in teacher):
        if any(x.center is not first.center or x.temperature is not first.temperature for x in teacher):
            raise ValueError("the teacher's views must have one center and one temperature, got unlike ones")
        logits, center, temperature = [x.logits for x in teacher], first.center, first.temperature
    else:
        kinds = ", ".join(type(x).__name__ for x in teacher)
        raise TypeError(f"the teacher's views must all be TeacherDistribution or all Tensor, got {kinds}")
    dtype = torch.promote_types(student[0].dtype, logits[0].dtype)
    return [x.to(dtype) for x in student], [x.to(dtype) for x in logits], center, temperature


VERSIONS = "0.0.1", "0.0.2"
REPLACES = {
    "dinov2.loss.dino_clstoken_loss.DINOLoss": DINOLoss,
    "dinov2.loss.ibot_patch_loss.iBOTPatchLoss": iBOTPatchLoss,
    "dinov2.loss.koleo_loss.KoLeoLoss": KoLeoLoss,
}
