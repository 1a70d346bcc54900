"""Supervised learning: the classifier of labelled images against which methods without labels are measured."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastssl.distributed import ProcessGroup
from fastssl.train.data.augment import MILD
from fastssl.train.data.draw import Draw
from fastssl.train.data.images import Images
from fastssl.train.evaluate import accuracies, pooled
from fastssl.train.method import Method
from fastssl.train.methods.mae import MAE
from fastssl.train.networks.models import image_encoder
from fastssl.train.networks.vit import ViT, patch_size_of


class Supervised(Method):
    """A linear layer on the encoder's features tells the class of an image. With `--from`, fine-tuning.

    Args:
        vit: whether the encoder is MAE's Vision Transformer.
        size, colours, classes: of the images.
    """

    augmentations = (MILD,)

    def __init__(self, *, vit: bool = False, size: int = 28, colours: int = 1, classes: int = 10) -> None:
        super().__init__()
        if vit:
            self.encoder = ViT(size, patch_size_of(size), colours)
            self.learning_rate, self.weight_decay = MAE.learning_rate, MAE.weight_decay
        else:
            self.encoder = image_encoder()
        self.head = nn.Linear(self.encoder.features, classes)

    @staticmethod
    def training_data(dataset: Images) -> TensorDataset:
        return dataset.labelled()

    def views(self, batch: tuple[Tensor, Tensor], draw: Draw) -> tuple[Tensor, ...]:
        images, labels = batch
        return *super().views(images, draw), labels

    def forward(self, view: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return pooled(self.encoder(view)), labels

    def loss(self, features: Tensor, labels: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return F.cross_entropy(self.head(features), labels)

    def evaluate(self, dataset: Images) -> dict[str, float]:
        """What its features are worth, and the share of test images that it classifies correctly itself."""
        return accuracies(self.encoder, dataset, self.head)

    def monitored(self, features: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (features,)
