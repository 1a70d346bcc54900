"""SimCLR: a simple framework for contrastive learning of visual representations (arXiv:2002.05709)."""

from __future__ import annotations

from torch import Tensor

from fastssl.train.models import Projector
from fastssl.train.two_views import TwoViews, implementation


class SimCLR(TwoViews):
    """Two views of an image attract each other, and repel those of all other images.

    Args:
        temperature: of NT-Xent.
        impl: what computes the loss: "fastssl", or "naive", eager PyTorch that builds the similarity matrix.
    """

    def __init__(self, *, temperature: float = 0.2, impl: str = "fastssl") -> None:
        super().__init__(Projector)
        self.temperature = temperature
        self.nt_xent = implementation("nt_xent", impl)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        return self.nt_xent(z1, z2, temperature=self.temperature)
