"""CLIP's loss (arXiv:2103.00020), which is InfoNCE in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._label_smoothing import gradient_of_leads, lead
from fastssl._norms import EPS, normalized_rows, through_norms
from fastssl._reductions import gradient_of_rows, reduce
from fastssl.ops._op import Op
from fastssl.ops._portable import pair_blocks, similarity
from fastssl.ops._precision import accumulate_dtype
from fastssl.ops.contrastive._shared import margin
from fastssl.ops.contrastive.pair_logsumexp import pair_logsumexp_portable, pair_logsumexp_portable_backward


def _fake(
    x: Tensor, y: Tensor, scale: Tensor, label_smoothing: float, reduction: str, normalize: bool, keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    shapes = x.shape[:1] if reduction == "none" else (), *([x.shape[:1]] * 5)
    results = (x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) for shape in shapes)
    return *results, x.new_empty(keep, dtype=torch.uint8)


def _portable(
    x: Tensor, y: Tensor, scale: Tensor, label_smoothing: float, reduction: str, normalize: bool, keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    wide_x, wide_y = (normalized_rows(z, normalize)[0] for z in (x, y))
    own = torch.arange(x.shape[0], device=x.device)
    positive = torch.linalg.vecdot(wide_x, wide_y) * scale
    *sums, kept = pair_logsumexp_portable(*((wide_x, wide_y) if normalize else (x, y)), scale, own, keep, precision)
    margins = margin(*sums[:2], positive), margin(*sums[2:], positive)
    loss = -(F.logsigmoid(-margins[0]) + F.logsigmoid(-margins[1])) / 2
    if label_smoothing:
        loss = loss + label_smoothing / 2 * scale * (lead(wide_x, wide_y) + lead(wide_y, wide_x))
    return reduce(loss, reduction), positive, *sums, kept


def _portable_backward(
    grad_loss: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    row_total: Tensor,
    row_shift: Tensor,
    column_total: Tensor,
    column_shift: Tensor,
    kept: Tensor,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_loss = gradient_of_rows(grad_loss, reduction, x.shape[0])
    slopes, grad_totals = [], []
    for total, shift in ((row_total, row_shift), (column_total, column_shift)):
        slopes.append(margin(total, shift, positive).sigmoid() * grad_loss / 2)
        grad_totals.append((slopes[-1] / total).where(total != 0, 0))
    # In the dtype of sums, where the positives' terms are still to be added.
    (wide_x, norms_x), (wide_y, norms_y) = (normalized_rows(z, normalize) for z in (x, y))
    own = torch.arange(x.shape[0], device=x.device)
    grad_x, grad_y, grad_scale = pair_logsumexp_portable_backward(
        *grad_totals, wide_x, wide_y, scale, own, row_shift, column_shift, kept, precision
    )
    weight = -(slopes[0] + slopes[1])
    grad_scale = grad_scale + (weight * torch.linalg.vecdot(wide_x, wide_y)).sum()
    weight = (weight * scale)[:, None]
    grad_x, grad_y = grad_x + weight * wide_y, grad_y + weight * wide_x
    if label_smoothing:
        pull = grad_loss * (label_smoothing / 2)
        grad_scale = grad_scale + (pull * (lead(wide_x, wide_y) + lead(wide_y, wide_x))).sum()
        pull = pull * scale
        grad_x, grad_y = grad_x + gradient_of_leads(wide_y, pull, pull), grad_y + gradient_of_leads(wide_x, pull, pull)
    grad_x, grad_y = through_norms(grad_x, wide_x, norms_x), through_norms(grad_y, wide_y, norms_y)
    return grad_x.to(x.dtype), grad_y.to(y.dtype), grad_scale


def _share(
    rows: slice, grad_loss: Tensor, x: Tensor, y: Tensor, scale: Tensor, label_smoothing: float, reduction: str,
    normalize: bool,
) -> Tensor:
    grad_loss = gradient_of_rows(grad_loss, reduction, x.shape[0])
    x, y = (F.normalize(z, dim=1, eps=EPS) if normalize else z for z in (x, y))
    own = torch.arange(x.shape[0], device=x.device)[rows]
    sides = [similarity(rows, a, b, scale, None) for a, b in ((x, y), (y, x))]
    losses = [F.cross_entropy(S, own, reduction="none", label_smoothing=label_smoothing) for S in sides]
    return (grad_loss[rows] * (losses[0] + losses[1]) / 2).sum()


clip_loss = Op(
    "clip_loss(Tensor x, Tensor y, Tensor scale, float label_smoothing, str reduction, bool normalize, SymInt keep,"
    " str precision) -> (Tensor loss, Tensor positive, Tensor row_total, Tensor row_shift, Tensor column_total,"
    " Tensor column_shift, Tensor kept)",
    backward="(Tensor grad_loss, Tensor x, Tensor y, Tensor scale, Tensor positive, Tensor row_total, Tensor row_shift,"
    " Tensor column_total, Tensor column_shift, Tensor kept, float label_smoothing, str reduction, bool normalize,"
    " str precision) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_fake,
    portable=(_portable, _portable_backward),
    share=_share,
    blocks=pair_blocks,
    triton="contrastive",
)
