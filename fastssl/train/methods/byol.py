"""BYOL: bootstrap your own latent, a new approach to self-supervised learning (arXiv:2006.07733)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.nn import EMA
from fastssl.ops._precision import widen
from fastssl.train.data.augment import STRONG
from fastssl.train.networks.models import mlp
from fastssl.train.two_views import TwoViews


class BYOL(TwoViews):
    """From one view of an image predict the projection that a slowly moving teacher makes of the other. No negatives.

    Projections are batch-normalised, as MoCo v3's are and the paper's are not: short runs keep more dimensions so.

    Args:
        total_steps: the length of the run, over which the teacher's momentum rises to 1.
        momentum: of the teacher at first; the paper's 0.996 is for longer runs.
    """

    augmentations = STRONG, STRONG

    def __init__(self, *, total_steps: int, momentum: float = 0.9) -> None:
        super().__init__(512, 128, last_norm=True)
        self.predictor = mlp(128, 512, 128)
        # In training mode, as in the paper: its batch normalisation has statistics of its own.
        self.teacher = EMA(
            self.student, momentum, schedule="cosine", total_steps=total_steps, update_buffers=False
        ).train()

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        views = torch.cat([view1, view2])
        predictions = self.predictor(self.student(views))
        with torch.no_grad():
            targets = self.teacher(views)
        return *predictions.chunk(2), *targets.chunk(2)

    def loss(
        self,
        prediction1: Tensor,
        prediction2: Tensor,
        target1: Tensor,
        target2: Tensor,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        similarity = F.cosine_similarity(widen(prediction1), widen(target2))
        similarity = similarity + F.cosine_similarity(widen(prediction2), widen(target1))
        return (4 - 2 * similarity).mean()

    def after_step(self, *embeddings: Tensor, group: ProcessGroup | None = None) -> None:
        self.teacher.update(self.student)
