"""CLIP: learning transferable visual models from natural language supervision (arXiv:2103.00020)."""

from __future__ import annotations

from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.functional import clip_loss
from fastssl.train.image_text import ImageText


class CLIP(ImageText):
    """An image is to find its text among all texts of the batch, and a text its image.

    Args:
        temperature: of the softmax at first; it is learned. Never below 0.01, as in the paper.
    """

    coldest = 0.01

    def __init__(self, *, temperature: float = 0.07) -> None:
        super().__init__(temperature)

    def loss(self, image: Tensor, text: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return clip_loss(image, text, self.logit_scale.exp(), group=group)
