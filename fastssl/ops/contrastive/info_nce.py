"""InfoNCE within a batch (CPC, arXiv:1807.03748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._label_smoothing import centered, gradient_of_leads, lead
from fastssl._norms import EPS, normalized_rows, through_norms
from fastssl._reductions import gradient_of_rows, reduce
from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks, similarity
from fastssl.ops._precision import accumulate_dtype
from fastssl.ops.contrastive._shared import margin
from fastssl.ops.contrastive.similarity_logsumexp import row_sums, row_sums_backward


def _fake(
    query: Tensor,
    positive_key: Tensor,
    scale: Tensor,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
    weigh: bool,
    keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    rows, dim = query.shape
    of_loss, of_slopes = (rows,) if reduction == "none" else (), rows if weigh else 0
    shapes = of_loss, *([(rows,)] * 3), (of_slopes, dim), (of_slopes,)
    results = (query.new_empty(shape, dtype=accumulate_dtype(query.dtype)) for shape in shapes)
    return *results, query.new_empty(keep, dtype=torch.uint8)


def _portable(
    query: Tensor,
    positive_key: Tensor,
    scale: Tensor,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
    weigh: bool,
    keep: int,
    precision: str,
) -> tuple[Tensor, ...]:
    (q, norms), (k, _) = (normalized_rows(z, normalize) for z in (query, positive_key))
    own = torch.arange(q.shape[0], device=q.device)
    total, shift, weighted, kept = row_sums(q, k, scale, own, weigh, keep, precision)
    positive = torch.linalg.vecdot(q, k) * scale
    n = margin(total, shift, positive)
    loss = -F.logsigmoid(-n)
    if label_smoothing:
        loss = loss + label_smoothing * scale * lead(q, k)
    if not weigh:
        return reduce(loss, reduction), positive, total, shift, weighted, weighted.new_empty(0), kept
    # The mean of the negatives, as the softmax weighs them, less the positive.
    pull = n.sigmoid()[:, None] * ((weighted / total[:, None]).where(total[:, None] != 0, 0) - k)
    if label_smoothing:
        pull = pull + label_smoothing * centered(k)
    slopes = through_norms(pull, q, norms), torch.linalg.vecdot(q, pull)
    return reduce(loss, reduction), positive, total, shift, *slopes, kept


def _portable_backward(
    grad_loss: Tensor,
    query: Tensor,
    positive_key: Tensor,
    scale: Tensor,
    positive: Tensor,
    total: Tensor,
    shift: Tensor,
    query_slope: Tensor,
    scale_slope: Tensor,
    kept: Tensor,
    label_smoothing: float,
    reduction: str,
    needs_positive_key: bool,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_loss = gradient_of_rows(grad_loss, reduction, query.shape[0])
    grad_query = ((grad_loss * scale)[:, None] * query_slope).to(query.dtype)
    grad_scale = (grad_loss * scale_slope).sum(dtype=torch.float64).to(scale.dtype)
    if not needs_positive_key:
        return grad_query, positive_key.new_empty((0, positive_key.shape[1])), grad_scale
    (q, _), (k, norms) = (normalized_rows(z, normalize) for z in (query, positive_key))
    own = torch.arange(q.shape[0], device=q.device)
    slope = margin(total, shift, positive).sigmoid() * grad_loss
    grad_total = (slope / total).where(total != 0, 0)
    grad_k = row_sums_backward(grad_total, q, k, scale, own, shift, torch.zeros_like(q), kept, True, precision)[1]
    grad_k = grad_k - (slope * scale)[:, None] * q
    if label_smoothing:
        grad_k = grad_k + gradient_of_leads(q, None, grad_loss * (label_smoothing * scale))
    return grad_query, through_norms(grad_k, k, norms).to(positive_key.dtype), grad_scale


def _share(
    rows: slice,
    grad_loss: Tensor,
    query: Tensor,
    positive_key: Tensor,
    scale: Tensor,
    label_smoothing: float,
    reduction: str,
    normalize: bool,
) -> Tensor:
    grad_loss = gradient_of_rows(grad_loss, reduction, query.shape[0])
    q, k = (F.normalize(z, dim=1, eps=EPS) if normalize else z for z in (query, positive_key))
    own = torch.arange(q.shape[0], device=q.device)[rows]
    S = similarity(rows, q, k, scale, None)
    losses = F.cross_entropy(S, own, reduction="none", label_smoothing=label_smoothing)
    return (grad_loss[rows] * losses).sum()


info_nce = Op(
    "info_nce(Tensor query, Tensor positive_key, Tensor scale, float label_smoothing, str reduction, bool normalize,"
    " bool weigh, SymInt keep, str precision) -> (Tensor loss, Tensor positive, Tensor total, Tensor shift,"
    " Tensor query_slope, Tensor scale_slope, Tensor kept)",
    backward="(Tensor grad_loss, Tensor query, Tensor positive_key, Tensor scale, Tensor positive, Tensor total,"
    " Tensor shift, Tensor query_slope, Tensor scale_slope, Tensor kept, float label_smoothing, str reduction,"
    " bool needs_positive_key, bool normalize, str precision)"
    " -> (Tensor grad_query, Tensor grad_positive_key, Tensor grad_scale)",
    fake=_fake,
    portable=(_portable, _portable_backward),
    share=_share,
    blocks=lambda query: row_blocks(query.shape[0], query.shape[0]),
    triton="contrastive",
)
