"""GPT: causal language modelling (Radford et al. 2018); at the end it writes a few sentences."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.train.data.draw import Draw
from fastssl.train.data.subwords import LENGTH, Subwords
from fastssl.train.device import move
from fastssl.train.language import LanguageModel, write


class GPT(LanguageModel):
    """Each subword is to be predicted from those before it."""

    causal = True

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, L) subwords, as they are."""
        return (batch,)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Features (B, L - 1, features) of all but the last, and what follows each."""
        return self.encoder(tokens[:, :-1]), tokens[:, 1:]

    def evaluate(self, dataset: Subwords) -> dict[str, float]:
        return self.marks(dataset, "next subwords") | self.probe(dataset)

    @torch.no_grad()
    def samples(self, dataset: Subwords, count: int = 3, temperature: float = 0.8) -> list[str]:
        """Texts that it goes on with after the beginnings of sequences to be tested, drawn from its distributions."""
        training = self.training
        self.eval()
        begun = LENGTH // 8
        texts = dataset.test[:: max(1, len(dataset.test) // count)][:count, :begun]
        generator = torch.Generator().manual_seed(0)

        def logits(tokens: Tensor) -> Tensor:
            return self.logits(self.encoder(move(tokens, self.device))[:, -1])

        texts = write(logits, texts, LENGTH, temperature, generator)
        self.train(training)
        return [f"{dataset.decode(text[:begun])} ... {dataset.decode(text[begun:])}" for text in texts]
