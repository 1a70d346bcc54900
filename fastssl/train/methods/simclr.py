"""SimCLR: a simple framework for contrastive learning of visual representations (arXiv:2002.05709)."""

from __future__ import annotations

from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.functional import nt_xent
from fastssl.train.two_views import TwoViews


class SimCLR(TwoViews):
    """Two views of an image attract each other, and repel those of all other images.

    Args:
        temperature: of NT-Xent.
    """

    def __init__(self, *, temperature: float = 0.2) -> None:
        super().__init__(256, 128)
        self.temperature = temperature

    def loss(self, z1: Tensor, z2: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return nt_xent(z1, z2, temperature=self.temperature, group=group)
