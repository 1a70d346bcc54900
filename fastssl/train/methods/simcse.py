"""SimCSE: simple contrastive learning of sentence embeddings (arXiv:2104.08821), without supervision."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.functional import info_nce, topk_similarity
from fastssl.train.data import text
from fastssl.train.data.draw import Draw
from fastssl.train.data.text import VOCABULARY, Sentences
from fastssl.train.device import move
from fastssl.train.method import Method
from fastssl.train.networks.models import BagOfWords


class SimCSE(Method):
    """A sentence attracts itself, seen through another dropout mask, and repels all other sentences of the batch.

    Args:
        temperature: of the softmax.
        dropout: share of the words' features that either mask drops.
    """

    learning_rate = 1e-2

    def __init__(self, *, temperature: float = 0.05, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = BagOfWords(VOCABULARY, dropout=dropout)
        self.temperature = temperature

    @staticmethod
    def load(directory: str | os.PathLike[str] | None) -> Sentences:
        return text.load(directory)

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, LENGTH) tokens, as they are: what is random is dropout."""
        return (batch,)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The model's input -> (B, features), twice."""
        return self.embed(tokens), self.embed(tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, features)."""
        return self.encoder(tokens)

    def loss(self, z1: Tensor, z2: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return info_nce(z1, z2, temperature=self.temperature, group=group)

    @torch.no_grad()
    def evaluate(self, dataset: Sentences) -> dict[str, float]:
        """The share of test sentences whose neighbour in the text, the one before or after, is among the nearest."""
        training = self.training
        self.eval()
        z = torch.cat([self.embed(move(tokens, self.device)) for tokens in dataset.test.split(1024)])
        self.train(training)
        place = torch.arange(len(z)).unsqueeze(1)
        _, nearest = topk_similarity(z, z, min(11, len(z)))  # itself included
        adjacent = (nearest.cpu() - place).abs() == 1
        shares = {k: adjacent[:, : k + 1].any(1).float().mean().item() for k in (1, 10)}
        return {f"recall@{k} of neighbours among {len(z)} sentences": share for k, share in shares.items()}
