"""The moving center of a teacher's logits, as the losses of self-distillation keep it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastssl._checks import check_choice, check_positive, check_share
from fastssl.distributed import all_processes
from fastssl.functional import sinkhorn_center, update_center_


class Center(nn.Module):
    """What a loss subtracts from its teacher's logits: their moving average (DINO, arXiv:2104.14294), or what
    Sinkhorn-Knopp finds for each batch (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193), which does not move.

    Where torch.distributed has a default group, it is that of the logits of all processes.

    Args:
        size: of the buffer `center`, all 1 but the last.
        mode: "mean" or "sinkhorn_knopp".
        momentum: of the moving average.
        once_per_step: let `update` only gather batches, and `step` move the center by their mean.
        iterations: of Sinkhorn-Knopp.
    """

    center: Tensor

    def __init__(
        self,
        size: tuple[int, ...],
        mode: str = "mean",
        momentum: float = 0.9,
        once_per_step: bool = False,
        iterations: int = 3,
    ) -> None:
        super().__init__()
        check_choice("center_mode", mode, ("mean", "sinkhorn_knopp"))
        self.mode = mode
        self.momentum = check_share("center_momentum", momentum)
        self.once_per_step = once_per_step
        self.iterations = check_positive("sinkhorn_iterations", iterations)
        self.register_buffer("center", torch.zeros(size))
        self.gathered: list[Tensor] = []  # the mean of each batch, and its number of rows: (K + 1,)

    @property
    def value(self) -> Tensor:
        return self.center

    def of(self, logits: Tensor | Sequence[Tensor], temperature: float | Tensor) -> Tensor:
        """The center for these logits, (K,)."""
        if self.mode == "mean":
            return self.center.flatten()
        return sinkhorn_center(logits, temperature=temperature, iterations=self.iterations, group=all_processes())

    @torch.no_grad()
    def update(self, logits: Tensor | Sequence[Tensor]) -> None:
        """Move the center towards the mean of these logits, or remember it for `step`."""
        if self.mode != "mean":
            return
        if not self.once_per_step:
            update_center_(self.center.view(-1), logits, self.momentum, all_processes())
            return
        mean = torch.zeros_like(self.center).flatten()
        update_center_(mean, logits, 0.0)
        rows = sum(x.shape[:-1].numel() for x in ([logits] if isinstance(logits, Tensor) else logits))
        self.gathered.append(torch.cat([mean, mean.new_full((1,), rows)]))

    @torch.no_grad()
    def step(self) -> None:
        """Move the center by the batches since the last step, if there were any."""
        if self.gathered:
            batches = torch.stack(self.gathered)
            means, rows = batches[:, :-1], batches[:, -1:]
            mean = (means * rows).sum(0, True) / rows.sum()
            update_center_(self.center.view(-1), mean, self.momentum, all_processes())
            self.gathered.clear()

    def extra_repr(self) -> str:
        return f"{tuple(self.center.shape)}, mode={self.mode!r}, momentum={self.momentum}"
