"""DINOv2: learning robust visual features without supervision (arXiv:2304.07193)."""

from __future__ import annotations

from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.functional import koleo_loss
from fastssl.train.methods.ibot import IBOT


class DINOv2(IBOT):
    """iBOT whose patches have a head of their own, and KoLeo: the student's class tokens of the images of a batch keep
    away from their nearest neighbours.

    The paper's teachers are those of `sinkhorn`. The neighbours are those of the whole batch, where the paper's are
    those of one process.

    Args: as of `IBOT`.
    """

    number_of_heads = 2
    koleo_weight = 0.1

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The student's class tokens (B, features) of either global view, then what iBOT's returns."""
        tokens, *embeddings = self.embed(*inputs)
        return *tokens.chunk(2), *embeddings

    def loss(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> Tensor:
        view1, view2, *others = embeddings
        spread = koleo_loss(view1, group=group) + koleo_loss(view2, group=group)
        return super().loss(*others, group=group) + self.koleo_weight * spread

    def after_step(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> None:
        super().after_step(*embeddings[2:], group=group)
