"""SimCLR: a simple framework for contrastive learning of visual representations (arXiv:2002.05709)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import functional, reference
from fastssl.train.augment import random_view
from fastssl.train.models import Encoder, Projector

NT_XENT = {"fastssl": functional.nt_xent, "naive": reference.contrastive.nt_xent}


class SimCLR(nn.Module):
    """Two random views of each image, one encoder, one projector, NT-Xent.

    Args:
        temperature: of NT-Xent.
        impl: what computes the loss: "fastssl", or "naive", eager PyTorch that builds the similarity matrix.
    """

    def __init__(self, *, temperature: float = 0.2, impl: str = "fastssl") -> None:
        super().__init__()
        if impl not in NT_XENT:
            raise ValueError(f"impl must be one of {', '.join(map(repr, NT_XENT))}, got {impl!r}")
        self.encoder = Encoder()
        self.projector = Projector(self.encoder.features)
        self.temperature = temperature
        self.nt_xent = NT_XENT[impl]

    @staticmethod
    def views(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, H, W) uint8 images -> the model's inputs."""
        return random_view(images, generator), random_view(images, generator)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """The model's inputs -> the loss's inputs, (B, 128) each."""
        return self.projector(self.encoder(torch.cat([view1, view2]))).chunk(2)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        return self.nt_xent(z1, z2, temperature=self.temperature)
