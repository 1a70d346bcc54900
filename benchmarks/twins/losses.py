"""What a method's loss costs alone, forward and backward, and what it would cost otherwise. Contestants besides the
twins: torch.compile of the naive loss, and the loop that bounds memory in plain PyTorch: some rows' similarities (some
features' correlations) at a time, computed again in the backward pass by torch.utils.checkpoint. Methods whose loss
builds no matrix have no such loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.ops.measure import extra_memory, interleaved_seconds
from benchmarks.ops.registry import MODES, compiled
from benchmarks.twins.agreement import TIMES, as_twins, in_float64, loss_and_gradients, relative, running
from fastssl.functional import restore_tokens
from fastssl.train import Method
from fastssl.train.method import IMPLEMENTATIONS
from fastssl.train.methods.mae import MAE

CHUNK = 256
_REPEATS = 25

LossAndGradients = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Cost:
    """Median seconds and peak extra bytes of a pass forward and backward; NaN where `note` says why."""

    seconds: float = math.nan
    bytes: float = math.nan
    note: str = ""


def _sum(share: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Of the shares of 0 .. count - 1, chunk by chunk; each share is computed again in the backward pass."""
    return sum(checkpoint(share, chunk, use_reentrant=False) for chunk in torch.arange(count).split(CHUNK))


def _nt_xent(z1: Tensor, z2: Tensor, *, temperature: float) -> Tensor:
    z, rows = F.normalize(torch.cat([z1, z2]), dim=1), 2 * len(z1)

    def share(row: Tensor) -> Tensor:
        logits = (z[row] @ z.T / temperature).masked_fill(torch.arange(rows) == row[:, None], float("-inf"))
        return F.cross_entropy(logits, (row + len(z1)) % rows, reduction="sum")

    return _sum(share, rows) / rows


def _info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor | None = None,
    *,
    negative_ids: Tensor | None = None,
    temperature: float,
    normalize: bool = True,
) -> Tensor:
    if normalize:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    if negative_ids is not None and normalize:
        queue = F.normalize(queue, dim=1)

    def share(row: Tensor) -> Tensor:
        if negative_ids is not None:
            ids = negative_ids[row]
            logits = torch.einsum("bd,bkd->bk", query[row], queue[ids]).masked_fill(ids < 0, float("-inf"))
        else:
            logits = query[row] @ (key if queue is None else queue).T
        target = row
        if queue is not None:
            logits = torch.cat([(query[row] * key[row]).sum(1, keepdim=True), logits], 1)
            target = torch.zeros_like(row)
        return F.cross_entropy(logits / temperature, target, reduction="sum")

    return _sum(share, len(query)) / len(query)


def _clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    def share(row: Tensor) -> Tensor:
        pairs = (image, text), (text, image)
        return sum(F.cross_entropy(logit_scale * x[row] @ y.T, row, reduction="sum") for x, y in pairs)

    return _sum(share, len(image)) / (2 * len(image))


def _siglip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    def share(row: Tensor) -> Tensor:
        logits = logit_scale * image[row] @ text.T + logit_bias
        own = torch.arange(len(text)) == row[:, None]
        return -F.logsigmoid(torch.where(own, logits, -logits)).sum()

    return _sum(share, len(image)) / len(image)


def _sup_con(features: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    z = F.normalize(features.flatten(0, 1), dim=1)
    labels = labels.repeat_interleave(features.shape[1])

    def share(row: Tensor) -> Tensor:
        itself = torch.arange(len(z)) == row[:, None]
        logits = z[row] @ z.T / temperature
        log_probability = logits - logits.masked_fill(itself, float("-inf")).logsumexp(1, keepdim=True)
        positive = (labels[row, None] == labels) & ~itself
        return -(log_probability.where(positive, 0).sum(1) / positive.sum(1).clamp_min(1)).sum()

    return _sum(share, len(z)) / len(z)


def _squares_off_the_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """Of a^T b."""

    def share(column: Tensor) -> Tensor:
        product = a[:, column].T @ b
        return product.masked_fill(torch.arange(b.shape[1]) == column[:, None], 0).square().sum()

    return _sum(share, a.shape[1])


def _barlow_twins(z_a: Tensor, z_b: Tensor, *, lambda_param: float) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    invariance = ((a * b).mean(0) - 1).square().sum()
    return invariance + lambda_param * _squares_off_the_diagonal(a, b) / len(a) ** 2


def _vicreg(z_a: Tensor, z_b: Tensor, *, lambda_param: float, mu_param: float, nu_param: float) -> Tensor:
    loss = lambda_param * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        centred = z - z.mean(0)
        covariance = _squares_off_the_diagonal(centred, centred) / (len(z) - 1) ** 2 / z.shape[1]
        loss = loss + mu_param / 2 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() + nu_param * covariance
    return loss


def _linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    features, labels = features.flatten(0, -2), labels.flatten()
    if normalize:
        features, weight = F.normalize(features, dim=1), F.normalize(weight, dim=1)

    def share(row: Tensor) -> Tensor:
        logits = F.linear(features[row] / temperature, weight, linear_bias)
        return F.cross_entropy(logits, labels[row], reduction="sum", ignore_index=ignore_index)

    return _sum(share, len(features)) / (labels != ignore_index).sum()


CHUNKED = {
    "barlow_twins": _barlow_twins,
    "clip_loss": _clip_loss,
    "info_nce": _info_nce,
    "linear_cross_entropy": _linear_cross_entropy,
    "nt_xent": _nt_xent,
    "siglip_loss": _siglip_loss,
    "sup_con": _sup_con,
    "vicreg": _vicreg,
}


def _in_one_process(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loop, which knows no groups of processes, where a method's loss passes one on: here it is None."""
    return lambda *z, group=None, **options: loop(*z, **options)


def loss_costs(method: Method, embeddings: Sequence[Tensor]) -> dict[str, Cost]:
    """The cost of a method's loss on the same embeddings, by both implementations, torch.compile and the chunked loop,
    in turns. A contestant whose loss or gradients are further from float64's than `TIMES` the naive error, plus the
    benchmarks' tolerance for float32, gets a note in place of a time.
    """
    both = as_twins(method)
    naive, ours = both["naive"], both["fastssl"]
    # Of the modules of the method and of those that it is derived from: what its loss calls.
    modules = [kind.loss.__globals__ for kind in type(naive).__mro__ if "loss" in vars(kind)]
    chunked = {name: _in_one_process(loop) for name, loop in CHUNKED.items() if any(name in names for names in modules)}

    def by_chunks(*z: Tensor) -> Tensor:
        with ExitStack() as stack:
            for names in modules:
                stack.enter_context(patch.dict(names, chunked))
            return naive.loss(*z)

    exact = in_float64(naive)
    expected = loss_and_gradients(exact, exact.loss, [in_float64(z) for z in embeddings])
    eager = partial(loss_and_gradients, naive, naive.loss, embeddings)
    allowed = TIMES * _error(eager(), expected) + MODES["float32"].tolerance
    contestants = {
        "fastssl": lambda: partial(loss_and_gradients, ours, ours.loss, embeddings),
        "naive": lambda: eager,
        "compile": lambda: partial(loss_and_gradients, naive, compiled(naive.loss), embeddings),
    }
    if chunked:
        contestants["chunked"] = lambda: partial(loss_and_gradients, naive, by_chunks, embeddings)
    steps, costs = {}, {}
    for name, make in contestants.items():
        try:
            step = make()
            error = _error(step(), expected)
        except Exception as failure:
            costs[name] = Cost(note=f"failed: {type(failure).__name__}: {failure}".splitlines()[0])
            continue
        if error <= allowed:
            steps[name] = (MODES["float32"].precision, step)
        else:
            costs[name] = Cost(note=f"wrong: error {error:.1e}")
    seconds = interleaved_seconds(steps, _REPEATS)
    for name, (_, step) in steps.items():
        costs[name] = Cost(median(seconds[name]), extra_memory(step))
    return {name: costs[name] for name in contestants}


def masking_seconds(method: Method, views: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of MAE's kernels for masked images, forward and backward: those that embed visible patches and fill in
    the others. Empty for methods that mask nothing.
    """
    if not isinstance(method, MAE):
        return {}
    both = as_twins(method)
    images, ids_keep, ids_restore, _ = views

    def once(method: MAE) -> None:
        visible = torch.randn(*ids_keep.shape, method.to_decoder.out_features, requires_grad=True)
        with running(method):
            embedded = method.encoder.patch_embed(images, ids_keep)
            restored = restore_tokens(visible, ids_restore, method.mask_token, method.pos_embed)
        wanted = [visible, method.mask_token, *method.encoder.patch_embed.parameters()]
        torch.autograd.grad([embedded.sum(), restored.sum()], wanted)

    steps = {impl: (MODES["float32"].precision, partial(once, both[impl])) for impl in IMPLEMENTATIONS}
    return {impl: median(seconds) for impl, seconds in interleaved_seconds(steps, _REPEATS).items()}


def _error(found: LossAndGradients, expected: LossAndGradients) -> float:
    """The larger of the loss's and the gradients'."""
    return max(relative(a, b) for a, b in zip(found, expected, strict=True))
