"""Speech without a data hub: the prompts of Asterisk, a telephone exchange, in five languages, with their texts.

Each of English, Spanish, French, Italian and Russian has one speaker. The recordings, of 8,000 samples a second, are in
Debian's packages asterisk-core-sounds-*-wav, the texts in asterisk-core-sounds-*. Prompts of one name say the same in
all languages; a quarter of the names is for testing.
"""

from __future__ import annotations

import gzip
import os
import re
import wave
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.train.data import packages
from fastssl.train.data.cache import cache_folder, cached
from fastssl.train.data.packages import DataError
from fastssl.train.files import open_regular

RATE = 8000  # samples a second
LENGTH, HOP = 450, 160  # samples of a frame, and from the beginning of one to that of the next: 20 ms
FRAMES, MARGIN = 200, 50  # of an example; and how many more a window has, so that examples can begin at any of them

SPEAKERS = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
SYSTEM_DIRECTORY = Path("/usr/share")


class Prompt(NamedTuple):
    """What a speaker says.

    Attributes:
        speaker: who.
        words: of the text, in lower case, each once; empty where the text is not known.
        waveform: (samples,) int16.
        tested: whether it is held out.
    """

    speaker: str
    words: frozenset[str]
    waveform: Tensor
    tested: bool


class Speech(NamedTuple):
    """Prompts; and those that are not for testing, one after another, as (N, samples) int16 windows."""

    name: str
    train: Tensor
    prompts: list[Prompt]


def load(source: str | os.PathLike[str] | None = None) -> Speech:
    """Asterisk's prompts, or a folder's. Those whose text has no words, such as tones, are left out.

    Args:
        source: folder that has a folder for each speaker, with wav files in any depth: 16 bits, one channel, 8,000
            samples a second. The text file <speaker>.txt beside that folder, in UTF-8, may say what is said, in lines
            "<name of the file, without .wav>: <text>". Default: Debian's packages are used where they are installed;
            otherwise they are fetched, 98 MB, and apt-get checks their signed checksums. What is made of them stays in
            the user's cache.

    Raises:
        DataError: if they cannot be had, a file is not of that kind, or those to learn from are shorter than a window.
    """
    if source is None:
        name, made = "Asterisk's prompts", cached(cache_folder("asterisk") / "prompts", "", _make)
    else:
        root = Path(source)
        speakers = sorted(folder for folder in root.glob("*/") if folder.is_dir())
        name, made = root.name, _together((folder, root / f"{folder.name}.txt") for folder in speakers)
    waveforms = made["samples"].split(made["lengths"])
    prompts = [
        Prompt(speaker, frozenset(_words(text)), waveform, tested)
        for (speaker, text, tested), waveform in zip(made["rows"], waveforms, strict=True)
    ]
    return Speech(name, _windows(name, [p.waveform for p in prompts if not p.tested]), prompts)


def samples(frames: int) -> int:
    """That many frames have."""
    return LENGTH + (frames - 1) * HOP


def frames(waveforms: Tensor) -> int:
    """That waveforms (..., samples) have."""
    return 1 + (waveforms.shape[-1] - LENGTH) // HOP


def to_float(waveforms: Tensor) -> Tensor:
    """int16 (..., samples) -> float32, of mean 0 and variance 1 each."""
    return F.layer_norm(waveforms.float(), waveforms.shape[-1:])


def _windows(name: str, waveforms: list[Tensor]) -> Tensor:
    """Of FRAMES + MARGIN frames, and FRAMES apart: views of the waveforms one after another."""
    whole, length = torch.cat(waveforms) if waveforms else torch.empty(0), samples(FRAMES + MARGIN)
    if len(whole) < length:
        raise DataError(f"{name} must have {length / RATE:.1f} seconds to learn from, got {len(whole) / RATE:.1f}")
    return whole.unfold(0, length, FRAMES * HOP)


def _make() -> dict[str, Any]:
    where = "Asterisk's prompts are in Debian's asterisk-core-sounds-*"
    installed = all(_is_there(*place) for place in _places(SYSTEM_DIRECTORY))
    with packages.debian_folder(SYSTEM_DIRECTORY, installed, _unpack, where) as root:
        made = _together(_places(root))
        if {speaker for speaker, *_ in made["rows"]} != set(SPEAKERS.values()):
            raise DataError(f"{root} must have recordings of {', '.join(SPEAKERS.values())}")
        return made


def _unpack(folder: Path) -> None:
    for language in SPEAKERS:
        for package in (f"asterisk-core-sounds-{language}-wav", f"asterisk-core-sounds-{language}"):
            packages.unpack_debian(package, folder)


def _places(root: Path) -> list[tuple[Path, Path]]:
    """Of recordings and texts."""
    return [
        (root / "asterisk/sounds" / speaker, root / f"doc/asterisk-core-sounds-{code}/core-sounds-{code}.txt.gz")
        for code, speaker in SPEAKERS.items()
    ]


def _is_there(recordings: Path, texts: Path) -> bool:
    return texts.exists() and any(recordings.rglob("*.wav"))


def _together(speakers: Iterable[tuple[Path, Path]]) -> dict[str, Any]:
    """The samples of all recordings, how many each has, and speaker, text and whether it is held out of each."""
    waveforms, rows = [], []
    for folder, file in speakers:
        texts = _texts(file) if file.exists() else None
        for path in sorted(folder.rglob("*.wav")):
            name = path.relative_to(folder).with_suffix("").as_posix().lower()
            text = "" if texts is None else texts.get(name, "")
            waveform = _read(path)
            if len(waveform) >= LENGTH and (texts is None or _words(text)):
                waveforms.append(waveform)
                rows.append((folder.name, text, zlib.crc32(name.encode()) % 4 == 0))
    together = torch.cat(waveforms) if waveforms else torch.empty(0, dtype=torch.int16)
    return {"samples": together, "lengths": [len(waveform) for waveform in waveforms], "rows": rows}


def _texts(path: Path) -> dict[str, str]:
    """The text by the name, in lower case, without what is in brackets, such as [tone]."""
    try:
        with open_regular(path) as file, gzip.open(file) if path.suffix == ".gz" else file as contents:
            lines = contents.read().decode("utf-8-sig").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a text: {error}") from None
    pairs = (line.partition(":") for line in lines if not line.startswith(";"))
    return {name.strip().lower(): re.sub(r"\[.*?\]|\(.*?\)", " ", text).lower() for name, _, text in pairs}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _read(path: Path) -> Tensor:
    """(samples,) int16."""
    try:
        with open_regular(path) as file, wave.open(file) as recording:
            kind = recording.getsampwidth() * 8, recording.getnchannels(), recording.getframerate()
            contents = recording.readframes(recording.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path} cannot be read as a wav file: {error}") from None
    if kind != (16, 1, RATE):
        raise DataError(
            f"{path} must have 16 bits, one channel and {RATE} samples a second, got {kind[0]}, {kind[1]} and {kind[2]}"
        )
    whole = bytearray(contents[: len(contents) // 2 * 2])
    return torch.frombuffer(whole, dtype=torch.int16) if whole else torch.empty(0, dtype=torch.int16)
