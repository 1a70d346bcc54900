"""T5: spans of a text are cut out and written anew, by an encoder and a decoder (arXiv:1910.10683)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.functional import span_corruption
from fastssl.train.data.draw import Draw
from fastssl.train.data.subwords import LENGTH, VOCABULARY, Subwords
from fastssl.train.device import move
from fastssl.train.language import LanguageModel, write
from fastssl.train.networks.transformer import Decoder


class T5(LanguageModel):
    """The encoder sees a text with a sign in the place of each span; the decoder writes the signs, each followed by its
    span. Places are learned, where the paper's attention has biases.

    Args:
        noise_density: the share of subwords that is cut out.
        mean_span_length: subwords in a span, on average.
        features: of a subword.
        depth: layers of the encoder, and of the decoder.
    """

    signs = LENGTH // 2  # as many spans as a sequence may have

    def __init__(
        self,
        *,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        features: int = 128,
        depth: int = 3,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__(features=features, depth=depth, vocabulary=vocabulary)
        self.spans = {"noise_density": noise_density, "mean_span_length": mean_span_length}
        self.decoder = Decoder(features, depth)
        self.views(torch.zeros(1, LENGTH, dtype=torch.int64), torch.Generator())  # raises now if they are out of range

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, L) subwords -> (B, M) what is left of them, and (B, N) what was cut out, both with signs."""
        draw, first = Draw.of(draw, batch), len(self.bias) - 1
        cut = span_corruption(draw.placed(batch), first_sentinel_id=first, **self.spans, generator=draw.generator)
        return draw.own(cut)

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The decoder's features (B, N, features), and the labels."""
        return self.decode(F.pad(labels, (1, 0))[:, :-1], self.encoder(inputs)), labels  # subword 0 begins

    def decode(self, written: Tensor, read: Tensor) -> Tensor:
        return self.decoder(self.encoder.embed(written), read)

    def evaluate(self, dataset: Subwords) -> dict[str, float]:
        return self.marks(dataset, "subwords of spans") | self.probe(dataset)

    @torch.no_grad()
    def samples(self, dataset: Subwords, count: int = 3) -> list[str]:
        """Sequences to be tested, with [what it writes | what was there] in the places of spans."""
        training = self.training
        self.eval()
        texts = dataset.test[:: max(1, len(dataset.test) // count)][:count]
        inputs, labels = self.views(texts, torch.Generator().manual_seed(0))
        read, begin = self.encoder(move(inputs, self.device)), labels.new_zeros((len(labels), 1))

        def logits(tokens: Tensor) -> Tensor:
            return self.logits(self.decode(move(tokens, self.device), read)[:, -1])

        ours = write(logits, begin, 1 + labels.shape[1])[:, 1:]
        self.train(training)

        def filled(text: Tensor, ours: Tensor, labels: Tensor) -> str:
            spans = [self.pieces(written) for written in (ours, labels)]
            pieces = [dataset.decode(piece) for piece in self.pieces(text).values()]
            holes = [" | ".join(dataset.decode(its.get(sign, text[:0])) for its in spans) for sign in self.pieces(text)]
            return pieces[0] + "".join(f"[{hole}]{piece}" for hole, piece in zip(holes[1:], pieces[1:], strict=True))

        return [filled(*each) for each in zip(inputs, ours, labels, strict=True)]

    def pieces(self, tokens: Tensor) -> dict[int, Tensor]:
        """What follows each sign, until the next; at -1 what is before the first."""
        ends = (tokens >= self.vocabulary).nonzero().flatten().tolist()
        first, *others = torch.tensor_split(tokens, ends)
        return {-1: first} | {int(piece[0]): piece[1:] for piece in others}
