"""What every method is made of."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.train import evaluate
from fastssl.train.data import images

IMPLEMENTATIONS = {"fastssl": "auto", "naive": "reference"}  # name -> the backend of fastssl.use_backend
GIVEN = {"total_steps", "size", "colours", "classes"}  # a constructor's arguments that the run and the images decide


class Method(nn.Module):
    """A method of self-supervised learning: networks, views of the data, a loss. See `fastssl.train.loop`.

    A subclass sets `encoder` and has `views`, `forward` and `loss`; what else it may replace has a default here.

    Attributes:
        encoder: what is trained for: inputs -> (B, features), or tokens (B, L, features), whose mean counts. If it has
            `stages()`, its parts from input to output, each may have a learning rate of its own (`layer_decay`).
        impl: what computes the losses and moving averages, "fastssl", or "naive", eager PyTorch as papers write it.
            Views and measurements are the same.
        options: what `fastssl.train.create` made it with. A checkpoint is of a method with the same.
        learning_rate, weight_decay: with which AdamW trains it well, unless others are asked for.
    """

    encoder: nn.Module
    impl = "fastssl"
    options: Mapping[str, Any] = MappingProxyType({})
    learning_rate = 2e-3
    weight_decay = 1e-4

    @staticmethod
    def load(directory: str | None) -> Any:
        """The data set: an object with a `name` that says what it is, from which the next two methods take data."""
        return images.load(directory)

    @staticmethod
    def training_data(dataset: Any) -> Any:
        """What `fit` trains on: it has len(), and indexed by an int64 tensor of positions it gives a batch."""
        return dataset.train

    def evaluate(self, dataset: Any) -> dict[str, float]:
        """What the encoder is worth: shares, by the name of the test."""
        return evaluate.accuracies(self.encoder, dataset)

    @staticmethod
    def views(batch: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A batch of the data -> the model's inputs, random under the generator."""
        raise NotImplementedError

    def loss(self, *embeddings: Tensor) -> Tensor:
        """What `forward` returned -> 0-d loss."""
        raise NotImplementedError

    def after_step(self, *embeddings: Tensor) -> None:
        """Called after the optimiser's step with what `loss` was given: moves a teacher, fills a queue."""

    def monitored(self, *embeddings: Tensor) -> Sequence[Tensor]:
        """What `loss` was given -> (B, D) embeddings of one view or of two, in which `fit` looks for a collapse."""
        return embeddings[:2]


def twins(method: Method) -> dict[str, Method]:
    """The method and its copy with the same weights, one for each implementation."""
    both = {"naive": copy.deepcopy(method), "fastssl": method}
    for impl, twin in both.items():
        twin.impl = impl
    return both
