"""The head of methods that learn distributions over prototypes (DINO, arXiv:2104.14294)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.train.networks.models import mlp


class PrototypeHead(nn.Module):
    """Three linear layers, then the cosine of the angle with each prototype.

    Between the layers there are batch normalisation, which the paper's head has as an option, and ReLU: without
    normalisation all images have nearly the same logits at first, and short runs do not get beyond that.

    Args:
        inputs: width of its input.
        prototypes: K.
        hidden: width of the layers between.
        bottleneck: width of the prototypes.
    """

    def __init__(self, inputs: int, prototypes: int, hidden: int = 256, bottleneck: int = 64) -> None:
        super().__init__()
        self.mlp = mlp(inputs, hidden, hidden, bottleneck)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> (..., K) logits from -1 to 1."""
        hidden = self.mlp(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return F.linear(F.normalize(hidden, dim=-1), F.normalize(self.prototypes, dim=1))
