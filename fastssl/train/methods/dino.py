"""DINO: emerging properties in self-supervised vision transformers (arXiv:2104.14294)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import dino_loss, sinkhorn_center, update_center_
from fastssl.nn import EMA, DINOHead
from fastssl.ops._precision import widen
from fastssl.train.multi_crop import MultiCrop, by_size
from fastssl.train.networks.models import image_encoder
from fastssl.train.networks.vit import Layer, ViT, patch_size_of
from fastssl.train.schedules import Schedule


class DINO(MultiCrop):
    """Every view of an image is to have the distribution over prototypes that a slowly moving teacher gives to a global
    view of it. Centering keeps the teacher from giving all images to one prototype, sharpening from giving them alike
    to all.

    The head has batch normalisation, which the paper's has as an option: without it all images have nearly the same
    logits at first, and short runs do not get beyond that.

    Args:
        total_steps: the length of the run, over which the teacher's momentum rises to 1.
        prototypes: their number; the paper's 65,536 is for ImageNet.
        student_temperature: of the student's distributions.
        teacher_temperature: of the teacher's, after a tenth of the run.
        first_teacher_temperature: of the teacher's at first, from where it moves in a line.
        sinkhorn: take Sinkhorn-Knopp's center of each batch (arXiv:2006.09882), not the moving average of all.
        momentum: of the teacher at first; the paper's 0.996 is for longer runs.
        local_views: number of small crops.
        local_size: of their views; for a Vision Transformer a multiple of its patches' size.
        local_scale: the crop's area, as a share of the image's, above which a view is global and below which local.
        vit: whether the encoder is a Vision Transformer with a class token; it learns more slowly.
        registers: tokens of the Vision Transformer that stand for no patch.
        drop_path: how often its last layer leaves an example of the student's as it is.
        layer_scale: what its layers' contributions are multiplied with at first; 0: nothing.
        size, colours: of the images.
    """

    learning_rate = 1e-3
    weight_decay = 0.04
    final_weight_decay = 0.4
    center_momentum = 0.9
    number_of_heads = 1

    def __init__(
        self,
        *,
        total_steps: int,
        prototypes: int = 1024,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        first_teacher_temperature: float = 0.04,
        sinkhorn: bool = False,
        momentum: float = 0.98,
        local_views: int = 4,
        local_size: int = 12,
        local_scale: float = 0.4,
        vit: bool = False,
        registers: int = 0,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
        size: int = 28,
        colours: int = 1,
    ) -> None:
        super().__init__(local_views, local_size, local_scale)
        self.patch_size = patch_size_of(size)
        if vit and local_size % self.patch_size:
            raise ValueError(f"local_size must be a multiple of {self.patch_size}, got {local_size}")
        if vit:
            tokens = {"class_token": True, "registers": registers}
            self.encoder = ViT(size, self.patch_size, colours, **tokens, drop_path=drop_path, layer_scale=layer_scale)
        else:
            self.encoder = image_encoder()
        self.heads = nn.ModuleList(
            DINOHead(self.encoder.features, prototypes, use_bn=True, hidden_dim=256, bottleneck_dim=64, mlp_bias=False)
            for _ in range(self.number_of_heads)
        )
        # In training mode, as in the paper: a batch normalisation has statistics of its own.
        self.teacher = EMA(
            self.student, momentum, schedule="cosine", total_steps=total_steps, update_buffers=False
        ).train()
        for layer in self.teacher.modules():
            if isinstance(layer, Layer):
                layer.drop_path = 0.0
        self.student_temperature = student_temperature
        self.teacher_temperature = Schedule(
            first_teacher_temperature, teacher_temperature, teacher_temperature, warmup=0.1
        )
        self.sinkhorn = sinkhorn
        self.register_buffer("center", torch.zeros(prototypes))

    @property
    def student(self) -> nn.Module:
        """The networks that the teacher follows."""
        return nn.Sequential(self.encoder, *self.heads)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """The student's logits (B, K) of each view, and the teacher's of the two global ones."""
        student = self.heads[0](torch.cat(by_size(self.encoder, views))).chunk(len(views))
        with torch.no_grad():
            teacher = self.teacher(torch.cat(views[:2])).chunk(2)
        return *student, *teacher

    @property
    def temperatures(self) -> dict[str, float]:
        """The losses' arguments."""
        return {
            "student_temperature": self.student_temperature,
            "teacher_temperature": self.teacher_temperature(self.progress),
        }

    def center_of(self, average: Tensor, *logits: Tensor, group: ProcessGroup | None = None) -> Tensor:
        """The center of the teacher's logits: their moving average, or Sinkhorn-Knopp's."""
        if not self.sinkhorn:
            return average
        return sinkhorn_center(logits, temperature=self.temperatures["teacher_temperature"], group=group)

    def loss(self, *logits: Tensor, group: ProcessGroup | None = None) -> Tensor:
        center = self.center_of(self.center, *logits[-2:], group=group)
        return dino_loss(logits[:-2], logits[-2:], center=center, **self.temperatures)

    def after_step(self, *logits: Tensor, group: ProcessGroup | None = None) -> None:
        if not self.sinkhorn:
            update_center_(self.center, logits[-2:], self.center_momentum, group=group)
        self.teacher.update(self.student)

    def monitored(self, *logits: Tensor) -> tuple[Tensor, ...]:
        center = self.center_of(self.center, *logits[-2:])
        return tuple(teacher - center for teacher in logits[-2:])

    def assignments(self, *logits: Tensor) -> Tensor:
        center = self.center_of(self.center, *logits[-2:])
        return ((widen(logits[-2]) - center) / self.temperatures["teacher_temperature"]).softmax(1)
