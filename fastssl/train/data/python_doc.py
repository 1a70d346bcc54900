"""The prose of Python's documentation (PSF licence), from Debian's package python3-doc."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from fastssl.train.data import packages
from fastssl.train.data.cache import cache_folder, cached
from fastssl.train.data.packages import DataError
from fastssl.train.files import open_text

SYSTEM_DIRECTORY = Path("/usr/share/doc")


def read() -> list[str]:
    """The paragraphs of the tutorial, the library's reference and all other parts, in the order of their files' names.

    The package is used where it is installed; otherwise it is fetched, 13 MB, and apt-get checks its signed checksum.
    The paragraphs stay in the user's cache, each once.

    Raises:
        DataError: if the package cannot be had.
    """
    return cached(cache_folder("python-doc") / "paragraphs", "", _make)


def _make() -> list[str]:
    where = "Python's documentation is in Debian's python3-doc"
    with packages.debian_folder(SYSTEM_DIRECTORY, _installed(), _unpack, where) as folder:
        return _paragraphs(folder)


def _unpack(folder: Path) -> None:
    """The package that python3-doc, which is empty, depends on."""
    depends = packages.run("apt-cache", "depends", "python3-doc", cwd=folder)
    package = re.search(r"python3\.\d+-doc", depends)
    packages.unpack_debian(package[0] if package else "python3-doc", folder)


def _installed() -> bool:
    return any(SYSTEM_DIRECTORY.glob("python3.*/html/*/*.html"))


def _paragraphs(folder: Path) -> list[str]:
    paragraphs = []
    for page in sorted(folder.glob("python3.*/html/*/*.html")):
        parser = _Paragraphs()
        with open_text(page, errors="replace") as file:
            parser.feed(file.read())
        paragraphs += parser.found
    if not paragraphs:
        raise DataError(f"{folder} must have python3.*/html with pages that have paragraphs")
    return list(dict.fromkeys(paragraphs))


class _Paragraphs(HTMLParser):
    """`found` is the text of each <p>."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pieces: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "p":
            self.pieces = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self.pieces is not None:
            self.found.append(" ".join("".join(self.pieces).split()))
            self.pieces = None

    def handle_data(self, data: str) -> None:
        if self.pieces is not None:
            self.pieces.append(data)
