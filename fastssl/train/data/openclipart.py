"""Drawings of the Open Clip Art Library (public domain), release 0.18, with titles and keywords: a larger, noisy set.

The drawings are those of Debian's package openclipart-png; the rest is in the metadata of openclipart-svg's files.
Captions are the words of title and keywords, each once. A title that more than three drawings share is the name of a
collection: the name of the file takes its place. Words of the artist's name, and words that say nothing, are left out.
"""

from __future__ import annotations

import functools
import html
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from fastssl.train.data import packages
from fastssl.train.data.cache import cache_folder, cached
from fastssl.train.data.image_folder import SIZE, decode
from fastssl.train.data.packages import DataError
from fastssl.train.files import open_regular, read_bytes

DEBIAN_PACKAGES = "openclipart-svg", "openclipart-png"
SYSTEM_DIRECTORY = Path("/usr/share/openclipart")

_ALIKE = 8  # drawings of one caption that stay: 1,375 are stars
_LARGEST = 16_000_000  # pixels of a drawing that stays: nineteen have more, three times as many as all others together
_SAY_NOTHING = {"clipart", "hash", "svg", "theme", "unsorted"}


def read() -> list[tuple[Tensor, str, str, bool, str]]:
    """Image (3, SIZE, SIZE), caption, title, whether the title was before, and the folder of about 6,000 drawings.

    Debian's packages are used where they are installed; otherwise they are fetched, 156 MB, and apt-get checks their
    signed checksums. What is made of them stays in the user's cache.

    Raises:
        DataError: if the packages cannot be had.
    """
    content = cached(cache_folder("openclipart") / "pairs", f"{SIZE}", _make)
    return [(image, *row) for image, row in zip(content["images"], content["rows"], strict=True)]


def _make() -> dict[str, Any]:
    installed = all((SYSTEM_DIRECTORY / kind).is_dir() for kind in ("png", "svg"))
    where = f"OpenClipart is in Debian's {' and '.join(DEBIAN_PACKAGES)}"
    with packages.debian_folder(SYSTEM_DIRECTORY, installed, _unpack, where) as folder:
        return _convert(folder)


def _unpack(folder: Path) -> None:
    for package in DEBIAN_PACKAGES:
        packages.unpack_debian(package, folder)


def _convert(root: Path) -> dict[str, Any]:
    drawings = []
    for svg in sorted((root / "svg").rglob("*.svg")):
        path = svg.relative_to(root / "svg")
        png = root / "png" / path.with_suffix(".png")
        if png.exists() and _pixels(png) <= _LARGEST:
            drawings.append((png, path, *_metadata(svg)))
    if not drawings:
        raise DataError(f"{root} must have drawings in both svg and png")
    titles, captions, concepts = Counter(title.lower() for _, _, title, _, _ in drawings), Counter(), Counter()
    files, rows = [], []
    for png, path, title, keywords, artist in drawings:
        name = title if title and titles[title.lower()] <= 3 else path.stem
        left_out = _SAY_NOTHING | set(_words(artist))
        name, keywords = ([word for word in _words(text) if word not in left_out] for text in (name, keywords))
        caption = " ".join(dict.fromkeys(name + keywords))
        concept = " ".join(name) or caption
        captions[caption] += 1
        if caption and captions[caption] <= _ALIKE:
            folder = path.parts[0].replace("_", " ")
            files.append(png)
            rows.append((caption, concept, concept in concepts, "" if folder in _SAY_NOTHING else folder))
            concepts[concept] += 1
    images = torch.empty(len(files), 3, SIZE, SIZE, dtype=torch.uint8)
    decode(files, images, functools.partial(ImageOps.pad, color="white"))
    return {"images": images, "rows": rows}


def _pixels(png: Path) -> int:
    with open_regular(png) as file:
        header = file.read(24)
    return int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big")


def _metadata(svg: Path) -> tuple[str, str, str]:
    """Title, keywords, artist."""
    content = read_bytes(svg)
    text = content[content.find(b"<metadata") : content.find(b"</metadata>")].decode(errors="replace")
    artist = re.search(r"<dc:creator>.*?<dc:title[^>]*>(.*?)</dc:title>", text, re.DOTALL)
    title = re.search(r"<dc:title[^>]*>(.*?)</dc:title>", text, re.DOTALL)
    keywords = re.findall(r"<rdf:li[^>/]*>(.*?)</rdf:li>", text, re.DOTALL)
    found = title[1] if title else "", " ".join(keywords), artist[1] if artist else ""
    return tuple(" ".join(html.unescape(part).split()) for part in found)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]{2,}", text.lower())
