"""The training loop, and what it asks of methods and data.

A method is a `fastssl.train.method.Method`, a torch.nn.Module. One step calls, in this order,

    views(batch, generator) -> inputs       a batch of the data -> the model's inputs, random; a static method
    forward(*inputs) -> embeddings          the networks: a tuple of tensors, of which at least one has a gradient;
                                            others are constants of the loss, such as a teacher's output or labels
    loss(*embeddings) -> 0-d tensor         what the method is about, apart so that it can be measured alone
    after_step(*embeddings)                 after the optimiser's step: moves the teacher, fills the queue

inputs and embeddings are tensors with a row for each example of the batch. What the optimiser does not train, such as a
teacher, has no requires_grad. All that a step depends on must be in state_dict, for checkpoints. Random numbers come
from views' generator, or from PyTorch's default one (dropout), which has a seed for each step.

The data are anything with len() that an int64 tensor of positions indexes: data[positions] is the batch that `views`
gets. A tensor of images is such, and torch.utils.data.TensorDataset(images, labels), whose batches are tuples.

In several processes, each calls forward with its share of the inputs, and loss and after_step with the embeddings of
all: see `fastssl.train.parallel`.

Beside that, the command line calls `load`, `training_data` and `evaluate`, which say what data a method learns from and
what it is worth; for images they have defaults. Its options are the arguments of the method's constructor: each has a
type annotation, float, int or bool, a default, and a line under "Args:". `total_steps` is no option, but the length of
the run; nor are `size`, `colours` and `classes`, which are those of the images. `--impl naive` runs the step, but not
its views, in the backend "reference" of `fastssl.use_backend`: a method calls the functions and modules of fastssl and
nothing else for its losses, moving averages and queues. Views, masks among them, and measurements are the same in both.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastssl import grad_cache, use_backend
from fastssl.distributed import rank, world_size
from fastssl.train import checkpoint as checkpoints
from fastssl.train import parallel
from fastssl.train.evaluate import Health, health
from fastssl.train.meter import Meter
from fastssl.train.method import IMPLEMENTATIONS, Method
from fastssl.train.optimizers import defaults, make_optimizer

_MEMORY_EVERY = 25  # steps
_REPORTS = 10  # of a run


@dataclass(frozen=True)
class Step:
    """One optimiser step on one batch.

    Attributes:
        loss: before the update.
        seconds: forward, backward and update, without loading and augmentation.
        loss_seconds: the loss's share: its forward and backward, from the embeddings to their gradients. None, as is
            loss_peak_bytes, in a run by chunks.
        after_seconds: the share of `after_step`, which moves the teacher and fills the queue.
        peak_bytes, loss_peak_bytes: resident memory (see `Meter`) that the step and its loss added at their
            highest; None except in every 25th step, whose times therefore should not be compared.
        health: of the embeddings, as `loss` gets them; None except about ten times in a run, and in its last step.
    """

    loss: float
    seconds: float
    loss_seconds: float | None
    after_seconds: float
    peak_bytes: int | None
    loss_peak_bytes: int | None
    health: Health | None = None


def fit(
    methods: Mapping[str, Method],
    data: Any,
    *,
    batch_size: int,
    steps: int,
    optimizer: str = "adamw",
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    layer_decay: float = 1.0,
    clip: float | None = None,
    amp: bool = False,
    chunk_size: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    resume: bool = False,
    writer: Any = None,
    console: Console | None = None,
) -> dict[str, list[Step]]:
    """Train one or more methods side by side: each step, all of them learn from the same views of the same batch.

    Training twins that way lets their losses be compared step by step and their times fairly, since whatever
    else the machine does falls on both; the order in which they go alternates. Cosine schedule with warm-up.

    A run that was stopped and resumed has the losses of one that was not: the randomness of a step depends on the seed
    and the step's number alone, and everything else is in the checkpoint.

    Where torch.distributed's default group, of CPUs, has several processes, all of them must call this with the same
    arguments. They have the losses that one process has, but for rounding and for dropout, whose masks are each
    process's own. See `fastssl.train.parallel`.

    Args:
        methods: name -> method (see the module's docstring); changed in place.
        data: what the first method's `views` takes batches of (see there).
        batch_size: from 1 to len(data), of all processes together, each of which has an equal share; an epoch drops
            the last len(data) mod batch_size.
        steps: number of batches, at least 1.
        optimizer: "adamw" or "lars".
        learning_rate: the schedule's highest; None: each method's own, with LARS 0.3 batch_size / 256.
        weight_decay: of weights that are matrices; None: each method's own, with LARS 1e-6.
        layer_decay: the learning rate of each of the encoder's stages, as a share of the next one's, for fine-tuning.
        clip: the norm to which longer gradients are cut, that of all parameters together; None: they are not.
        amp: forward pass and loss under autocast to bfloat16.
        chunk_size: examples whose activations are in memory at a time, see `fastssl.grad_cache`, those of all
            processes together; None: all the batch's.
        seed: of data order, augmentation and dropout.
        checkpoint: file to save to every `save_every` steps, at the end, and on Ctrl-C when the step is done; None:
            nothing is saved.
        resume: go on from the checkpoint.
        writer: a torch.utils.tensorboard.SummaryWriter, or what has its add_scalar, for the losses and the rest; of
            several processes only the first has a use for it.
        console: where the progress bar goes, of the first process.

    Returns:
        What each method did, by name, one Step per batch, those before a resumed checkpoint included.

    Raises:
        ValueError: if there is no method, batch_size, steps or clip is out of range, the processes cannot have equal
            shares of a batch or of its chunks, the optimizer is unknown, or the checkpoint is of another run.
        FloatingPointError: if a loss or a gradient is NaN or infinite, before the step that would spoil the weights.
        OSError: if the checkpoint cannot be read or written.
        KeyboardInterrupt: on Ctrl-C in any process, after saving.
    """
    if not methods:
        raise ValueError("methods must be one at least, got none")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    if not 1 <= batch_size <= len(data):
        raise ValueError(f"batch_size must be from 1 to the number of examples ({len(data)}), got {batch_size}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    parallel.check_shares(batch_size, chunk_size)
    if rank() > 0:
        console, writer = Console(quiet=True), None
    rates, decays = {}, {}
    for name, method in methods.items():
        parallel.start_alike(method)
        rate, decay = defaults(optimizer, method, batch_size)
        rates[name] = rate if learning_rate is None else learning_rate
        decays[name] = decay if weight_decay is None else weight_decay
    optimizers = {
        name: make_optimizer(optimizer, method, rates[name], decays[name], layer_decay)
        for name, method in methods.items()
    }
    history: dict[str, list[Step]] = {name: [] for name in methods}
    run = {
        "examples": len(data), "batch_size": batch_size, "steps": steps, "optimizer": optimizer, "clip": clip,
        "learning_rate": rates, "weight_decay": decays, "layer_decay": layer_decay, "amp": amp,
        "chunk_size": chunk_size, "seed": seed,
        "methods": {
            name: {"class": type(method).__name__, "impl": method.impl, **method.options}
            for name, method in methods.items()
        },
    }  # fmt: skip
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        parallel.in_first_process(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    if resume:
        _restore(path, run, methods, optimizers, history)
    first = len(next(iter(history.values())))
    report_every = max(1, steps // _REPORTS)
    make_views = next(iter(methods.values())).views
    columns = TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    defer = path is not None or world_size() > 1
    with progress, torch.random.fork_rng(devices=[]), _deferred_interrupt(defer) as interrupted:
        task = progress.add_task("", total=steps, completed=first, status="")
        for step, batch in zip(range(first, steps), _batches(len(data), batch_size, seed, first), strict=False):
            views = make_views(data[batch], torch.Generator().manual_seed(_seed(seed, "views", step)))
            views = tuple(parallel.share(view, chunk_size) for view in views)
            for name in sorted(methods, reverse=bool(step % 2)):
                method = methods[name]
                for group in optimizers[name].param_groups:
                    group["lr"] = group["scale"] * rates[name] * _schedule(step, steps)
                torch.manual_seed(_seed(seed, "dropout", step) + rank())
                memory = step % _MEMORY_EVERY == 1  # not in step 0, which also pays for the optimiser's state
                report = step % report_every == 0 or step == steps - 1
                try:
                    done = _train_step(method, views, optimizers[name], memory, clip, amp, report, chunk_size)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{name}: in step {step} {error}") from None
                if done.health is not None:
                    _report(progress.console, name, step, done)
                if writer is not None:
                    _write(writer, name, step, done)
                history[name].append(done)
            stop = parallel.anywhere(interrupted.is_set())
            if path is not None and ((step + 1) % save_every == 0 or step == steps - 1 or stop):
                parallel.in_first_process(lambda: _save(path, run, methods, optimizers, history))
            if stop:
                raise KeyboardInterrupt
            last = {name: history[name][-1] for name in methods}
            status = (f"{n} loss {s.loss:.4f} {batch_size / s.seconds:7,.0f} examples/s" for n, s in last.items())
            progress.update(task, advance=1, status="\n".join(status))
    return history


def _train_step(
    method: Method,
    views: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    memory: bool = False,
    clip: float | None = None,
    amp: bool = False,
    report: bool = False,
    chunk_size: int | None = None,
) -> Step:
    autocast = torch.autocast(views[0].device.type, torch.bfloat16, enabled=amp)
    with use_backend(IMPLEMENTATIONS[method.impl]):
        if chunk_size is None:
            embeddings, loss, meters, objective = _differentiate(method, views, autocast, memory)
        else:
            embeddings, loss, meters, objective = _differentiate_by_chunks(method, views, autocast, memory, chunk_size)
        with Meter(memory) as update:
            parallel.average_gradients(method)
            _check_and_clip(method, clip)
            optimizer.step()
            optimizer.zero_grad()
            with Meter() as after:
                method.after_step(*(z.detach() for z in embeddings))
    meters.append(update)
    peak = max(m.peak for m in meters) - meters[0].before if update.peak is not None else None
    found = health([z.detach() for z in method.monitored(*embeddings)]) if report else None
    seconds, loss_seconds, loss_peak = sum(m.seconds for m in meters), None, None
    if objective is not None:
        loss_seconds, loss_peak = objective.seconds, objective.extra
    return Step(loss, seconds, loss_seconds, after.seconds, peak, loss_peak, found)


Differentiated = tuple[Sequence[Tensor], float, list[Meter], Meter | None]


def _differentiate(method: Method, views: tuple[Tensor, ...], autocast: torch.autocast, memory: bool) -> Differentiated:
    """Embeddings of the whole batch, loss, meters of it all, and that of the loss: the graph is cut at the embeddings
    and sewn up with their gradients."""
    with Meter(memory) as forward, autocast:
        embeddings = method(*views)
    with Meter(memory) as objective:
        leaves = [z.detach().requires_grad_(z.requires_grad) for z in embeddings]
        with autocast:
            whole = [parallel.gather(leaf) for leaf in leaves]
            loss = _finite_loss(method, *whole)
        loss.backward()
    with Meter(memory) as backward:
        pairs = [(z, leaf.grad) for z, leaf in zip(embeddings, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
    return whole, loss.item(), [forward, objective, backward], objective


def _differentiate_by_chunks(
    method: Method, views: tuple[Tensor, ...], autocast: torch.autocast, memory: bool, chunk_size: int
) -> Differentiated:
    """The same by `grad_cache`."""
    embeddings: list[Tensor] = []

    def loss_fn(*leaves: Tensor) -> Tensor:
        embeddings.extend(parallel.gather(leaf, chunk_size) for leaf in leaves)
        return _finite_loss(method, *embeddings)

    with Meter(memory) as everything, autocast:
        loss = grad_cache(method, views, loss_fn, chunk_size=chunk_size // world_size())
    return embeddings, loss.item(), [everything], None


def _finite_loss(method: Method, *embeddings: Tensor) -> Tensor:
    loss = method.loss(*embeddings)
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    return loss


def _check_and_clip(method: Method, clip: float | None) -> None:
    parameters = {name: p for name, p in method.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values()])
    if not norm.isfinite():
        spoilt = [name for name, p in parameters.items() if not p.grad.isfinite().all()]
        raise FloatingPointError(f"the gradient of {spoilt[0] if spoilt else 'all parameters'} is NaN or infinite")
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), clip, norm)


def _report(console: Console, name: str, step: int, done: Step) -> None:
    alarm = ": COLLAPSED, all inputs have nearly the same embedding" if done.health.collapsed else ""
    console.print(f"{name} step {step}: loss {done.loss:.4f}, {done.health}{alarm}", highlight=False)


def _write(writer: Any, name: str, step: int, done: Step) -> None:
    values = {"loss": done.loss, "seconds": done.seconds, "loss_seconds": done.loss_seconds}
    for label, value in {**values, **(vars(done.health) if done.health else {})}.items():
        if value is not None:
            writer.add_scalar(f"{name}/{label}", value, step)


def _save(
    path: Path,
    run: dict[str, Any],
    methods: Mapping[str, Method],
    optimizers: Mapping[str, torch.optim.Optimizer],
    history: Mapping[str, list[Step]],
) -> None:
    state = {
        "run": run,
        "weights": {name: method.state_dict() for name, method in methods.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "history": {name: [asdict(step) for step in steps] for name, steps in history.items()},
    }
    checkpoints.save(state, path)


def _restore(
    path: Path | None,
    run: dict[str, Any],
    methods: Mapping[str, Method],
    optimizers: Mapping[str, torch.optim.Optimizer],
    history: dict[str, list[Step]],
) -> None:
    """Put back what `_save` saved."""
    if path is None:
        raise ValueError("resume needs a checkpoint, got None")
    state = parallel.in_first_process(lambda: checkpoints.load(path))
    if not isinstance(state, dict) or state.keys() != {"run", "weights", "optimizers", "history"}:
        raise ValueError(f"{path} is no checkpoint of a training run")
    for name, value in run.items():
        if (saved := state["run"].get(name)) != value:
            raise ValueError(f"{path} is of a run with {name} {saved}, got {value}")
    for name, method in methods.items():
        try:
            method.load_state_dict(state["weights"][name])
            optimizers[name].load_state_dict(state["optimizers"][name])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from None
        for step in state["history"][name]:
            history[name].append(Step(**{**step, "health": step["health"] and Health(**step["health"])}))


@contextlib.contextmanager
def _deferred_interrupt(defer: bool) -> Iterator[threading.Event]:
    """With `defer`, Ctrl-C sets the event; a second one interrupts at once, as the first does without `defer`."""
    interrupted = threading.Event()
    if not defer or threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(examples: int, batch_size: int, seed: int, first: int) -> Iterator[Tensor]:
    """The positions of every batch from number `first` on: each epoch in an order of its own."""
    order = torch.empty(0)
    for step in itertools.count(first):
        epoch, place = divmod(step, examples // batch_size)
        if place == 0 or step == first:
            order = torch.randperm(examples, generator=torch.Generator().manual_seed(_seed(seed, "order", epoch)))
        yield order[place * batch_size : (place + 1) * batch_size]


def _seed(seed: int, purpose: str, number: int) -> int:
    return random.Random(f"{seed} {purpose} {number}").getrandbits(63)


def _schedule(step: int, steps: int, warmup: float = 0.1) -> float:
    return min(1, (step + 1) / (warmup * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
