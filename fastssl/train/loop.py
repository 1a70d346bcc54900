"""The training loop. What it needs from methods and data is in `fastssl.train.method`."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastssl.distributed import rank, world_size
from fastssl.train import checkpoint, parallel, resume, signals
from fastssl.train.data.draw import Draw
from fastssl.train.data.loader import Loader
from fastssl.train.device import choose, move
from fastssl.train.learner import Learner
from fastssl.train.method import Method
from fastssl.train.run import Run
from fastssl.train.step import Step

_MUCH = 0.2  # of the time, to wait for data


def fit(
    methods: Mapping[str, Method], data: Any, run: Run, *, writer: Any = None, console: Console | None = None
) -> dict[str, list[Step]]:
    """Train one or more methods side by side: each step, all of them learn from the same views of the same batch.

    When twins are trained this way, their losses can be compared step by step, and their times fairly, since whatever
    else the machine does falls on both; they take turns in going first. Cosine schedule with warm-up.

    A run that was stopped and resumed has the losses of one that was not: the randomness of a step depends on the seed
    and the step's number alone, and everything else is in the checkpoint.

    On a GPU the host reads no number of a step while it is being taken; losses, and what became of gradients, are known
    a few steps later, so NaN stops the run a few steps late. The weights are then as they were before that step. A
    checkpoint waits for all steps.

    If torch.distributed's default group has several processes, all of them must call this with the same
    arguments. They have the losses that one process has, except for rounding and for dropout, whose masks are each
    process's own. See `fastssl.train.parallel`.

    Args:
        methods: name -> method (see `fastssl.train.method`); changed in place.
        data: what the first method's `views` takes batches of (see there).
        run: how they are trained, and where that is saved.
        writer: a torch.utils.tensorboard.SummaryWriter, or any object with its add_scalar, for the losses and the rest;
            only the first of several processes uses it.
        console: where the first process shows the progress bar.

    Returns:
        What each method did, by name: one Step per batch, including those before a resumed checkpoint.

    Raises:
        ValueError: if there is no method, the batch is larger than the data, the processes cannot have equal shares of
            a batch or of its chunks, or the checkpoint is of another run.
        FloatingPointError: if a loss or a gradient is NaN or infinite; the step has not spoilt the weights.
        OSError: if the checkpoint cannot be read or written, which is tried before the first step, is there and not to
            be resumed, or is that of another run which has not ended.
        KeyboardInterrupt: on Ctrl-C in any process, after saving.
        SystemExit: so on SIGTERM, with the status 143 that a shell gives to what this has ended.
    """
    if not methods:
        raise ValueError("methods must be one at least, got none")
    if run.batch_size > len(data):
        raise ValueError(f"batch_size must be from 1 to the number of examples ({len(data)}), got {run.batch_size}")
    parallel.check_shares(run.batch_size, run.chunk_size)
    if rank() > 0:
        console, writer = Console(quiet=True), None
    device = choose(run.device)
    learners = [Learner(name, method, run, device) for name, method in methods.items()]
    about = resume.describe(run, learners, data)
    path = None if run.checkpoint is None else Path(run.checkpoint)
    with contextlib.ExitStack() as stack:
        if path is not None:
            stack.enter_context(parallel.held_by_first_process(checkpoint.reserved(path, run.resume)))
        if run.resume:
            resume.restore(path, about, learners)
        first = len(learners[0].history)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        progress = stack.enter_context(_progress(console))
        received = stack.enter_context(signals.deferred()) if path is not None or world_size() > 1 else lambda: 0
        task = progress.add_task("", total=run.steps, completed=first, status="")
        views_of = _Views(learners[0].method, run, device)
        loader = Loader(data, map(views_of.needs, _batches(run, len(data), first)))
        began = time.perf_counter()
        for step, examples in zip(range(first, run.steps), loader, strict=False):
            views = views_of(examples, step)
            for learner in sorted(learners, key=lambda learner: learner.name, reverse=bool(step % 2)):
                _tell(learner, learner.learn(views), progress.console, writer)
            stop = parallel.highest(received())
            save = path is not None and ((step + 1) % run.save_every == 0 or step == run.steps - 1 or stop)
            for learner in learners if save or stop or step == run.steps - 1 else ():
                _tell(learner, learner.read(), progress.console, writer)
            if save:
                resume.save(path, about, learners)
            if stop:
                signals.end(stop)
            progress.update(task, advance=1, status="\n".join(_status(learner) for learner in learners))
        waited = loader.seconds / (time.perf_counter() - began)
        if waited > _MUCH:
            progress.console.print(f"{waited:.0%} of the time went by waiting for data to be read.", highlight=False)
    return {learner.name: learner.history for learner in learners}


class _Views:
    """This process's share of the model's inputs, on the device."""

    def __init__(self, method: Method, run: Run, device: torch.device) -> None:
        self.method, self.run, self.device = method, run, device
        by_example = "draw" in inspect.signature(method.views).parameters
        self.rows = parallel.share(torch.arange(run.batch_size), run.chunk_size) if by_example else None

    def needs(self, batch: Tensor) -> Tensor:
        """Of the positions of a batch, those whose examples are needed here."""
        return batch if self.rows is None else batch[self.rows]

    def __call__(self, examples: Any, step: int) -> tuple[Tensor, ...]:
        run, generator = self.run, torch.Generator().manual_seed(self.run.seed_for("views", step))
        if self.rows is None:
            views = tuple(parallel.share(view, run.chunk_size) for view in self.method.views(examples, generator))
        else:
            draw = Draw(generator, run.batch_size, self.rows, self.device)
            views = self.method.views(move(examples, self.device), draw)
        views = move(tuple(views), self.device)
        if not run.channels_last:
            return views
        return tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in views)


def _batches(run: Run, examples: int, first: int) -> Iterator[Tensor]:
    """The positions of every batch, starting with batch `first`; each epoch has an order of its own."""
    order = torch.empty(0)
    for step in itertools.count(first):
        epoch, place = divmod(step, examples // run.batch_size)
        if place == 0 or step == first:
            order = torch.randperm(examples, generator=torch.Generator().manual_seed(run.seed_for("order", epoch)))
        yield order[place * run.batch_size : (place + 1) * run.batch_size]


def _progress(console: Console | None) -> Progress:
    columns = BarColumn(10), MofNCompleteColumn(), TextColumn("{task.fields[status]}")  # within 80
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _status(learner: Learner) -> str:
    if not learner.history:
        return learner.name
    last = learner.history[-1]
    return f"{learner.name} loss {last.loss:.4f} {learner.run.batch_size / last.seconds:7,.0f} examples/s"


def _tell(learner: Learner, known: Sequence[Step], console: Console, writer: Any) -> None:
    """Of the steps that have become known, the last ones of the learner's history."""
    for step, done in enumerate(known, len(learner.history) - len(known)):
        if done.health is not None:
            _report(console, learner.name, step, done)
        if writer is not None:
            _write(writer, learner.name, step, done)


def _report(console: Console, name: str, step: int, done: Step) -> None:
    """On lines that fit a terminal of 80 columns."""
    console.print(f"{name} step {step}: loss {done.loss:.4f}\n  {done.health}", highlight=False)
    if done.health.collapse:
        console.print(f"  COLLAPSED: {done.health.collapse}", highlight=False)


def _write(writer: Any, name: str, step: int, done: Step) -> None:
    values = {"loss": done.loss, "seconds": done.seconds, "loss_seconds": done.loss_seconds}
    for label, value in {**values, **(vars(done.health) if done.health else {})}.items():
        if value is not None:
            writer.add_scalar(f"{name}/{label}", value, step)
