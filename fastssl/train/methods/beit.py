"""BEiT: BERT pre-training of image transformers (arXiv:2106.08254)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import block_masking_ids, linear_cross_entropy
from fastssl.train import clusters
from fastssl.train.data.augment import CROPPED, to_float
from fastssl.train.data.draw import Draw
from fastssl.train.data.images import Images
from fastssl.train.method import Method
from fastssl.train.networks.vit import ViT, patch_size_of

_IMAGES = 2048  # whose patches codes are learned from


class BEiT(Method):
    """See an image without some blocks of patches, and tell the code of each of them: which of the centroids of patches
    it is nearest to. They are found by k-means before the first step; the paper's codes are those of a discrete VAE.

    Args:
        codes: their number; the paper's 8,192 is for ImageNet.
        mask_ratio: the share of patches that is hidden: at least one is.
        size, colours: of the images.
    """

    learning_rate = 1e-3
    weight_decay = 0.05
    augmentations = (CROPPED,)

    def __init__(self, *, codes: int = 256, mask_ratio: float = 0.4, size: int = 28, colours: int = 1) -> None:
        super().__init__()
        self.patch_size = patch_size_of(size)
        self.encoder = ViT(size, self.patch_size, colours)
        patches = len(self.encoder.pos_embed)
        if mask_ratio > 1 or not int(patches * (1 - mask_ratio)) < patches:
            raise ValueError(f"mask_ratio must hide at least one of {patches} patches, got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(0.02 * torch.randn(self.encoder.features))
        self.head = nn.Linear(self.encoder.features, codes)
        self.register_buffer("centroids", torch.randn(codes, colours * self.patch_size**2))

    @torch.no_grad()
    def prepare(self, dataset: Images) -> None:
        generator = torch.Generator().manual_seed(0)
        images = dataset.train[torch.randperm(len(dataset.train), generator=generator)[:_IMAGES]]
        patches = self.patches(to_float(images)).flatten(0, 1)
        self.centroids.copy_(clusters.kmeans(patches, len(self.centroids), generator))

    def patches(self, images: Tensor) -> Tensor:
        """(B, colours, H, W) -> (B, L, pixels)."""
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """uint8 images -> cropped and mirrored images; mask (B, L); codes (B, L) of hidden patches, -100 elsewhere."""
        draw, side = Draw.of(draw, batch), self.encoder.side
        (images,) = super().views(batch, draw)
        _, mask, _ = block_masking_ids(
            draw.examples, side, side, self.mask_ratio, min_block=max(1, side * side // 12), generator=draw.generator
        )
        mask = draw.own(mask)
        patches = self.patches(images).flatten(0, 1).to(self.centroids)
        codes = clusters.assign(patches, self.centroids).view(mask.shape)
        return images, mask, codes.masked_fill(mask == 0, -100)

    def forward(self, images: Tensor, mask: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        """Features (B, L, features), and the codes."""
        return self.encoder.layers(self.encoder.embed(images, mask=mask, mask_token=self.mask_token)), codes

    def loss(self, features: Tensor, codes: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return linear_cross_entropy(features, self.head.weight, codes, linear_bias=self.head.bias)

    def monitored(self, features: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        return (features.flatten(1),)
