"""data2vec: a general framework for self-supervised learning in speech, vision and language (arXiv:2202.03555)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import block_masking_ids, masked_feature_loss
from fastssl.nn import EMA
from fastssl.ops._precision import widen
from fastssl.train.data.augment import CROPPED
from fastssl.train.data.draw import Draw
from fastssl.train.method import Method
from fastssl.train.networks.vit import ViT, patch_size_of


class Data2Vec(Method):
    """See an image without some blocks of patches, and predict there what a slowly moving teacher, which sees all of
    it, has in its last layers: the mean of their outputs, each of which is normalised.

    Args:
        total_steps: the length of the run, over which the teacher's momentum rises to 1.
        mask_ratio: the share of patches that is hidden: at least one is.
        top_layers: number of the teacher's layers that are to be predicted.
        beta: the distance at which the loss turns from a square into a line.
        momentum: of the teacher at first; the paper's 0.9998 is for longer runs. With 0.98 the targets soon say no more
            of a patch than where it is.
        size, colours: of the images.
    """

    learning_rate = 1e-3
    weight_decay = 0.05
    augmentations = (CROPPED,)

    def __init__(
        self,
        *,
        total_steps: int,
        mask_ratio: float = 0.6,
        top_layers: int = 3,
        beta: float = 2.0,
        momentum: float = 0.996,
        size: int = 28,
        colours: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size_of(size)
        self.encoder = ViT(size, self.patch_size, colours)
        patches, depth = len(self.encoder.pos_embed), len(self.encoder.layers) - 1
        if not int(patches * (1 - mask_ratio)) < patches or mask_ratio > 1:
            raise ValueError(f"mask_ratio must hide at least one of {patches} patches, got {mask_ratio}")
        if not 1 <= top_layers <= depth:
            raise ValueError(f"top_layers must be from 1 to {depth}, got {top_layers}")
        self.mask_ratio, self.top_layers, self.beta = mask_ratio, top_layers, beta
        self.mask_token = nn.Parameter(0.02 * torch.randn(self.encoder.features))
        self.predictor = nn.Linear(self.encoder.features, self.encoder.features)
        self.teacher = EMA(self.encoder, momentum, schedule="cosine", total_steps=total_steps)

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        draw, side = Draw.of(draw, batch), self.encoder.side
        (images,) = super().views(batch, draw)
        _, mask, _ = block_masking_ids(
            draw.examples, side, side, self.mask_ratio, min_block=max(1, side * side // 12), generator=draw.generator
        )
        return images, draw.own(mask)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        tokens = self.encoder.layers(self.encoder.embed(images, mask=mask, mask_token=self.mask_token))
        return self.predictor(tokens), self.targets(images), mask

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """(B, L, features), of all patches."""
        encoder, outputs = self.teacher.module, []
        tokens = encoder.embed(images)
        for layer in encoder.layers[:-1]:
            tokens = layer(tokens)
            outputs.append(F.layer_norm(widen(tokens), tokens.shape[2:]))
        return torch.stack(outputs[-self.top_layers :]).mean(0)

    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return masked_feature_loss(prediction, target, mask, beta=self.beta)

    def after_step(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> None:
        self.teacher.update(self.encoder)

    def monitored(self, prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (target.flatten(1),)
