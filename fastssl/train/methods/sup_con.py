"""SupCon: supervised contrastive learning (arXiv:2004.11362)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastssl.distributed import ProcessGroup
from fastssl.functional import sup_con
from fastssl.train.data.draw import Draw
from fastssl.train.data.images import Images
from fastssl.train.two_views import TwoViews


class SupCon(TwoViews):
    """All views of all images of a class attract each other, and repel those of other classes.

    Args:
        temperature: of the loss.
    """

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__(256, 128)
        self.temperature = temperature

    @staticmethod
    def training_data(dataset: Images) -> TensorDataset:
        return dataset.labelled()

    def views(self, batch: tuple[Tensor, Tensor], draw: Draw) -> tuple[Tensor, ...]:
        images, labels = batch
        return *super().views(images, draw), labels

    def forward(self, view1: Tensor, view2: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack(super().forward(view1, view2), 1), labels

    def loss(self, projections: Tensor, labels: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return sup_con(projections, labels, temperature=self.temperature, group=group)

    def monitored(self, projections: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return projections.unbind(1)
