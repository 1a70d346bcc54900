"""Checkpoints: whole or not there at all, of one run at a time, and checked to the last bit.

A checkpoint is what torch.save writes, a zip archive, with a comment, which ends it: the SHA-256 of all bytes before
the checksum. So torch.load and every other reader of zip archives take it as they take any.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fastssl.train import parallel
from fastssl.train.files import open_regular

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # a cluster's file system may have none
_SEAL_LENGTH = len(b"SHA-256 ") + 64


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside `path`, then rename: whenever the process or the machine stops, `path` is the old file or the new.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "x+b") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)
            file.write(_SEAL_LENGTH.to_bytes(2, "little"))  # of the archive's comment, which has been none
            file.write(_seal(file, file.tell()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # what torch.save makes of a failed write
            raise OSError(f"{path} cannot be written: {error.__context__ or error}") from None
        raise


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no checkpoint, or a single bit of it is not what it was.
    """
    with open_regular(path) as file:
        length = max(0, os.fstat(file.fileno()).st_size - _SEAL_LENGTH)
        file.seek(length)
        seal = file.read()
        if not re.fullmatch(rb"SHA-256 [0-9a-f]{64}", seal):
            raise ValueError(f"{path} is no checkpoint, or damaged: it must end with its SHA-256")
        if (found := _seal(file, length)) != seal:
            raise ValueError(f"{path} is damaged: its contents must have {seal.decode()}, found {found.decode()}")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of what somebody else has written and sealed
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} is no checkpoint: {reason}") from None


def _seal(file: BinaryIO, length: int) -> bytes:
    """That of the first bytes of a file, at whose end it leaves the file."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return b"SHA-256 " + digest.hexdigest().encode()


@contextlib.contextmanager
def reserved(path: Path, resume: bool) -> Iterator[None]:
    """In this block `path` is the checkpoint of one run, which has made sure that it can be written.

    The folder is made if need be, and what dead runs have left beside it is cleared away. What keeps others out is a
    lock on a file beside it; it ends with the process, however that ends. Where the file system has no locks, others
    are not kept out.

    Args:
        path: of the checkpoint.
        resume: whether it may be there already.

    Raises:
        BlockingIOError: if it is another run's.
        OSError: if its folder cannot be written to, it is a folder itself, or it is there and not to be resumed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file, and is a directory")
    place, alone = path.with_name(path.name + ".lock"), True
    with contextlib.ExitStack() as stack:
        while True:
            lock = stack.enter_context(open(place, "ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"{path} is the checkpoint of another run, which has not ended") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                alone = False  # nobody knows
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(place)):  # not removed by the run before
                    break
        stack.callback(place.unlink, missing_ok=True)
        for partial in path.parent.iterdir() if alone else ():
            if re.fullmatch(rf"{re.escape(path.name)}\.[0-9a-f]{{32}}\.partial", partial.name):
                partial.unlink(missing_ok=True)
        if path.exists() and not resume:
            raise FileExistsError(f"{path} exists, and would be overwritten; resume goes on from it")
        yield


def check_tensors(tensors: Any, expected: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if they are not a dict of tensors with the names, dtypes and shapes of those expected."""
    if not isinstance(tensors, dict):
        raise ValueError(f"{what}: it must be a dict of tensors, and is {type(tensors).__name__}")
    for name in {**expected, **tensors}:
        wanted, found = (_describe(values[name]) if name in values else "absent" for values in (expected, tensors))
        if wanted != found:
            raise ValueError(f"{what}: {name} must be {wanted}, and is {found}")


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    unusual = "meta" if value.is_meta else "" if value.layout == torch.strided else str(value.layout)
    return " ".join(filter(None, (str(value.dtype).removeprefix("torch."), unusual, str(tuple(value.shape)))))


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Load into `encoder` the weights of the encoder in the checkpoint of a run with one method. If it can, it adopts
    parts that the checkpoint's has and it has not, such as a class token.

    Every process loads it, what the first one reads.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no such checkpoint, or its encoder is of another kind or size.
    """
    state = parallel.in_first_process(lambda: load(path))
    runs = state.get("weights") if isinstance(state, dict) else None
    if not isinstance(runs, dict) or len(runs) != 1:
        raise ValueError(f"{path} is no checkpoint of a run with one method")
    (weights,) = runs.values()
    if isinstance(weights, dict):
        start = "encoder."
        weights = {k[len(start) :]: w for k, w in weights.items() if isinstance(k, str) and k.startswith(start)}
        if hasattr(encoder, "adopt"):
            encoder.adopt(weights)
    check_tensors(weights, encoder.state_dict(), f"{path} has another encoder")
    encoder.load_state_dict(weights)
