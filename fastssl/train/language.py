"""What language models have in common: text as subwords, a Transformer, and the cross-entropy over the vocabulary."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup, mean_over_processes
from fastssl.functional import linear_cross_entropy
from fastssl.train.data import subwords
from fastssl.train.data.subwords import LENGTH, VOCABULARY, Subwords
from fastssl.train.device import move
from fastssl.train.evaluate import pooled, probe_accuracy
from fastssl.train.method import Method
from fastssl.train.networks.transformer import Transformer

_TESTED = 512  # sequences
_PARTS = 10  # of the text, by which the probe goes


class LanguageModel(Method):
    """The Transformer's logits are products with its embeddings of subwords, and a bias, at first the logarithms of
    their frequencies. A model that has to find these first makes all features alike, a detour.

    Args:
        features: of a subword.
        depth: layers of the Transformer.
    """

    batch_size = 64
    learning_rate = 2e-3
    weight_decay = 0.05
    causal = False
    signs = 0  # beside the text's subwords, of which the last ones of the vocabulary

    def __init__(self, *, features: int = 128, depth: int = 4, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.encoder = Transformer(vocabulary + self.signs, LENGTH, features, depth, causal=self.causal)
        self.bias = nn.Parameter(torch.zeros(vocabulary + self.signs))

    @staticmethod
    def load(directory: str | os.PathLike[str] | None) -> Subwords:
        return subwords.load(directory)

    @torch.no_grad()
    def prepare(self, dataset: Subwords) -> None:
        unigram, signs = log_frequencies(dataset.train, self.vocabulary), -math.log(max(1, 3 * self.signs))
        self.bias.copy_(F.pad(unigram, (0, self.signs), value=signs))  # a quarter of all, as with spans of three

    def loss(self, features: Tensor, labels: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return cross_entropy(features, self.encoder.words.weight, labels, self.bias, group)

    def monitored(self, features: Tensor, labels: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return (features.flatten(0, 1),)

    def logits(self, features: Tensor) -> Tensor:
        """(..., features) -> (..., words) of the loss."""
        return F.linear(features, self.encoder.words.weight, self.bias)

    @torch.no_grad()
    def marks(self, dataset: Subwords, predicted: str) -> dict[str, float]:
        """The share of subwords that are predicted rightly, and the perplexity as a share of that of a model that knows
        how often each subword occurs, and no more; signs do not count."""
        training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(0)
        logits, labels = [], []
        for batch in dataset.test[:_TESTED].split(64):
            features, label, *_ = self(*move(self.views(batch, generator), self.device))
            counts = (label >= 0) & (label < self.vocabulary)
            logits.append(self.logits(features[counts]).log_softmax(1).cpu())
            labels.append(label[counts].cpu())
        self.train(training)
        return marks(torch.cat(logits), torch.cat(labels), log_frequencies(dataset.train, self.vocabulary), predicted)

    @torch.no_grad()
    def probe(self, dataset: Subwords) -> dict[str, float]:
        """What the mean of a sequence's features says of it: the tested text is cut into parts, and a linear classifier
        learns from three quarters of its sequences which part they are of. Of too short a text, nothing."""
        if len(dataset.test) < 4 * _PARTS:
            return {}
        training = self.training
        self.eval()
        found = torch.cat([pooled(self.encoder(move(batch, self.device))) for batch in dataset.test.split(256)])
        self.train(training)
        number = torch.arange(len(found))
        part, tested = number * _PARTS // len(found), number % 4 == 3
        accuracy = probe_accuracy(found[~tested], found[tested], part[~tested], part[tested])
        return {f"linear probe of which tenth of {len(found)} sequences one is of": accuracy}


def cross_entropy(
    features: Tensor,
    words: Tensor,
    labels: Tensor,
    bias: Tensor,
    group: ProcessGroup | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The mean of that of all labels but ignore_index. Its mean over the processes of a group is that of the whole
    batch, of whose labels they may have unlike numbers."""
    options = {"linear_bias": bias, "ignore_index": ignore_index}
    if group is None:
        return linear_cross_entropy(features, words, labels, **options)
    found = mean_over_processes((labels != ignore_index).sum().float(), group)
    return linear_cross_entropy(features, words, labels, **options, reduction="sum") / found


def log_frequencies(tokens: Tensor, vocabulary: int) -> Tensor:
    """(vocabulary,) logarithms of the tokens' shares, each counted once more than it occurs."""
    counts = 1 + tokens.flatten().bincount(minlength=vocabulary).double()
    return counts.log() - counts.sum().log()


def marks(log_probabilities: Tensor, labels: Tensor, unigram: Tensor, predicted: str) -> dict[str, float]:
    """Of (N, V) logarithms of probabilities, (N,) tokens that were to be predicted, and the logarithms of their
    frequencies: see `LanguageModel.marks`."""
    right = (log_probabilities.argmax(1) == labels).double().mean().item()
    bits = -log_probabilities.gather(1, labels[:, None]).double().mean()
    naive_bits = -unigram[labels].mean()
    ratio = (bits - naive_bits).exp().item()
    most = (labels == unigram.argmax()).double().mean().item()
    return {
        f"{predicted} right ({most:.1%}: always the most frequent)": right,
        f"perplexity over that of single subwords' frequencies, {naive_bits.exp():.0f},": ratio,
    }


def write(
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    length: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, L) tokens and what a model goes on with, (B, length): drawn from its distributions, or with temperature 0 the
    likeliest.

    Args:
        logits: (B, L) -> (B, V) of the next token.
    """
    while tokens.shape[1] < length:
        scores = logits(tokens).cpu()
        if temperature:
            following = (scores / temperature).softmax(1).multinomial(1, generator=generator)
        else:
            following = scores.argmax(1, keepdim=True)
        tokens = torch.cat([tokens, following], 1)
    return tokens
