"""BERT: masked language modelling (arXiv:1810.04805), by default without the next sentence, as in RoBERTa
(arXiv:1907.11692)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import mask_tokens
from fastssl.train.data.draw import Draw
from fastssl.train.data.subwords import VOCABULARY, Subwords
from fastssl.train.device import move
from fastssl.train.evaluate import pooled
from fastssl.train.language import LanguageModel


class BERT(LanguageModel):
    """Some subwords are hidden, or replaced by others, and are to be found from those on both sides.

    Args:
        probability: that a subword is to be found.
        next_sentence: half of the sequences get the second half of another one, and the mean of the features is to tell
            which.
    """

    def __init__(
        self,
        *,
        probability: float = 0.15,
        next_sentence: bool = False,
        features: int = 128,
        depth: int = 4,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__(features=features, depth=depth, vocabulary=vocabulary)
        if probability > 1:
            raise ValueError(f"probability must be at most 1, got {probability}")
        self.probability = probability
        self.follows = nn.Linear(features, 1) if next_sentence else None

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, L) subwords -> what is seen of them, and the labels of those that are to be found; with next_sentence
        also (B,), whether the second half is the first one's own."""
        draw, own = Draw.of(draw, batch), []
        if self.follows is not None:
            own = [(draw.uniform() < 0.5) | (draw.examples == 1)]  # there may be no other
            half = batch.shape[1] // 2
            other = torch.cat([batch[:, :half], draw.own(draw.whole(batch).roll(1, 0))[:, half:]], 1)
            batch = torch.where(own[0][:, None], batch, other)
        masked = mask_tokens(
            draw.placed(batch),
            mask_token_id=0,
            vocab_size=self.vocabulary,
            probability=self.probability,
            generator=draw.generator,
        )
        return *draw.own(masked), *own

    def forward(self, corrupted: Tensor, labels: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        """Features (B, L, features), and the labels; with next_sentence also (B,) logits, and what is true."""
        features = self.encoder(corrupted)
        return features, labels, *(x for known in own for x in (self.follows(pooled(features)).squeeze(1), known))

    def loss(self, features: Tensor, labels: Tensor, *of_halves: Tensor, group: ProcessGroup | None = None) -> Tensor:
        loss = super().loss(features, labels, group)
        if of_halves:
            logits, own = of_halves
            loss = loss + F.binary_cross_entropy_with_logits(logits, own.to(logits.dtype))
        return loss

    @torch.no_grad()
    def evaluate(self, dataset: Subwords) -> dict[str, float]:
        found = self.marks(dataset, "masked subwords") | self.probe(dataset)
        if self.follows is not None:
            inputs = self.views(dataset.test[:512], torch.Generator().manual_seed(0))
            *_, logits, own = self(*move(inputs, self.device))
            found["halves known to be one's own, or not"] = ((logits > 0) == own).double().mean().item()
        return found
