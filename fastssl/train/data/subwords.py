"""Texts as subwords: a byte-level BPE vocabulary (arXiv:1508.07909), learned from the part that is trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.train.data import text
from fastssl.train.data.cache import cache_folder, cached
from fastssl.train.data.packages import DataError

VOCABULARY = 4096  # subwords, at most; 0 is that which stands for a masked one
LENGTH = 64  # subwords of a sequence


class Subwords(NamedTuple):
    """(N, LENGTH) int64 subwords of a text, cut into sequences without regard to its sentences: three quarters, and the
    last one for testing. `tokenizer` is that of the tokenizers library, in JSON."""

    name: str
    train: Tensor
    test: Tensor
    tokenizer: str

    @property
    def facts(self) -> dict[str, int]:
        """What a constructor may have to know."""
        return {"vocabulary": library().Tokenizer.from_str(self.tokenizer).get_vocab_size()}

    def decode(self, sequence: Tensor) -> str:
        return library().Tokenizer.from_str(self.tokenizer).decode(sequence.tolist())


def load(source: str | os.PathLike[str] | None = None) -> Subwords:
    """The sentences of `fastssl.train.data.text`, in order. What was learned stays in the user's cache.

    Args:
        source: as there.

    Raises:
        DataError: if the text cannot be had, is too short for a sequence to test, or tokenizers is not installed.
    """
    name, sentences = text.read(source)
    library()  # raises now rather than when the cache is empty
    key = hashlib.sha256("\n".join((str(VOCABULARY), str(LENGTH), *sentences)).encode()).hexdigest()
    made = cached(cache_folder("subwords") / key[:16], key, lambda: _make(sentences))
    if not all(len(made[part]) for part in ("train", "test")):
        raise DataError(f"{name} must have {LENGTH} subwords to train on and as many to test, got fewer")
    return Subwords(name, **made)


def load_sentences(source: str | os.PathLike[str] | None = None) -> Subwords:
    """The same with a row for each sentence, without what is beyond LENGTH, and 0 after the last subword."""
    dataset = load(source)
    _, sentences = text.read(source)
    tokenizer = library().Tokenizer.from_str(dataset.tokenizer)
    tokens = torch.zeros(len(sentences), LENGTH, dtype=torch.int64)
    for row, sentence in zip(tokens, tokenizer.encode_batch(sentences), strict=True):
        ids = sentence.ids[:LENGTH]
        row[: len(ids)] = torch.tensor(ids)
    test = len(sentences) // 4
    return dataset._replace(train=tokens[:-test], test=tokens[-test:])


def library() -> Any:
    """The tokenizers library.

    Raises:
        DataError: if it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise DataError("subwords need the tokenizers library: pip install tokenizers") from None
    return tokenizers


def learn(lines: Sequence[str], vocabulary: int, signs: Sequence[str]) -> Any:
    """A tokenizer whose subwords, `vocabulary` at most, begin with the signs, which no text has."""
    tokenizers = library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(signs), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _make(sentences: list[str]) -> dict[str, Any]:
    test = len(sentences) // 4
    lines = [f"{sentence}\n" for sentence in sentences]
    tokenizer = learn(lines[:-test], VOCABULARY, ["[MASK]"])

    def sequences(lines: list[str]) -> Tensor:
        ids = torch.tensor([*chain.from_iterable(x.ids for x in tokenizer.encode_batch(lines))], dtype=torch.int64)
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    return {"train": sequences(lines[:-test]), "test": sequences(lines[-test:]), "tokenizer": tokenizer.to_str()}
