"""Checkpoints: whole or not there at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside `path`, then rename: whenever the process or the machine stops, `path` is the old file or the new.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
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
        ValueError: if it is no checkpoint.
    """
    with open(path, "rb") as file:
        try:
            return torch.load(file, weights_only=True)
        except Exception as error:  # a damaged file can make it raise almost anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} is no checkpoint, or damaged: {reason}") from None
