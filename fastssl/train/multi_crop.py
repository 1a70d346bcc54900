"""Shared by methods that see images in several crops and learn a teacher's distributions: DINO, iBOT, DINOv2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from fastssl._checks import check_positive
from fastssl.train.data.augment import Augmentation
from fastssl.train.data.draw import Draw
from fastssl.train.method import Method

# DINO's for ImageNet (arXiv:2104.14294), but for the narrower blur that smaller pictures need.
_VIEW = Augmentation(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, max_sigma=1.0)


class MultiCrop(Method):
    """Two global views, of large crops, and several local ones, smaller views of small crops (SwAV, arXiv:2006.09882).

    Args:
        local_views: number of small crops.
        local_size: of their views.
        local_scale: the crop's area, as a share of the image's, above which a view is global and below which local.
    """

    augmentations = replace(_VIEW, blur=1.0), replace(_VIEW, blur=0.1, solarise=0.2), _VIEW

    def __init__(self, local_views: int, local_size: int, local_scale: float) -> None:
        super().__init__()
        self.local_size = check_positive("local_size", local_size)
        first, second, local = type(self).augmentations
        if not 0.05 <= local_scale <= 1:
            raise ValueError(f"local_scale must be from 0.05 to 1, got {local_scale}")
        locals_ = (replace(local, min_scale=0.05, max_scale=local_scale),) * local_views
        self.augmentations = *(replace(view, min_scale=local_scale) for view in (first, second)), *locals_

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """uint8 images -> two global views, then the local ones."""
        sizes = None, None, *(self.local_size for _ in self.augmentations[2:])
        return tuple(augment(batch, draw, size) for augment, size in zip(self.augmentations, sizes, strict=True))


def by_size(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """What the network makes of each view; neighbours of one size go through it together."""
    outputs = []
    for _, group in groupby(views, key=lambda view: view.shape[2:]):
        group = list(group)
        outputs += network(torch.cat(group)).chunk(len(group))
    return outputs
