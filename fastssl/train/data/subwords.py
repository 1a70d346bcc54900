"""Texts as subwords: a byte-level BPE vocabulary (arXiv:1508.07909), learned from the part that is trained on."""

from __future__ import annotations

import hashlib
import os
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
        return {"vocabulary": _tokenizers().Tokenizer.from_str(self.tokenizer).get_vocab_size()}

    def decode(self, sequence: Tensor) -> str:
        return _tokenizers().Tokenizer.from_str(self.tokenizer).decode(sequence.tolist())


def load(source: str | os.PathLike[str] | None = None) -> Subwords:
    """The sentences of `fastssl.train.data.text`, in order. What was learned stays in the user's cache.

    Args:
        source: as there.

    Raises:
        DataError: if the text cannot be had, is too short for a sequence to test, or tokenizers is not installed.
    """
    name, sentences = text.read(source)
    _tokenizers()  # raises now rather than when the cache is empty
    key = hashlib.sha256("\n".join((str(VOCABULARY), str(LENGTH), *sentences)).encode()).hexdigest()
    made = cached(cache_folder("subwords") / key[:16], key, lambda: _make(sentences))
    if not all(len(made[part]) for part in ("train", "test")):
        raise DataError(f"{name} must have {LENGTH} subwords to train on and as many to test, got fewer")
    return Subwords(name, **made)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError("subwords need the tokenizers library: pip install tokenizers") from None
    return tokenizers


def _make(sentences: list[str]) -> dict[str, Any]:
    library = _tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["[MASK]"], initial_alphabet=alphabet, show_progress=False
    )
    test = len(sentences) // 4
    lines = [f"{sentence}\n" for sentence in sentences]
    tokenizer.train_from_iterator(lines[:-test], trainer)

    def sequences(lines: list[str]) -> Tensor:
        ids = torch.tensor([*chain.from_iterable(x.ids for x in tokenizer.encode_batch(lines))], dtype=torch.int64)
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    return {"train": sequences(lines[:-test]), "test": sequences(lines[-test:]), "tokenizer": tokenizer.to_str()}
