"""Files that others have named or left: only regular ones are read, since a pipe or a device would never end."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, TextIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        OSError: if it cannot be read, or is a pipe, a socket, a device or a folder.
    """

    file = open(path, "rb", opener=_open_at_once)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{os.fspath(path)} must be a regular file")
    return file


def read_bytes(path: Path) -> bytes:
    """All of its bytes."""
    with open_regular(path) as file:
        return file.read()


def open_text(path: Path, *, errors: str = "strict", encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """To read its text."""
    return io.TextIOWrapper(open_regular(path), encoding, errors, newline)


def check_writable(path: Path) -> None:
    """Make its folder, and raise OSError now if a file cannot be written there later. It leaves no file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    open(path, "ab", opener=_open_at_once).close()
    if not existed:
        os.unlink(os.path.realpath(path))  # of a link to what was not there, that and not the link


def _open_at_once(name: str, flags: int) -> int:
    """A pipe would wait for its other end."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
