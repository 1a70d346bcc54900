"""The cross-entropy of a linear layer whose weight is shared out: each process has some of the words.

All have the same rows and labels. With V words in all, of which a process has its own,

    lse_i = log sum over processes of exp(lse_i of its words)
    loss_i = (p_i + sum c) lse_i - p_i s_iy - sum_k c_k s_ik

as in `fastssl.ops.linear_cross_entropy`, and of the last two terms each has the part that its words have. A process's
logits are computed once for their log-sum-exps, and again for gradients: 4 products. What is exchanged is a few numbers
for each row, and the sum of the gradients of the rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastssl._arithmetic import dot
from fastssl.distributed.processes import ProcessGroup, gather_numbers, shared, sum_of_parts, uncompiled
from fastssl.ops import linear_cross_entropy as ops
from fastssl.ops._precision import widen
from fastssl.ops.row_sums import take_rows


@uncompiled
def linear_cross_entropy(
    group: ProcessGroup,
    x: Tensor,
    w: Tensor,
    bias: Tensor,
    labels: Tensor,
    scale: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(loss, weight): of each row, 0 where it has no label. The weight is that of its class, a constant."""
    first, classes = _words(group, len(w), {"linear_bias": len(bias) > 0, "weight": class_weight is not None}, x)
    known = ops.check_labels(labels, ignore_index, classes) if x.device.type == "cpu" else labels != ignore_index
    if x.device.type == "cpu":
        chosen = known.nonzero()[:, 0]
        rows, mine = x.index_select(0, chosen), labels[chosen] - first
    else:
        rows, mine = x.where(known[:, None], 0), labels.where(known, -1 - first) - first
    rows, scale = shared(rows, group), shared(scale, group)
    lse, *_ = ops.linear_cross_entropy(
        rows, w, bias, None, scale, None, None, 0.0, ignore_index, normalize, False, False, False, precision
    )
    lse = _logsumexp(lse, group)
    weights = lse.new_ones(len(w)) if class_weight is None else class_weight
    owned = (mine >= 0) & (mine < len(w))
    mine = mine.where(owned, 0)
    of_rows, of_labels = rows, take_rows(w, mine)
    if normalize:
        of_rows, of_labels = (F.normalize(widen(z), dim=1) for z in (rows, of_labels))
    label_logit = dot(of_rows, of_labels) * scale
    if len(bias):
        label_logit = label_logit + take_rows(bias[:, None], mine)[:, 0].to(lse.dtype)
    label_weight, uniform = torch.where(owned, weights[mine], 0), lse.new_zeros(())
    part = (1 - label_smoothing) * torch.where(owned, label_weight * label_logit, 0)
    if label_smoothing:
        c = weights * (label_smoothing / classes)
        of_words = F.normalize(widen(w), dim=1) if normalize else widen(w)
        part = part + dot(of_rows, (c[:, None] * of_words).sum(0)[None]) * scale
        if len(bias):
            part = part + dot(bias[None], c[None])
        uniform = c.sum()
    part, label_weight, uniform = (sum_of_parts(z, group) for z in (part, label_weight.detach(), uniform.detach()))
    loss = ((1 - label_smoothing) * label_weight + uniform) * lse - part
    if x.device.type == "cpu":
        return tuple(z.new_zeros(len(x)).index_copy(0, chosen, z) for z in (loss, label_weight))
    return loss.where(known, 0), label_weight.where(known, 0)


def _words(group: ProcessGroup, mine: int, given: dict[str, bool], x: Tensor) -> tuple[int, int]:
    """(first, all): the number of this process's first word, and of the words of all."""
    counts, *others = zip(*gather_numbers([mine, *map(int, given.values())], x.device, group), strict=True)
    for name, found in zip(given, others, strict=True):
        if len(set(found)) > 1:
            raise ValueError(f"{name} must be given on every process of group or on none, got it on {sum(found)}")
    return sum(counts[: group.rank()]), sum(counts)


def _logsumexp(lse: Tensor, group: ProcessGroup) -> Tensor:
    """Of one number of each process."""
    peak = lse.detach().clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    return peak + sum_of_parts((lse - peak).exp(), group).log()
