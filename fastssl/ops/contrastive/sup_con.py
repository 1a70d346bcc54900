"""The supervised contrastive loss (arXiv:2004.11362), over self_logsumexp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._norms import EPS, normalized_rows, through_norms
from fastssl.ops._op import Op
from fastssl.ops._portable import add_rows_, row_blocks, similarity, take_rows
from fastssl.ops._precision import accumulate_dtype, widen
from fastssl.ops.contrastive.self_logsumexp import self_logsumexp_portable, self_logsumexp_portable_backward


def class_sums(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x the sum of the rows of its label, in the dtype of sums, and their number."""
    labels = labels.contiguous()
    order = labels.sort().values
    first = torch.searchsorted(order, labels)
    count = torch.searchsorted(order, labels, right=True) - first
    x = widen(x)
    # As many sums as rows, most of them empty, so that nothing waits for the number of labels.
    return take_rows(add_rows_(torch.zeros_like(x), first, x), first), count


def _fake(z: Tensor, labels: Tensor, scale: Tensor, normalize: bool, keep: int, precision: str) -> tuple[Tensor, ...]:
    rows = (z.new_empty(z.shape[0], dtype=accumulate_dtype(z.dtype)) for _ in range(3))
    return *rows, z.new_empty(keep, dtype=torch.uint8)


def _forward(
    logsumexp: Callable[..., Any],
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    normalize: bool,
    keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    z, _ = normalized_rows(z, normalize)
    total, shift, kept = logsumexp(z, scale, keep, precision)
    sums, count = class_sums(z, labels)
    aligned = torch.linalg.vecdot(z, sums - z) / (count - 1)
    return (total.log() + (shift - aligned * scale)).where(count > 1, 0), shift, total, kept


def _backward(
    logsumexp_backward: Callable[..., Any],
    grad_loss: Tensor,
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    kept: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    rows, norms = normalized_rows(z, normalize)
    sums, count = class_sums(rows, labels)
    grad_total, per_positive = ((grad_loss / x).where(count > 1, 0) for x in (total, count - 1))
    gradient, grad_scale = logsumexp_backward(grad_total, rows, scale, shift, kept, precision)
    per_positive = per_positive[:, None]
    positives = per_positive * (sums - 2 * rows) + class_sums(per_positive * rows, labels)[0]
    grad_scale = grad_scale - (rows * positives).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    return through_norms(gradient - scale * positives, rows, norms).to(z.dtype), grad_scale


def _share(rows: slice, grad_loss: Tensor, z: Tensor, labels: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    z = F.normalize(z, dim=1, eps=EPS) if normalize else z
    own = torch.arange(z.shape[0], device=z.device)
    S = similarity(rows, z, z, scale, own)
    positive = (labels[rows, None] == labels) & (own[rows, None] != own)
    count = positive.sum(1)
    losses = S.logsumexp(1) - S.where(positive, 0).sum(1) / count.clamp_min(1)
    return (grad_loss[rows] * losses.where(count > 0, 0)).sum()


sup_con = Op(
    "sup_con(Tensor z, Tensor labels, Tensor scale, bool normalize, SymInt keep, str precision)"
    " -> (Tensor loss, Tensor shift, Tensor total, Tensor kept)",
    backward="(Tensor grad_loss, Tensor z, Tensor labels, Tensor scale, Tensor shift, Tensor total, Tensor kept,"
    " bool normalize, str precision) -> (Tensor grad_z, Tensor grad_scale)",
    fake=_fake,
    portable=(partial(_forward, self_logsumexp_portable), partial(_backward, self_logsumexp_portable_backward)),
    share=_share,
    blocks=lambda z: row_blocks(z.shape[0], z.shape[0]),
    triton="contrastive",
)
