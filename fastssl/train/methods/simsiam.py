"""SimSiam: exploring simple Siamese representation learning (arXiv:2011.10566)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.ops._precision import widen
from fastssl.train.data.augment import STRONG
from fastssl.train.networks.models import mlp
from fastssl.train.two_views import TwoViews


class SimSiam(TwoViews):
    """From one view of an image predict the projection of the other, which is taken as a constant. No teacher.

    This stop-gradient is what keeps all images from getting the same projection.
    """

    augmentations = STRONG, STRONG

    def __init__(self) -> None:
        super().__init__(512, 512, 512, last_norm=True)
        self.predictor = mlp(512, 128, 512)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        projections = self.student(torch.cat([view1, view2]))
        return *self.predictor(projections).chunk(2), *projections.detach().chunk(2)

    def loss(
        self,
        prediction1: Tensor,
        prediction2: Tensor,
        projection1: Tensor,
        projection2: Tensor,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        similarity = F.cosine_similarity(widen(prediction1), widen(projection2))
        similarity = similarity + F.cosine_similarity(widen(prediction2), widen(projection1))
        return -similarity.mean() / 2
