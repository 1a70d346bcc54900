"""What losses of pairs share: the cross-entropies of both directions, and what people log of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import distributed
from fastssl._arithmetic import cross_entropy, dot, logsumexp
from fastssl._exponential_sums import Sums, largest_similarity, pair_sums
from fastssl._reductions import reduce
from fastssl.distributed import Ring, mean_over_processes
from fastssl.ops import contrastive
from fastssl.ops._precision import accumulate_dtype


def pair_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    label_smoothing: float,
    reduction: str,
    precision: str,
    ring: Ring | None = None,
    normalize: bool = False,
) -> tuple[Tensor, tuple[Sums, Sums]]:
    """The mean of the cross-entropies of row i and of column i of scale x y^T, of all i as `reduction` says, and the
    sums over the negatives of both. The positive is the diagonal, or with labels all rows and columns of the same label
    alike; the sums are then over all. Rows are normalised here only where this process is alone, without labels.
    """
    if labels is None and ring is None:
        keep = contrastive.bytes_to_keep(precision, (x, y, scale), x.shape[0], y.shape[0])
        loss, _, *sums, _ = contrastive.clip_loss(x, y, scale, label_smoothing, reduction, normalize, keep, precision)
        return loss, (sums[:2], sums[2:])
    own = torch.arange(x.shape[0], device=x.device) if labels is None else None
    sums = pair_sums(x, y, scale, own, precision, ring)
    rows, columns = (logsumexp(*pair) for pair in sums)
    if labels is None:
        aligned = dot(x, y)
        loss = (cross_entropy(rows, aligned * scale) + cross_entropy(columns, aligned * scale)) / 2
    else:
        both = torch.cat([y, x], 1)
        if ring is None:
            sums_of_labels, count = contrastive.class_sums(both, labels)
        else:
            sums_of_labels, count = distributed.contrastive.class_sums(both, labels, ring.group)
        of_y, of_x = sums_of_labels.chunk(2, 1)
        aligned = (dot(x, of_y) + dot(y, of_x)) / (2 * count)
        loss = (rows + columns) / 2 - aligned * scale
    if label_smoothing:
        loss = loss + label_smoothing * scale * (aligned - (dot(x, mean_row(y, ring)) + dot(y, mean_row(x, ring))) / 2)
    return reduce(loss, reduction), sums


def mean_row(x: Tensor, ring: Ring | None = None) -> Tensor:
    """The mean row, of all processes in a ring, in the dtype of sums."""
    mean = x.mean(0, dtype=accumulate_dtype(x.dtype))
    return mean if ring is None else mean_over_processes(mean, ring.group)


@torch.no_grad()
def pair_metrics(
    x: Tensor, y: Tensor, scale: Tensor, negatives: list[list[Sums]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """For each set of negatives, the share of rows whose positive is above the largest of them; and the metrics of the
    pairs."""
    x, y = (t.detach().to(accumulate_dtype(t.dtype)) for t in (x, y))
    similarity = dot(x, y)
    distance = (x - y).square().sum(1)
    metrics = {"positive_similarity": similarity.mean(), "alignment": distance.mean()}
    accuracies = [(similarity * scale > largest_similarity(sums)).float().mean() for sums in negatives]
    return accuracies, {name: value.float() for name, value in metrics.items()}
