"""What language models have in common: text as subwords, a Transformer, and the cross-entropy over the vocabulary."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from fastssl.functional import linear_cross_entropy
from fastssl.train.data import subwords
from fastssl.train.data.subwords import LENGTH, VOCABULARY, Subwords
from fastssl.train.method import Method
from fastssl.train.networks.transformer import Transformer

_TESTED = 512  # sequences


class LanguageModel(Method):
    """The Transformer's logits are products with its embeddings of subwords, and a bias.

    Args:
        features: of a subword.
        depth: layers of the Transformer.
    """

    learning_rate = 2e-3
    weight_decay = 0.05
    causal = False

    def __init__(self, *, features: int = 128, depth: int = 4, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.encoder = Transformer(vocabulary, LENGTH, features, depth, causal=self.causal)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    @staticmethod
    def load(directory: str | os.PathLike[str] | None) -> Subwords:
        return subwords.load(directory)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(features, self.encoder.words.weight, labels, linear_bias=self.bias)

    def monitored(self, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (features.flatten(0, 1),)

    @torch.no_grad()
    def marks(self, dataset: Subwords, predicted: str) -> dict[str, float]:
        """The share of subwords that are predicted rightly, and the perplexity as a share of that of a model that knows
        how often each subword occurs, and no more."""
        training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(0)
        counts = 1 + dataset.train.flatten().bincount(minlength=len(self.bias)).double()
        unigram = counts.log() - counts.sum().log()
        right, bits, naive_bits = [], [], []
        for batch in dataset.test[:_TESTED].split(64):
            features, labels = self(*self.views(batch, generator))
            features, labels = features[labels >= 0], labels[labels >= 0]
            logits = (features @ self.encoder.words.weight.T + self.bias).log_softmax(1)
            right.append(logits.argmax(1) == labels)
            bits.append(-logits.gather(1, labels[:, None]))
            naive_bits.append(-unigram[labels])
        self.train(training)
        most = (torch.cat(naive_bits) == -unigram.max()).double().mean().item()
        ratio = (torch.cat(bits).double().mean() - torch.cat(naive_bits).mean()).exp().item()
        return {
            f"{predicted} right ({most:.1%}: always the most frequent)": torch.cat(right).double().mean().item(),
            f"perplexity over that of single subwords' frequencies, {torch.cat(naive_bits).mean().exp():.0f},": ratio,
        }
