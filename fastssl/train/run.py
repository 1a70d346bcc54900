"""The description of a run: how methods are trained, whatever they are and on whatever data."""

from __future__ import annotations

import operator
import os
import random
from dataclasses import dataclass
from types import NoneType

import torch

from fastssl._checks import check_flag, check_number, check_positive
from fastssl.train.method import Method
from fastssl.train.optimizers import check_optimizer, defaults
from fastssl.train.schedules import Schedule

AMP = ("bfloat16", "float16")
_MAY_BE_NONE = {"learning_rate", "weight_decay", "final_weight_decay", "clip", "chunk_size"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The description of a run of `fastssl.train.fit`.

    Attributes:
        batch_size: of all processes together, each of which has an equal share; an epoch drops the last
            len(data) mod batch_size.
        steps: number of batches, at least 1.
        optimizer: "adamw" or "lars".
        learning_rate: the schedule's highest; None: each method's own, with LARS 0.3 batch_size / 256.
        weight_decay: of weights that are matrices, at first; None: each method's own, with LARS 1e-6.
        final_weight_decay: at the end, to which it moves along half a cosine; None: each method's own, or weight_decay
            where that is given, and with LARS.
        layer_decay: the learning rate of each of the encoder's stages, as a share of the next one's, for fine-tuning.
        clip: the norm, of the gradients of all parameters together, to which longer ones are cut; None: they are not
            cut.
        amp: forward pass and loss under autocast, to "bfloat16" (or True), or to "float16", with a scaled loss, whose
            scale is found on the way; False: not.
        device: where the run takes place, and to where `fit` moves the methods; "auto": a GPU if there is one.
        channels_last: whether images and convolutions have their channels last in memory, which is faster on GPUs.
        chunk_size: examples whose activations are in memory at a time, in all processes together, see
            `fastssl.grad_cache`; None: the whole batch.
        fsdp: whether the processes share out the weights of Transformer layers, see `fastssl.train.fsdp`.
        seed: of data order, augmentation and dropout.
        checkpoint: file to save to every `save_every` steps, at the end, and on Ctrl-C or SIGTERM when the step is
            done; None: nothing is saved.
        save_every: steps.
        resume: go on from the checkpoint.

    Raises:
        TypeError: if one of them is of another type.
        ValueError: if one of them is out of range, the optimizer is unknown, or there is no checkpoint to resume.
    """

    batch_size: int
    steps: int
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float | None = None
    final_weight_decay: float | None = None
    layer_decay: float = 1.0
    clip: float | None = None
    amp: bool | str = False
    device: str | torch.device = "cpu"
    channels_last: bool = False
    chunk_size: int | None = None
    fsdp: bool = False
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None
    save_every: int = 200
    resume: bool = False

    def __post_init__(self) -> None:
        checks = {
            **dict.fromkeys(("batch_size", "steps", "save_every", "chunk_size"), check_positive),
            **dict.fromkeys(("resume", "channels_last", "fsdp"), check_flag),
            "amp": _check_amp,
            **dict.fromkeys(("learning_rate", "weight_decay", "final_weight_decay"), _check_not_negative),
            "layer_decay": _check_layer_decay,
            "clip": _check_clip,
            "seed": _check_seed,
        }
        for name, check in checks.items():
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                object.__setattr__(self, name, check(name, value))
        check_optimizer(self.optimizer, self.layer_decay)
        if not isinstance(self.checkpoint, (str, os.PathLike, NoneType)):
            raise TypeError(f"checkpoint must be a path or None, got {type(self.checkpoint).__name__}")
        if self.resume and self.checkpoint is None:
            raise ValueError("resume needs a checkpoint, got None")

    def rates(self, method: Method) -> tuple[Schedule, Schedule]:
        """The learning rate in the course of the run, a warm-up, then half a cosine; and the weight decay."""
        rate, decay, final_decay = defaults(self.optimizer, method, self.batch_size)
        if self.learning_rate is not None:
            rate = self.learning_rate
        if self.weight_decay is not None:
            decay = final_decay = self.weight_decay
        if self.final_weight_decay is not None:
            final_decay = self.final_weight_decay
        return Schedule(0.0, rate, 0.0, warmup=0.1), Schedule(decay, decay, final_decay)

    @property
    def autocast_dtype(self) -> torch.dtype:
        """Of products, where there is `amp`."""
        return getattr(torch, self.amp)

    def progress(self, step: int) -> float:
        """The share of the run that is done in the middle of a step, which is what schedules go by."""
        return (step + 0.5) / self.steps

    def seed_for(self, purpose: str, number: int) -> int:
        """The seed of the random numbers for one purpose in one step or epoch."""
        return random.Random(f"{self.seed} {purpose} {number}").getrandbits(63)


def _check_not_negative(name: str, number: float) -> float:
    number = check_number(name, number)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def _check_amp(name: str, amp: bool | str) -> bool | str:
    if amp is True:
        return "bfloat16"
    if amp is not False and amp not in AMP:
        raise ValueError(f"{name} must be True, False or one of {', '.join(map(repr, AMP))}, got {amp!r}")
    return amp


def _check_clip(name: str, norm: float) -> float:
    if norm != norm or check_number(name, norm) <= 0:
        raise ValueError(f"{name} must be positive, got {norm}")
    return float(norm)


def _check_layer_decay(name: str, decay: float) -> float:
    return decay if decay != decay else check_number(name, decay)  # `check_optimizer` knows the range


def _check_seed(name: str, seed: int) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(seed).__name__}") from None
