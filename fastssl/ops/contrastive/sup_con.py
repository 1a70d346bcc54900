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
from fastssl.ops._portable import add_rows_, row_blocks, similarity
from fastssl.ops._precision import accumulate_dtype
from fastssl.ops.contrastive.self_logsumexp import self_logsumexp_portable, self_logsumexp_portable_backward
from fastssl.ops.row_sums import sum_rows, take_rows


def _places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each label the place of its first row, in the order of labels, and the number of its rows. These places are
    ids of labels, of which there are at most as many as rows: nothing waits for their number."""
    labels = labels.contiguous()
    order = labels.sort().values
    first = torch.searchsorted(order, labels)
    return first, torch.searchsorted(order, labels, right=True) - first


def class_sums(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x the sum of the rows of its label, in the dtype of sums, and their number."""
    first, count = _places(labels)
    return take_rows(sum_rows(x, first, x.shape[0]), first), count


def _sums(x: Tensor, first: Tensor) -> Tensor:
    return add_rows_(torch.zeros_like(x), first, x).index_select(0, first)


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
    first, count = _places(labels)
    aligned = torch.linalg.vecdot(z, _sums(z, first) - z) / (count - 1)
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
    first, count = _places(labels)
    grad_total, per_positive = ((grad_loss / x).where(count > 1, 0) for x in (total, count - 1))
    gradient, grad_scale = logsumexp_backward(grad_total, rows, scale, shift, kept, precision)
    per_positive = per_positive[:, None]
    positives = per_positive * (_sums(rows, first) - 2 * rows) + _sums(per_positive * rows, first)
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
