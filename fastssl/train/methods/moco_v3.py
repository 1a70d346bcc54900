"""MoCo v3: an empirical study of training self-supervised vision transformers (arXiv:2104.02057)."""

from __future__ import annotations

from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.functional import info_nce
from fastssl.train.methods.byol import BYOL


class MoCoV3(BYOL):
    """BYOL's networks, with negatives: a prediction finds the teacher's projection among those of the batch. No queue.

    Args:
        total_steps: the length of the run, over which the teacher's momentum rises to 1.
        temperature: of InfoNCE.
        momentum: of the teacher at first; the paper's 0.99 is for longer runs.
    """

    def __init__(self, *, total_steps: int, temperature: float = 0.2, momentum: float = 0.9) -> None:
        super().__init__(total_steps=total_steps, momentum=momentum)
        self.temperature = temperature

    def loss(
        self,
        prediction1: Tensor,
        prediction2: Tensor,
        target1: Tensor,
        target2: Tensor,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        pairs = (prediction1, target2), (prediction2, target1)
        losses = (info_nce(*pair, temperature=self.temperature, group=group) for pair in pairs)
        return 2 * self.temperature * sum(losses)
