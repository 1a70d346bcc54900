"""The training loop.

A method is a torch.nn.Module with an `encoder` and three steps, kept apart so that the loss can be measured alone:

    views(images, generator) -> inputs      random views of a batch of uint8 images; a static method
    forward(*inputs) -> embeddings          the networks
    loss(*embeddings) -> 0-d tensor         what the method is about
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fastssl.train.meter import Meter

_MEMORY_EVERY = 25  # steps


@dataclass(frozen=True)
class Step:
    """One optimiser step on one batch.

    Attributes:
        loss: before the update.
        seconds: forward, backward and update, without loading and augmentation.
        loss_seconds: the loss's share: its forward and backward, from the embeddings to their gradients.
        peak_bytes, loss_peak_bytes: resident memory (see `Meter`) that the step and its loss added at their
            highest; None except in every 25th step, whose times therefore should not be compared.
    """

    loss: float
    seconds: float
    loss_seconds: float
    peak_bytes: int | None
    loss_peak_bytes: int | None


def fit(
    methods: Mapping[str, nn.Module],
    images: Tensor,
    *,
    batch_size: int,
    steps: int,
    learning_rate: float = 2e-3,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, list[Step]]:
    """Train one or more methods side by side: each step, all of them learn from the same views of the same batch.

    Training twins that way lets their losses be compared step by step and their times fairly, since whatever
    else the machine does falls on both; the order in which they go alternates. AdamW, cosine schedule, warm-up.

    Args:
        methods: name -> method (see the module's docstring); changed in place.
        images: (N, H, W) uint8.
        batch_size: from 1 to N images; an epoch drops the last N mod batch_size.
        steps: number of batches, at least 1.
        learning_rate: the schedule's highest.
        seed: of data order and augmentation.
        console: where the progress bar goes.

    Returns:
        What each method did, by name, one Step per batch.

    Raises:
        ValueError: if batch_size or steps is out of range.
        FloatingPointError: if a loss is NaN or infinite.
    """
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"batch_size must be from 1 to the number of images ({len(images)}), got {batch_size}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    optimizers = {n: torch.optim.AdamW(m.parameters(), learning_rate, weight_decay=1e-4) for n, m in methods.items()}
    history: dict[str, list[Step]] = {name: [] for name in methods}
    make_views = next(iter(methods.values())).views
    columns = TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, status="")
        for step, batch in zip(range(steps), _batches(len(images), batch_size, generator), strict=False):
            views = make_views(images[batch], generator)
            for name in sorted(methods, reverse=bool(step % 2)):
                for group in optimizers[name].param_groups:
                    group["lr"] = learning_rate * _schedule(step, steps)
                memory = step % _MEMORY_EVERY == 1  # not in step 0, which also pays for the optimiser's state
                done = _train_step(methods[name], views, optimizers[name], memory)
                if not math.isfinite(done.loss):
                    raise FloatingPointError(f"{name}: the loss of step {step} is {done.loss}")
                history[name].append(done)
            last = {name: history[name][-1] for name in methods}
            status = (f"{n:8}loss {s.loss:.4f} {batch_size / s.seconds:7,.0f} images/s" for n, s in last.items())
            progress.update(task, advance=1, status="\n".join(status))
    return history


def _train_step(method: nn.Module, views: tuple[Tensor, ...], optimizer: torch.optim.Optimizer, memory: bool) -> Step:
    """forward, loss and update, measured apart: the graph is cut at the embeddings and sewn up with their gradients."""
    with Meter(memory) as forward:
        embeddings = method(*views)
    with Meter(memory) as objective:
        leaves = [z.detach().requires_grad_(z.requires_grad) for z in embeddings]
        loss = method.loss(*leaves)
        loss.backward()
    with Meter(memory) as update:
        pairs = [(z, leaf.grad) for z, leaf in zip(embeddings, leaves, strict=True) if z.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
        optimizer.step()
        optimizer.zero_grad()
    meters = (forward, objective, update)
    peak = max(m.peak for m in meters) - forward.before if forward.peak is not None else None
    return Step(loss.item(), sum(m.seconds for m in meters), objective.seconds, peak, objective.extra)


def _batches(images: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order[: images - images % batch_size].split(batch_size)


def _schedule(step: int, steps: int, warmup: float = 0.1) -> float:
    return min(1, (step + 1) / (warmup * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
