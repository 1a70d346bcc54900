"""Images with captions as subwords, which can be written again: those of `fastssl.train.data.pairs`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastssl.train.data import pairs, subwords
from fastssl.train.data.image_folder import SIZE

VOCABULARY = 2048  # subwords, at most; the first two are no text
PADDING, END = 0, 1  # END begins texts, too
LENGTH = 32  # subwords of a text that count, with those two ends


class Captions(NamedTuple):
    """As `Pairs`, but for the texts, (N, LENGTH) subwords of the tokenizer, that of the tokenizers library, in JSON."""

    name: str
    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    test_labels: Tensor
    tokenizer: str

    @property
    def facts(self) -> dict[str, int]:
        """What a constructor may have to know."""
        vocabulary = subwords.library().Tokenizer.from_str(self.tokenizer).get_vocab_size()
        return {"size": SIZE, "colours": 3, "vocabulary": vocabulary}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """As captions were."""
        return _encode(subwords.library().Tokenizer.from_str(self.tokenizer), texts)

    def decode(self, text: Tensor) -> str:
        """Without what follows the end."""
        tokens = text[1:].tolist()
        tokens = tokens[: tokens.index(END)] if END in tokens else tokens
        return subwords.library().Tokenizer.from_str(self.tokenizer).decode(tokens)


def load(source: str | os.PathLike[str] | None = None) -> Captions:
    """The pairs of that source; the subwords are learned from the captions to train on.

    Raises:
        DataError: as there, or if tokenizers is not installed.
    """
    subwords.library()  # raises now rather than after the pairs have been fetched
    name, train, test, classes = pairs.read(source)
    tokenizer = subwords.learn([pair.caption for pair in train], VOCABULARY, ["[PADDING]", "[END]"])
    sets = (pairs.tensors(part, lambda texts: _encode(tokenizer, texts)) for part in (train, test))
    return Captions(name, *sets, classes, pairs.labels(test, classes), tokenizer.to_str())


def _encode(tokenizer: object, texts: Sequence[str]) -> Tensor:
    tokens = torch.full((len(texts), LENGTH), PADDING)
    for row, text in zip(tokens, tokenizer.encode_batch(list(texts)), strict=True):
        ids = [END, *text.ids[: LENGTH - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens
