"""One step of training: forward pass, loss, backward pass, update; and how long each takes.

A step reads no number that a GPU computes: `Taken` has what it was, and is read when that is known. On a CPU there is
nothing to wait for, and a loss or a gradient that is NaN is found before the update. On a GPU it is found when the step
is read; until then the update, which looks at the gradients itself, leaves the weights as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastssl import grad_cache, use_backend
from fastssl._meter import CudaMeter, Meter, meter
from fastssl.distributed import ProcessGroup, world_size
from fastssl.train import fsdp, parallel
from fastssl.train.device import Reading
from fastssl.train.evaluate import Health, HealthNumbers
from fastssl.train.method import IMPLEMENTATIONS, Method
from fastssl.train.run import Run

_Meter = Meter | CudaMeter


@dataclass(frozen=True)
class Step:
    """One optimiser step on one batch.

    Attributes:
        loss: before the update.
        seconds: forward, backward and update, without loading and augmentation.
        loss_seconds: the loss's share: its forward and backward, from the embeddings to their gradients. None, as is
            loss_peak_bytes, in a run by chunks.
        after_seconds: the share of `after_step`, which moves the teacher and fills the queue.
        peak_bytes, loss_peak_bytes: resident memory (see `Meter`), or a GPU's allocated memory, that the step and its
            loss added at their highest; None except in every 25th step, whose times therefore should not be compared.
        health: of the embeddings, as `loss` gets them; None except about ten times in a run, and in its last step.
    """

    loss: float
    seconds: float
    loss_seconds: float | None
    after_seconds: float
    peak_bytes: int | None
    loss_peak_bytes: int | None
    health: Health | None = None


class Taken:
    """A step that has been taken, or is still on its way through a GPU.

    Args:
        loss: 0-d.
        names: of the parameters that have a gradient.
        norms: those gradients' norms, (len(names),).
        total_norm: of all of them together, 0-d.
        scale: what the loss was multiplied with, 0-d; None: nothing.
    """

    def __init__(
        self, loss: Tensor, names: Sequence[str], norms: Tensor, total_norm: Tensor, scale: Tensor | None
    ) -> None:
        self.names, self.total_norm, self.scaled = names, total_norm, scale is not None
        numbers = [x.detach().double().flatten() for x in (loss, total_norm, norms, *([scale] if self.scaled else []))]
        self._numbers = Reading(torch.cat(numbers))
        self.meters: list[_Meter] = []
        self.objective: _Meter | None = None
        self.after: _Meter | None = None
        self.health: HealthNumbers | None = None

    def check(self) -> float:
        """The loss. Waits for it, and for the gradients.

        Raises:
            FloatingPointError: if the loss or a gradient is NaN or infinite. Where the loss was scaled up, gradients
                may be, and the step was left out; but not where it was scaled down instead.
        """
        loss, total_norm, *norms = self._numbers.numbers()
        scale = norms.pop() if self.scaled else 0.0
        if not _finite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        if not _finite(total_norm) and scale < 1:
            spoilt = [name for name, norm in zip(self.names, norms, strict=True) if not _finite(norm)]
            raise FloatingPointError(f"the gradient of {spoilt[0] if spoilt else 'all parameters'} is NaN or infinite")
        return loss

    def read(self) -> Step:
        """What it was. Waits for all of it.

        Raises:
            FloatingPointError: as `check` does.
        """
        loss, meters, objective = self.check(), self.meters, self.objective
        peak = max(m.peak for m in meters) - meters[0].before if meters[-1].peak is not None else None
        seconds = sum(m.seconds for m in meters)
        loss_seconds, loss_peak = (None, None) if objective is None else (objective.seconds, objective.extra)
        health = None if self.health is None else self.health.read()
        return Step(loss, seconds, loss_seconds, self.after.seconds, peak, loss_peak, health)


def _finite(number: float) -> bool:
    return abs(number) < float("inf")


def train_step(
    method: Method,
    views: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    run: Run,
    *,
    scaler: torch.amp.GradScaler | None = None,
    wait: bool = True,
    memory: bool = False,
    report: bool = False,
) -> Taken:
    """Moves the method's weights against the gradient of its loss.

    Args:
        method: changed in place.
        views: the model's inputs, this process's share of them.
        optimizer: of the method's parameters.
        run: its `amp`, `chunk_size` and `clip` are used.
        scaler: of the loss, where gradients are in float16.
        wait: whether to look for NaN before the update. Otherwise it is the optimiser that leaves out such a step, as
            with a GradScaler; torch.optim.AdamW does if it is fused, and `LARS`.
        memory: whether to measure memory, which may take time.
        report: whether to look at the embeddings' health.

    Raises:
        FloatingPointError: if the loss or a gradient is NaN or infinite; the weights are then as they were. Without
            `wait` that is raised by `Taken.read`.
    """
    device = views[0].device
    autocast = torch.autocast(device.type, run.autocast_dtype) if run.amp else contextlib.nullcontext()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    differentiate = _differentiate if run.chunk_size is None else partial(_differentiate_by_chunks, run.chunk_size)
    group = parallel.group_of(method.loss) if method.impl != "naive" else None
    with use_backend(IMPLEMENTATIONS[method.impl]):
        embeddings, loss, meters, objective = differentiate(method, views, group, autocast, scaler, memory)
        embeddings = [z.detach() for z in embeddings]
        with meter(memory, device) as update:
            loss = parallel.average_gradients(method, loss)
            scale = scaler.scale(torch.ones((), device=device)) if scaler.is_enabled() else None
            scaler.unscale_(optimizer)
            taken = Taken(loss, *_norms(method), scale)
            if wait:
                taken.check()
            if run.clip is not None:
                gradients = [fsdp.local(p.grad) for p in method.parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, (run.clip / (taken.total_norm + 1e-6)).clamp(max=1))
            if not (wait or scaler.is_enabled()) and getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.found_inf = (~taken.total_norm.isfinite()).float()  # as the scaler would set it
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            with meter(False, device) as after:
                if group is not None and parallel.group_of(method.after_step) is None:
                    method.after_step(*_whole(embeddings, group, run.chunk_size))
                else:
                    method.after_step(*embeddings, **({} if group is None else {"group": group}))
    taken.meters, taken.objective, taken.after = [*meters, update], objective, after
    if report:
        taken.health = _health(method, _whole(embeddings, group, run.chunk_size))
    return taken


def _whole(embeddings: Sequence[Tensor], group: ProcessGroup | None, chunk_size: int | None) -> Sequence[Tensor]:
    """Those of the whole batch; with a group, embeddings are this process's."""
    return embeddings if group is None else [parallel.gather(z, chunk_size) for z in embeddings]


def _health(method: Method, embeddings: Sequence[Tensor]) -> HealthNumbers:
    with torch.no_grad(), use_backend(IMPLEMENTATIONS[method.impl]):
        return HealthNumbers(method.monitored(*embeddings), method.assignments(*embeddings))


Differentiated = tuple[Sequence[Tensor], Tensor, list[_Meter], _Meter | None]


def _differentiate(
    method: Method,
    views: tuple[Tensor, ...],
    group: ProcessGroup | None,
    autocast: contextlib.AbstractContextManager,
    scaler: torch.amp.GradScaler,
    memory: bool,
) -> Differentiated:
    """Embeddings of the whole batch, or with a group this process's, loss, the meter of it all, and that of the loss:
    the graph is cut at the embeddings and joined again by their gradients."""
    measured = partial(meter, memory, views[0].device)
    with measured() as forward, autocast:
        embeddings = method(*views)
    with measured() as objective:
        leaves = [z.detach().requires_grad_(z.requires_grad) for z in embeddings]
        with autocast:
            whole, loss = _loss(method, leaves, group, None)
        scaler.scale(loss).backward()
    with measured() as backward:
        pairs = [(z, leaf.grad) for z, leaf in zip(embeddings, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
    return whole, loss, [forward, objective, backward], objective


def _differentiate_by_chunks(
    chunk_size: int,
    method: Method,
    views: tuple[Tensor, ...],
    group: ProcessGroup | None,
    autocast: contextlib.AbstractContextManager,
    scaler: torch.amp.GradScaler,
    memory: bool,
) -> Differentiated:
    """The same by `grad_cache`."""
    found: list[Tensor] = []

    def loss_fn(*leaves: Tensor) -> Tensor:
        whole, loss = _loss(method, leaves, group, chunk_size)
        found.extend([loss, *whole])
        return scaler.scale(loss)

    with meter(memory, views[0].device) as everything, autocast:
        grad_cache(method, views, loss_fn, chunk_size=chunk_size // world_size())
    loss, *whole = found
    return whole, loss, [everything], None


def _loss(
    method: Method, leaves: Sequence[Tensor], group: ProcessGroup | None, chunk_size: int | None
) -> tuple[Sequence[Tensor], Tensor]:
    """What the loss is taken of, and the loss."""
    if group is not None:
        return leaves, method.loss(*leaves, group=group)
    whole = [parallel.gather(leaf, chunk_size) for leaf in leaves]
    return whole, method.loss(*whole)


def _norms(method: Method) -> tuple[list[str], Tensor, Tensor]:
    """Of the parameters that have a gradient: their names, the gradients' norms, and the norm of all together."""
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    norms = fsdp.norms(list(gradients.values()))
    return list(gradients), norms, torch.linalg.vector_norm(norms)
