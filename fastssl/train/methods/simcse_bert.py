"""SimCSE (arXiv:2104.08821) with BERT's encoder: `--from` a checkpoint of `bert` begins with what that has learned."""

from __future__ import annotations

import os

from torch import Tensor, nn

from fastssl.train.data import subwords
from fastssl.train.data.subwords import LENGTH, VOCABULARY, Subwords
from fastssl.train.methods.simcse import SimCSE
from fastssl.train.networks.transformer import Transformer


class SimCSEBERT(SimCSE):
    """A sentence, the mean of its subwords' features, attracts itself, seen through another dropout mask, and repels
    all other sentences of the batch.

    Args:
        temperature: of the softmax.
        dropout: share of embeddings, and of what each layer adds to them, that either mask drops.
        features: of a subword.
        depth: layers of the Transformer.
    """

    learning_rate = 5e-4
    weight_decay = 0.05

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        dropout: float = 0.1,
        features: int = 128,
        depth: int = 4,
        vocabulary: int = VOCABULARY,
    ) -> None:
        nn.Module.__init__(self)  # SimCSE's would make another encoder
        self.encoder = Transformer(vocabulary, LENGTH, features, depth, dropout=dropout)
        self.temperature = temperature

    @staticmethod
    def load(directory: str | os.PathLike[str] | None) -> Subwords:
        return subwords.load_sentences(directory)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) subwords, 0 for padding -> (B, features)."""
        known = tokens != 0
        known[:, 0] = True  # attention to nothing would be NaN
        return (self.encoder(tokens, known) * known[:, :, None]).sum(1) / known.sum(1, keepdim=True)
