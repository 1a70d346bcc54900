"""Checkpoints: whole or not there at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside `path`, then rename: whenever the process or the machine stops, `path` is the old file or the new.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no checkpoint.
    """
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint, or damaged: {str(error).splitlines()[0]}") from None
