"""k-means, whose clusters are what some methods predict; the nearest centroids are found by `topk_similarity`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.functional import topk_similarity
from fastssl.ops.row_sums import sum_rows

_SAMPLE = 20_000  # rows that centroids are computed from


def kmeans(rows: Tensor, clusters: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """(N, D) rows -> (clusters, D) centroids, by Lloyd's algorithm from those of k-means++ (Arthur and Vassilvitskii
    2007), of 20,000 rows that are drawn at random. A centroid that no row is nearest to stays where it was.

    Raises:
        ValueError: if there are fewer rows than clusters.
    """
    if len(rows) < clusters:
        raise ValueError(f"clusters must be at most the number of rows, {len(rows)}, got {clusters}")
    rows = rows[torch.randperm(len(rows), generator=generator)[:_SAMPLE]]
    centroids = _spread(rows, clusters, generator)
    for _ in range(iterations):
        nearest = assign(rows, centroids)
        counts = nearest.bincount(minlength=clusters)[:, None]
        sums = sum_rows(rows, nearest, clusters)
        centroids = (sums / counts.clamp_min(1)).where(counts > 0, centroids)
    return centroids


def _spread(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Rows, each drawn in proportion to the squared distance from the nearest of those that were drawn before."""
    distances, chosen = rows.new_full((len(rows),), float("inf")), [0]
    for _ in range(clusters - 1):
        distances = torch.minimum(distances, (rows - rows[chosen[-1]]).square().sum(1))
        weights = distances.where(distances.sum() > 0, 1)  # where all rows are the same, any will do
        chosen.append(int(weights.multinomial(1, generator=generator)))
    return rows[chosen]


def assign(rows: Tensor, centroids: Tensor) -> Tensor:
    """(N, D) rows -> (N,) int64, the centroid that is nearest to each: that of the largest <x, c> - |c|^2 / 2."""
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    bank = torch.cat([centroids, centroids.square().sum(1, keepdim=True) / -2], 1)
    return topk_similarity(rows, bank, 1, normalize=False)[1][:, 0]
