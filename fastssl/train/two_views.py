"""What methods share that compare two random views of each image: SimCLR, Barlow Twins, VICReg."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastssl import functional, reference
from fastssl.train.augment import random_view
from fastssl.train.models import Encoder

IMPLEMENTATIONS = ("fastssl", "naive")


def implementation(name: str, impl: str) -> Callable[..., Tensor]:
    """The function `name`, fused ("fastssl") or in eager PyTorch as the papers write it ("naive")."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    return getattr(functional, name) if impl == "fastssl" else reference.OPS[name].reference


class TwoViews(nn.Module):
    """Two random views of each image, one encoder, one projector. A subclass has the `loss` of their projections.

    Args:
        projector: makes the projector, given the encoder's number of features.
    """

    def __init__(self, projector: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.projector = projector(self.encoder.features)

    @staticmethod
    def views(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, H, W) uint8 images -> the model's inputs."""
        return random_view(images, generator), random_view(images, generator)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """The model's inputs -> the loss's inputs, (B, outputs of the projector) each."""
        return self.projector(self.encoder(torch.cat([view1, view2]))).chunk(2)
