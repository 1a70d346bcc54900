"""ELECTRA: pre-training text encoders as discriminators rather than generators (arXiv:2003.10555)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import gather_tokens, linear_categorical, random_masking_ids
from fastssl.train.data.draw import Draw
from fastssl.train.data.subwords import VOCABULARY, Subwords
from fastssl.train.device import move
from fastssl.train.language import LanguageModel
from fastssl.train.networks.transformer import Layers


class ELECTRA(LanguageModel):
    """A generator, half as wide as the encoder, learns as BERT does, and draws what it puts in the places of hidden
    subwords. The encoder sees that text, and tells of every subword whether it has been replaced. Both have one table
    of embeddings.

    Args:
        probability: the share of a sequence's subwords that is hidden.
        discriminator_weight: of the encoder's loss, where the generator's has 1.
        temperature: of the generator's draws.
        features: of a subword.
        depth: layers of both.
    """

    def __init__(
        self,
        *,
        probability: float = 0.15,
        discriminator_weight: float = 50.0,
        temperature: float = 1.0,
        features: int = 128,
        depth: int = 4,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__(features=features, depth=depth, vocabulary=vocabulary)
        if probability > 1:
            raise ValueError(f"probability must be at most 1, got {probability}")
        self.probability, self.temperature, self.discriminator_weight = probability, temperature, discriminator_weight
        width = features // 2
        self.generator = nn.Sequential(nn.Linear(features, width), Layers(depth, width), nn.Linear(width, features))
        self.head = nn.Linear(features, 1)
        nn.init.constant_(self.head.bias, torch.tensor(probability).logit(1e-3))  # as the other bias: of the frequency

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, L) subwords, and the places (B, M) of those that are hidden."""
        draw, length = Draw.of(draw, batch), batch.shape[1]
        ids_keep, mask, _ = random_masking_ids(draw.examples, length, self.probability, generator=draw.generator)
        return batch, draw.own(mask).argsort(dim=1, descending=True, stable=True)[:, : length - ids_keep.shape[1]]

    def forward(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        """The generator's features (B, M, features) of hidden subwords, and these; the encoder's features (B, L,
        features) of the text with what the generator has drawn, and which of its subwords are others (B, L)."""
        hidden = self.encoder.embed(tokens.scatter(1, places, 0))
        found = gather_tokens(self.generator(hidden), places)
        words = self.encoder.words.weight
        drawn = linear_categorical(found, words, linear_bias=self.bias, temperature=self.temperature)
        seen = tokens.scatter(1, places, drawn.clamp_min(0))  # from NaN nothing can be drawn; the loss will say so
        return found, tokens.gather(1, places), self.encoder(seen), seen != tokens

    def loss(
        self,
        found: Tensor,
        labels: Tensor,
        features: Tensor,
        replaced: Tensor,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        logits = self.head(features).squeeze(2)
        of_encoder = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype))
        return super().loss(found, labels, group) + self.discriminator_weight * of_encoder

    def monitored(self, found: Tensor, labels: Tensor, features: Tensor, replaced: Tensor) -> tuple[Tensor, ...]:
        return (features.flatten(0, 1),)

    @torch.no_grad()
    def evaluate(self, dataset: Subwords) -> dict[str, float]:
        """The generator's marks; how well the encoder ranks replaced subwords before the others; and its probe."""
        training = self.training
        self.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = self.marks(dataset, "hidden subwords")
            views = self.views(dataset.test[:512], torch.Generator().manual_seed(0))
            *_, features, replaced = self(*move(views, self.device))
        self.train(training)
        share, scores = replaced.double().mean(), self.head(features)
        precision = average_precision_score(replaced.flatten().cpu().numpy(), scores.flatten().cpu().numpy())
        found[f"average precision of replaced subwords ({share:.1%}: by chance)"] = precision
        return found | self.probe(dataset)
