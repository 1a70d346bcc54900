"""Shared by methods that compare two random views of each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.train.data.augment import MILD
from fastssl.train.method import Method
from fastssl.train.networks.models import image_encoder, mlp


class TwoViews(Method):
    """Two random views of each image, one encoder, one projector. A subclass has the `loss` of their projections.

    Args:
        widths: of the projector's hidden layers and its output.
        last_norm: whether its output is batch-normalised.
    """

    augmentations = MILD, MILD

    def __init__(self, *widths: int, last_norm: bool = False) -> None:
        super().__init__()
        self.encoder = image_encoder()
        self.projector = mlp(self.encoder.features, *widths, last_norm=last_norm)

    @property
    def student(self) -> nn.Module:
        """The networks that a teacher follows: images -> projections."""
        return nn.Sequential(self.encoder, self.projector)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        """The model's inputs -> the loss's inputs, (B, outputs) each."""
        return self.student(torch.cat([view1, view2])).chunk(2)
