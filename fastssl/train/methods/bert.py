"""BERT: masked language modelling (arXiv:1810.04805), without the next sentence, as in RoBERTa (arXiv:1907.11692)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.functional import mask_tokens
from fastssl.train.data.subwords import VOCABULARY, Subwords
from fastssl.train.language import LanguageModel


class BERT(LanguageModel):
    """Some subwords are hidden, or replaced by others, and are to be found from those on both sides.

    Args:
        probability: that a subword is to be found.
    """

    def __init__(
        self, *, probability: float = 0.15, features: int = 128, depth: int = 4, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__(features=features, depth=depth, vocabulary=vocabulary)
        if probability > 1:
            raise ValueError(f"probability must be at most 1, got {probability}")
        self.probability = probability

    def views(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """(B, L) subwords -> what is seen of them, and the labels of those that are to be found."""
        return mask_tokens(
            batch, mask_token_id=0, vocab_size=len(self.bias), probability=self.probability, generator=generator
        )

    def forward(self, corrupted: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Features (B, L, features), and the labels."""
        return self.encoder(corrupted), labels

    def evaluate(self, dataset: Subwords) -> dict[str, float]:
        return self.marks(dataset, "masked subwords")
