"""SigLIP: sigmoid loss for language image pre-training (arXiv:2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import siglip_loss
from fastssl.train.image_text import ImageText


class SigLIP(ImageText):
    """Whether an image and a text belong together is a binary decision of its own, for every pair in the batch.

    Args:
        temperature: of the sigmoid at first; it is learned.
        bias: how improbable a match is at first, as a negative logit would be; it is learned.
    """

    def __init__(self, *, temperature: float = 0.1, bias: float = 10.0) -> None:
        super().__init__(temperature)
        self.logit_bias = nn.Parameter(torch.tensor(-bias))

    def loss(self, image: Tensor, text: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return siglip_loss(image, text, self.logit_scale.exp(), self.logit_bias, group=group)
