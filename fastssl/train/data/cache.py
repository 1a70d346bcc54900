"""The user's cache of what takes long to fetch or to make."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import pickle
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl._meter import available_memory, format_bytes
from fastssl.train.files import open_regular, read_bytes

_NOTE = 256  # bytes
_FEW = 1 << 28  # bytes whose sum takes a tenth of a second


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


def mapped(path: Path, key: str, shape: Sequence[int], fill: Callable[[Tensor], Any]) -> tuple[Tensor, Any]:
    """uint8 numbers of that shape in a file, which need not fit into memory: the system reads what is used, and forgets
    it when memory runs short. And what `fill` returned, which wrote them, when the file was made for that key and
    shape; something that json knows.

    At the file's end is the SHA-256 of all that, which is looked at; of the numbers only where they are few, since a
    large file is not to be read before it is used. Nobody is to write to them. Where there can be no file, they are in
    memory.

    Raises:
        OSError: if there can be no file, and memory has no room for them either.
    """
    size = math.prod(shape)
    try:
        if (found := _note(path, key, shape)) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _partial(path, size + _NOTE) as partial:
                numbers = _map(partial, size, to_fill=True)
                found = {"value": fill(numbers.view(*shape))}
                found["sha256"] = _sum(key, shape, found["value"], numbers)
                with open(partial, "r+b") as file:
                    file.seek(size)
                    file.write(json.dumps(found).encode().ljust(_NOTE))
                os.replace(partial, path)
        return _map(path, size).view(*shape), found["value"]
    except OSError as error:
        if size > (free := available_memory()):
            needed = f"{path} needs {format_bytes(size)}, which must fit on the disk or into memory"
            raise OSError(f"{needed}, got {format_bytes(free)} of memory, and of the disk: {error}") from None
        numbers = torch.empty(*shape, dtype=torch.uint8)
        return numbers, fill(numbers)


@contextlib.contextmanager
def _partial(path: Path, size: int) -> Iterator[Path]:
    """A file beside `path`, of that size, which is gone after the block. What processes have left there that were
    killed is cleared away: it may be as large as a disk. A lock says that a process lives; it ends with it."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), open(left, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with open(partial, "xb") as file:
        try:
            with contextlib.suppress(OSError):  # of a file system without locks, where nobody clears away anything
                fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(file.fileno(), 0, size)  # now, rather than a crash when the disk is full
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _note(path: Path, key: str, shape: Sequence[int]) -> dict[str, Any] | None:
    """What is at the end of a file that `mapped` has written for that key and shape; None of another one."""
    size = math.prod(shape)
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size != size + _NOTE:
                return None
            file.seek(size)
            found = json.loads(file.read())
        right = found["sha256"] == _sum(key, shape, found["value"], _map(path, size))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if right else None


def _sum(key: str, shape: Sequence[int], value: Any, numbers: Tensor) -> str:
    digest = hashlib.sha256(json.dumps([key, list(shape), value]).encode())
    if numbers.numel() <= _FEW:
        digest.update(numbers.numpy())
    return digest.hexdigest()


def _map(path: Path, size: int, to_fill: bool = False) -> Tensor:
    try:
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)  # else it has no name any more
    except RuntimeError as error:
        if to_fill or not os.access(path, os.R_OK):
            raise OSError(str(error)) from error
    return torch.from_file(str(path), size=size, dtype=torch.uint8)  # it may be read, but not written to


def is_mapped(x: Tensor) -> bool:
    """Whether its numbers are in a file, and may have to be waited for."""
    return x.device.type == "cpu" and x.untyped_storage().filename is not None


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()
