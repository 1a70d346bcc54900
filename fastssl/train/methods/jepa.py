"""I-JEPA: self-supervised learning from images with a joint-embedding predictive architecture (arXiv:2301.08243), with
the masks of V-JEPA (arXiv:2404.08471), blocks whose complement is the context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import block_masking_ids, masked_feature_loss, restore_tokens
from fastssl.nn import EMA
from fastssl.ops._precision import widen
from fastssl.train.data.augment import CROPPED
from fastssl.train.data.draw import Draw
from fastssl.train.method import Method
from fastssl.train.networks.vit import ViT, layers, patch_size_of, position_embedding


class JEPA(Method):
    """From the patches outside of some blocks predict the features that a slowly moving teacher, which sees the whole
    image, has of those within. The encoder sees nothing else, as in MAE; nothing is painted.

    Args:
        total_steps: the length of the run, over which the teacher's momentum rises to 1.
        mask_ratio: the share of patches that is hidden: at least one is, and not all.
        beta: the distance at which the loss turns from a square into a line.
        momentum: of the teacher at first, as in the paper. With 0.98 the targets soon say no more of a patch than where
            it is.
        size, colours: of the images.
    """

    learning_rate = 1e-3
    weight_decay = 0.04
    final_weight_decay = 0.4
    augmentations = (CROPPED,)

    def __init__(
        self,
        *,
        total_steps: int,
        mask_ratio: float = 0.7,
        beta: float = 1.0,
        momentum: float = 0.996,
        size: int = 28,
        colours: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size_of(size)
        self.encoder = ViT(size, self.patch_size, colours)
        self.mask_ratio, self.beta, features = mask_ratio, beta, 64
        patches = len(self.encoder.pos_embed)
        if not 0 < int(patches * (1 - mask_ratio)) < patches:
            raise ValueError(f"mask_ratio must hide at least one of {patches} patches, and not all, got {mask_ratio}")
        self.to_predictor = nn.Linear(self.encoder.features, features)
        self.mask_token = nn.Parameter(0.02 * torch.randn(features))
        self.register_buffer("pos_embed", position_embedding(self.encoder.side, features), persistent=False)
        self.predictor = nn.Sequential(layers(2, features, heads=4), nn.Linear(features, self.encoder.features))
        self.teacher = EMA(self.encoder, momentum, schedule="cosine", total_steps=total_steps)

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        draw, side = Draw.of(draw, batch), self.encoder.side
        (images,) = super().views(batch, draw)
        ids_keep, mask, ids_restore = block_masking_ids(
            draw.examples, side, side, self.mask_ratio, min_block=max(1, side * side // 12), generator=draw.generator
        )
        return images, *draw.own((ids_keep, ids_restore, mask))

    def forward(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        context = self.to_predictor(self.encoder(images, ids_keep))
        prediction = self.predictor(restore_tokens(context, ids_restore, self.mask_token, self.pos_embed))
        with torch.no_grad():
            target = widen(self.teacher(images))
        return prediction, F.layer_norm(target, target.shape[2:]), mask

    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return masked_feature_loss(prediction, target, mask, beta=self.beta)

    def after_step(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> None:
        self.teacher.update(self.encoder)

    def monitored(self, prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (target.flatten(1),)
