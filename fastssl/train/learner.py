"""One method in a run."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.distributed import rank
from fastssl.train import fsdp, parallel
from fastssl.train.method import Method
from fastssl.train.optimizers import make_optimizer
from fastssl.train.run import Run
from fastssl.train.step import Step, Taken, train_step

_MEMORY_EVERY = 25  # steps
_REPORTS = 10  # of a run
_LATE = 4  # steps that a GPU may have before it when the host reads what became of the one before them


class Learner:
    """A method that a run trains, with its optimiser and what it has done so far.

    In several processes all begin with the first one's weights.

    Attributes:
        history: the steps whose numbers are known. On a GPU these come some steps late: nothing waits for them.
    """

    def __init__(self, name: str, method: Method, run: Run, device: torch.device) -> None:
        method.to(device)
        if run.channels_last:
            method.to(memory_format=torch.channels_last)
        parallel.start_alike(method)
        if run.fsdp:
            fsdp.check(name, method, run.amp)
            fsdp.shard(method, device)
        self.name, self.method, self.run = name, method, run
        self.rate, self.decay = run.rates(method)
        self.optimizer = make_optimizer(run.optimizer, method, self.rate.peak, self.decay.first, run.layer_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp == "float16")
        self.history: list[Step] = []
        self._under_way: deque[Taken] = deque()
        self._late = 0 if device.type == "cpu" else _LATE

    def learn(self, views: tuple[Tensor, ...]) -> list[Step]:
        """Takes the next step, from this process's share of the model's inputs.

        Returns:
            The steps that have become known: on a CPU this one.

        Raises:
            FloatingPointError: if the loss or a gradient is NaN or infinite, in this step, or in one that has become
                known; the weights are then as they were before it.
        """
        step, run = len(self.history) + len(self._under_way), self.run
        self.method.progress = progress = run.progress(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.rate(progress)
            group["weight_decay"] = group["decays"] * self.decay(progress)
        torch.manual_seed(run.seed_for("dropout", step) + rank())
        memory = step % _MEMORY_EVERY == 1  # not in step 0, which also pays for the optimiser's state
        report = step % max(1, run.steps // _REPORTS) == 0 or step == run.steps - 1
        with self._naming(step):
            self._under_way.append(
                train_step(
                    self.method, views, self.optimizer, run,
                    scaler=self.scaler, wait=not self._late, memory=memory, report=report,
                )
            )  # fmt: skip
        return self.read(self._late)

    def read(self, late: int = 0) -> list[Step]:
        """Those steps that become known while all but the last `late` are waited for.

        Raises:
            FloatingPointError: if there was NaN in one of them.
        """
        known = []
        while len(self._under_way) > late:
            with self._naming(len(self.history)):
                known.append(self._under_way.popleft().read())
            self.history.append(known[-1])
        return known

    @contextlib.contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: in step {step} {error}") from None
