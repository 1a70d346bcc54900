"""iBOT: image BERT pre-training with online tokenizer (arXiv:2111.07832)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import block_masking_ids, gather_tokens, prototype_distillation_loss, update_center_
from fastssl.nn import DINOHead
from fastssl.ops._precision import widen
from fastssl.train.data.draw import Draw
from fastssl.train.methods.dino import DINO
from fastssl.train.multi_crop import by_size
from fastssl.train.networks.vit import ViT


class IBOT(DINO):
    """DINO, and patches have distributions, too: from an image without some blocks of patches the student predicts
    there those of the teacher, which sees all of it. One head serves images and patches.

    One of an image's two global views, drawn at random, has masked patches, always as many; in the paper each view has
    some with probability 1/2, of a random number.

    Args:
        total_steps: the length of the run, over which the teacher's momentum rises to 1.
        prototypes: their number; the paper's 8,192 is for ImageNet.
        mask_ratio: the share of a view's patches that is hidden: at least one is.
        student_temperature: of the student's distributions.
        teacher_temperature: of the teacher's, after a tenth of the run.
        first_teacher_temperature: of the teacher's at first, from where it moves in a line.
        sinkhorn: take Sinkhorn-Knopp's center of each batch (arXiv:2006.09882), not the moving average of all.
        momentum: of the teacher at first; the paper's 0.996 is for longer runs.
        local_views: number of small crops.
        local_size: of their views, a multiple of 4.
        local_scale: the crop's area, as a share of the image's, above which a view is global and below which local.
        registers: tokens of the Vision Transformer that stand for no patch.
        drop_path: how often its last layer leaves an example of the student's as it is.
        layer_scale: what its layers' contributions are multiplied with at first; 0: nothing.
        size, colours: of the images.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        prototypes: int = 1024,
        mask_ratio: float = 0.3,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        first_teacher_temperature: float = 0.04,
        sinkhorn: bool = False,
        momentum: float = 0.98,
        local_views: int = 4,
        local_size: int = 12,
        local_scale: float = 0.4,
        registers: int = 0,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        size: int = 28,
        colours: int = 1,
    ) -> None:
        super().__init__(
            total_steps=total_steps,
            prototypes=prototypes,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            first_teacher_temperature=first_teacher_temperature,
            sinkhorn=sinkhorn,
            momentum=momentum,
            local_views=local_views,
            local_size=local_size,
            local_scale=local_scale,
            vit=True,
            registers=registers,
            drop_path=drop_path,
            layer_scale=layer_scale,
            size=size,
            colours=colours,
        )
        patches = len(self.encoder.pos_embed)
        if mask_ratio > 1 or not int(patches * (1 - mask_ratio)) < patches:
            raise ValueError(f"mask_ratio must hide at least one of {patches} patches, got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(0.02 * torch.randn(self.encoder.features))
        self.register_buffer("patch_center", torch.zeros(prototypes))

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """The crops, where one of the global ones is masked (B, L), the masked patches (B, M), and whether it is the
        first (B,)."""
        draw, side = Draw.of(draw, batch), self.encoder.side
        views = super().views(batch, draw)
        ids_keep, mask, _ = block_masking_ids(
            draw.examples, side, side, self.mask_ratio, min_block=max(1, side * side // 12), generator=draw.generator
        )
        mask = draw.own(mask)
        ids = mask.argsort(dim=1, descending=True, stable=True)[:, : mask.shape[1] - ids_keep.shape[1]]
        return *views, mask, ids, draw.uniform() < 0.5

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The student's and the teacher's features of the masked patches (B, M, D), of which prototypes make logits;
        then what DINO's returns."""
        return self.embed(*inputs)[1:]

    def embed(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The student's class tokens of the global views (2 B, features), then what `forward` returns."""
        *views, mask, ids, first = inputs
        masks = torch.cat([mask * first[:, None], mask * ~first[:, None]])
        images, patches = self.tokens(self.encoder, views, ids, first, mask=masks, mask_token=self.mask_token)
        student = self.heads[0](torch.cat([images, *by_size(self.encoder, views[2:])])).chunk(len(views))
        with torch.no_grad():
            encoder, *heads = self.teacher.module
            whole, targets = self.tokens(encoder, views, ids, first)
            teacher, targets = heads[0](whole).chunk(2), self.features(heads[-1], targets)
        return images, self.features(self.heads[-1], patches), targets, *student, *teacher

    @staticmethod
    def tokens(
        encoder: ViT, views: Sequence[Tensor], ids: Tensor, first: Tensor, **masked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (2 B, features) of the global views, and patches (B, M, features) of one of them."""
        images, patches = encoder.split(encoder.layers(encoder.embed(torch.cat(views[:2]), **masked)))
        return images, gather_tokens(torch.where(first[:, None, None], *patches.chunk(2)), ids)

    @staticmethod
    def features(head: DINOHead, patches: Tensor) -> Tensor:
        """(B, M, features) -> (B, M, D)."""
        return head.features(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])

    def loss(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> Tensor:
        student, teacher, *logits = embeddings
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        prototypes, center = self.teacher.module[-1].prototypes, self.patch_center
        if self.sinkhorn:
            center = self.center_of(center, F.linear(teacher, prototypes), group=group)
        of_patches = prototype_distillation_loss(
            student, self.heads[-1].prototypes, teacher, prototypes, center=center, **self.temperatures
        )
        return super().loss(*logits, group=group) + of_patches

    def after_step(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> None:
        _, teacher, *logits = embeddings
        if not self.sinkhorn:  # the mean of logits is that of the mean feature
            mean = widen(teacher).mean((0, 1)).unsqueeze(0)
            logits_of_mean = F.linear(mean, self.teacher.module[-1].prototypes)
            update_center_(self.patch_center, logits_of_mean, self.center_momentum, group=group)
        super().after_step(*logits, group=group)
