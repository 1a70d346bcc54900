"""Checkpoints: whole or not there at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


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


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Give `encoder` the weights that one of its kind has in a checkpoint of a run with one method.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no such checkpoint, or its encoder is of another kind or size.
    """
    state = load(path)
    runs = state.get("weights") if isinstance(state, dict) else None
    if not isinstance(runs, dict) or len(runs) != 1:
        raise ValueError(f"{path} is no checkpoint of a run with one method")
    (weights,) = runs.values()
    weights = {key.removeprefix("encoder."): w for key, w in weights.items() if key.startswith("encoder.")}
    expected = encoder.state_dict()
    for key in expected | weights:
        wanted, found = (tuple(w[key].shape) if key in w else "absent" for w in (expected, weights))
        if wanted != found:
            raise ValueError(f"{path} has another encoder: {key} must be {wanted}, and is {found}")
    encoder.load_state_dict(weights)
