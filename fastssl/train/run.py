"""The description of a run: how methods are trained, whatever they are and on whatever data."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass

from fastssl.train.method import Method
from fastssl.train.optimizers import check_optimizer, defaults


@dataclass(frozen=True, kw_only=True)
class Run:
    """The description of a run of `fastssl.train.fit`.

    Attributes:
        batch_size: of all processes together, each of which has an equal share; an epoch drops the last
            len(data) mod batch_size.
        steps: number of batches, at least 1.
        optimizer: "adamw" or "lars".
        learning_rate: the schedule's highest; None: each method's own, with LARS 0.3 batch_size / 256.
        weight_decay: of weights that are matrices; None: each method's own, with LARS 1e-6.
        layer_decay: the learning rate of each of the encoder's stages, as a share of the next one's, for fine-tuning.
        clip: the norm, of the gradients of all parameters together, to which longer ones are cut; None: they are not
            cut.
        amp: forward pass and loss under autocast to bfloat16.
        chunk_size: examples whose activations are in memory at a time, in all processes together, see
            `fastssl.grad_cache`; None: the whole batch.
        seed: of data order, augmentation and dropout.
        checkpoint: file to save to every `save_every` steps, at the end, and on Ctrl-C or SIGTERM when the step is
            done; None: nothing is saved.
        save_every: steps.
        resume: go on from the checkpoint.

    Raises:
        ValueError: if one of them is out of range, the optimizer is unknown, or there is no checkpoint to resume.
    """

    batch_size: int
    steps: int
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float | None = None
    layer_decay: float = 1.0
    clip: float | None = None
    amp: bool = False
    chunk_size: int | None = None
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None
    save_every: int = 200
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "save_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_optimizer(self.optimizer, self.layer_decay)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if self.resume and self.checkpoint is None:
            raise ValueError("resume needs a checkpoint, got None")

    def rates(self, method: Method) -> tuple[float, float]:
        """The method's highest learning rate, and its weight decay."""
        rate, decay = defaults(self.optimizer, method, self.batch_size)
        return (
            rate if self.learning_rate is None else self.learning_rate,
            decay if self.weight_decay is None else self.weight_decay,
        )

    def schedule(self, step: int, warmup: float = 0.1) -> float:
        """The learning rate in a step, as a share of its highest: a warm-up, then half a cosine."""
        return min(1, (step + 1) / (warmup * self.steps)) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def seed_for(self, purpose: str, number: int) -> int:
        """The seed of the random numbers for one purpose in one step or epoch."""
        return random.Random(f"{self.seed} {purpose} {number}").getrandbits(63)
