"""SwAV's loss as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastssl._checks import (
    check_compatible,
    check_flag,
    check_positive_number,
    check_rows,
    check_size,
    check_tensors,
    renamed,
)
from fastssl.distributed import ProcessGroup, all_processes, gather_rows
from fastssl.functional import dino_loss, ibot_loss, sinkhorn_center
from fastssl.ops._precision import accumulate_dtype


class SwaVLoss(nn.Module):
    """SwAV's loss (arXiv:2006.09882): each crop predicts the codes, by Sinkhorn-Knopp, of the other high-resolution
    crops. It takes the place of lightly's class of this name.

    A crop's codes are softmax((scores - center) / sinkhorn_epsilon) with the center of `sinkhorn_center`: they are
    never stored, and the loss is `dino_loss`.

    Attributes: as the arguments.

    Args:
        temperature: of the predictions.
        sinkhorn_iterations: of Sinkhorn-Knopp; 0: codes are shares of the whole batch, sum to its number of rows, and
            are no distributions.
        sinkhorn_epsilon: its temperature.
        sinkhorn_gather_distributed: let the codes be those of the batch of all processes.

    Raises:
        TypeError, ValueError: if an argument is of another type, a temperature not positive, or
            sinkhorn_gather_distributed is True and torch.distributed is not available.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = check_positive_number("temperature", temperature)
        self.sinkhorn_iterations = check_size("sinkhorn_iterations", sinkhorn_iterations)
        self.sinkhorn_epsilon = check_positive_number("sinkhorn_epsilon", sinkhorn_epsilon)
        self.sinkhorn_gather_distributed = check_flag("sinkhorn_gather_distributed", sinkhorn_gather_distributed)
        if sinkhorn_gather_distributed and not torch.distributed.is_available():
            name = "sinkhorn_gather_distributed"
            raise ValueError(f"{name} must be False where torch.distributed is not available, got True")

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor],
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The mean loss over pairs of a high-resolution crop and another crop.

        Args:
            high_resolution_outputs: scores (B, K) of K prototypes for each high-resolution crop.
            low_resolution_outputs: scores (B, K) for each of the others; may be empty.
            queue_outputs: for each high-resolution crop scores (Q, K) of earlier ones, which share its codes' batch.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.dino_loss` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.dino_loss` and `sinkhorn_center`, or if there are not as many
                queue_outputs as high_resolution_outputs.
        """
        high = check_tensors("high_resolution_outputs", high_resolution_outputs)
        low = check_tensors("low_resolution_outputs", low_resolution_outputs)
        if not high:
            raise ValueError("high_resolution_outputs must have at least one crop, got an empty list")
        batches = [[x] for x in high]
        if queue_outputs is not None:
            queues = check_tensors("queue_outputs", queue_outputs)
            if len(queues) != len(high):
                counts = f"{len(queues)} and {len(high)}"
                raise ValueError(f"queue_outputs and high_resolution_outputs must be as many, got {counts}")
            batches = [[x, queue] for x, queue in zip(high, queues, strict=True)]
        group = all_processes() if self.sinkhorn_gather_distributed else None
        options = dict(temperature=self.sinkhorn_epsilon, iterations=self.sinkhorn_iterations, group=group)
        crops = [*high, *low]
        names = [f"high_resolution_outputs[{i}]" for i in range(len(high))]
        names += [f"low_resolution_outputs[{i}]" for i in range(len(low))]
        for name, x in zip(names, crops, strict=True):
            _check_alike(name, x, names[0], high[0])
        for i, batch in enumerate(batches):
            for queue in batch[1:]:
                _check_alike(f"queue_outputs[{i}]", queue, names[0], high[0], same_rows=False)
        if not self.sinkhorn_iterations:
            return self._without_sinkhorn(crops, batches, group)
        # Each crop has a center of its own, subtracted here.
        centers = [sinkhorn_center(batch, **options) for batch in batches]
        codes = [x.detach() - center.to(x.dtype) for x, center in zip(high, centers, strict=True)]
        with renamed(
            student_logits="high_resolution_outputs",
            student_temperature="temperature",
            teacher_temperature="sinkhorn_epsilon",
        ):
            return dino_loss(
                crops, codes, student_temperature=self.temperature, teacher_temperature=self.sinkhorn_epsilon
            )

    def _without_sinkhorn(self, crops: list[Tensor], batches: list[list[Tensor]], group: ProcessGroup | None) -> Tensor:
        """A row's codes are its softmax times its share of all rows' exponentials."""
        if len(crops) < 2:
            raise ValueError(f"there must be at least two crops, got {len(crops)}")
        loss = crops[0].new_zeros(())
        for i, batch in enumerate(batches):
            scores = torch.cat(batch).detach().to(accumulate_dtype(batch[0].dtype)) / self.sinkhorn_epsilon
            lse = scores.logsumexp(1)
            all_lse = lse if group is None else gather_rows(lse, group)
            shares = (lse[: len(crops[i])] - all_lse.logsumexp(0)).exp() * len(all_lse) / len(crops[i])
            for v, crop in enumerate(crops):
                if v != i:
                    loss = loss + ibot_loss(
                        crop,
                        batch[0].detach(),
                        student_temperature=self.temperature,
                        teacher_temperature=self.sinkhorn_epsilon,
                        weights=shares,
                        reduction="sum",
                    )
        return loss / (len(batches) * (len(crops) - 1))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, sinkhorn_epsilon={self.sinkhorn_epsilon}"


def _check_alike(name: str, x: Tensor, name1: str, x1: Tensor, same_rows: bool = True) -> None:
    """x is a matrix of the first crop's width, dtype and device, and of its number of rows."""
    check_rows(name, x, "(B, K)")
    if x.shape[1] != x1.shape[1] or (same_rows and x.shape[0] != x1.shape[0]):
        what = "the same shape" if same_rows else "the same number of prototypes"
        raise ValueError(f"{name1} and {name} must have {what}, got {tuple(x1.shape)} and {tuple(x.shape)}")
    check_compatible(name1, x1, name, x)
