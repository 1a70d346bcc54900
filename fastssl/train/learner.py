"""One method in a run."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.distributed import rank
from fastssl.train import parallel
from fastssl.train.method import Method
from fastssl.train.optimizers import make_optimizer
from fastssl.train.run import Run
from fastssl.train.step import Step, train_step

_MEMORY_EVERY = 25  # steps
_REPORTS = 10  # of a run


class Learner:
    """A method that a run trains, with its optimiser and what it has done so far.

    In several processes all begin with the first one's weights.
    """

    def __init__(self, name: str, method: Method, run: Run) -> None:
        parallel.start_alike(method)
        self.name, self.method, self.run = name, method, run
        self.rate, self.decay = run.rates(method)
        self.optimizer = make_optimizer(run.optimizer, method, self.rate.peak, self.decay.first, run.layer_decay)
        self.history: list[Step] = []

    def learn(self, views: tuple[Tensor, ...]) -> Step:
        """The next step, from this process's share of the model's inputs.

        Raises:
            FloatingPointError: if the loss or a gradient is NaN or infinite; the weights are then as they were.
        """
        step, run = len(self.history), self.run
        self.method.progress = progress = run.progress(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.rate(progress)
            group["weight_decay"] = group["decays"] * self.decay(progress)
        torch.manual_seed(run.seed_for("dropout", step) + rank())
        memory = step % _MEMORY_EVERY == 1  # not in step 0, which also pays for the optimiser's state
        report = step % max(1, run.steps // _REPORTS) == 0 or step == run.steps - 1
        try:
            done = train_step(self.method, views, self.optimizer, run, memory=memory, report=report)
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: in step {step} {error}") from None
        self.history.append(done)
        return done
