"""Label smoothing of the losses of pairs, in plain PyTorch, rows by columns: O(N D), without the N x N similarities.

A share e of each row's target is spread over all its columns. With the positive on the diagonal that is

    loss_i = lse_i - (1 - e) S_ii - e mean_j S_ij = (lse_i - S_ii) + e scale <x_i, y_i - mean_j y_j>
"""

from __future__ import annotations

import torch
from torch import Tensor


def centered(z: Tensor) -> Tensor:
    return z - z.mean(0)


def lead(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i - mean_j y_j>: by how much the positive leads the mean."""
    return torch.linalg.vecdot(x, centered(y))


def gradient_of_leads(y: Tensor, of_rows: Tensor | None, of_columns: Tensor) -> Tensor:
    """That of x in <of_rows, lead(x, y)> + <of_columns, lead(y, x)>; of_rows None: 0."""
    pull = centered(of_columns[:, None] * y)
    return pull if of_rows is None else pull + of_rows[:, None] * centered(y)
