"""One step of training: forward pass, loss, backward pass, update; and how long each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl import grad_cache, use_backend
from fastssl._meter import Meter
from fastssl.distributed import world_size
from fastssl.train import parallel
from fastssl.train.evaluate import Health, health
from fastssl.train.method import IMPLEMENTATIONS, Method
from fastssl.train.run import Run


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


def train_step(
    method: Method,
    views: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    run: Run,
    *,
    memory: bool = False,
    report: bool = False,
) -> Step:
    """Moves the method's weights against the gradient of its loss.

    Args:
        method: changed in place.
        views: the model's inputs, this process's share of them.
        optimizer: of the method's parameters.
        run: its `amp`, `chunk_size` and `clip` are used.
        memory: whether to measure memory, which takes time.
        report: whether to look at the embeddings' health.

    Raises:
        FloatingPointError: if the loss or a gradient is NaN or infinite; the weights are then as they were.
    """
    autocast = torch.autocast(views[0].device.type, torch.bfloat16, enabled=run.amp)
    with use_backend(IMPLEMENTATIONS[method.impl]):
        if run.chunk_size is None:
            embeddings, loss, meters, objective = _differentiate(method, views, autocast, memory)
        else:
            embeddings, loss, meters, objective = _differentiate_by_chunks(
                method, views, autocast, memory, run.chunk_size
            )
        with Meter(memory) as update:
            parallel.average_gradients(method)
            _check_and_clip(method, run.clip)
            optimizer.step()
            optimizer.zero_grad()
            with Meter() as after:
                method.after_step(*(z.detach() for z in embeddings))
    meters.append(update)
    peak = max(m.peak for m in meters) - meters[0].before if update.peak is not None else None
    found = _health(method, [z.detach() for z in embeddings]) if report else None
    seconds, loss_seconds, loss_peak = sum(m.seconds for m in meters), None, None
    if objective is not None:
        loss_seconds, loss_peak = objective.seconds, objective.extra
    return Step(loss, seconds, loss_seconds, after.seconds, peak, loss_peak, found)


def _health(method: Method, embeddings: Sequence[Tensor]) -> Health:
    with torch.no_grad(), use_backend(IMPLEMENTATIONS[method.impl]):
        return health(method.monitored(*embeddings), method.assignments(*embeddings))


Differentiated = tuple[Sequence[Tensor], float, list[Meter], Meter | None]


def _differentiate(method: Method, views: tuple[Tensor, ...], autocast: torch.autocast, memory: bool) -> Differentiated:
    """Embeddings of the whole batch, loss, the meter of it all, and that of the loss: the graph is cut at the
    embeddings and joined again by their gradients."""
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
