"""The user's cache of what takes long to fetch or to make."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl.train.files import read_bytes


def cache_folder(name: str) -> Path:
    """The user's cache of the data set `name`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastssl" / name


def cached(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, tensors and containers of them, or what it returned when `path` was written for that key.
    The file begins with the SHA-256 of the key and of all that follows: if it is damaged, or has another key, it is
    made anew. Where nothing can be written, nothing is kept.
    """
    with contextlib.suppress(OSError, pickle.UnpicklingError):
        digest, _, content = read_bytes(path).partition(b"\n")
        if digest == _digest(key, content):
            return torch.load(io.BytesIO(content), weights_only=True)
    made = make()
    file = io.BytesIO()
    torch.save(made, file)
    content = file.getvalue()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_bytes(_digest(key, content) + b"\n" + content)
            os.replace(whole, path)
    return made


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()
