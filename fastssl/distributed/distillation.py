"""Sums over a teacher's logits, over the rows of all processes, which may be as many as each likes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.distributed.processes import ProcessGroup, uncompiled


@uncompiled
def sum_of_rows(total: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The sums over all processes, of a vector and of the number of rows. They travel together."""
    both = torch.cat([total, total.new_full((1,), rows)])
    dist.all_reduce(both, group=group)
    return both[:-1], both[-1]


@uncompiled
def unite_logsumexps(
    total: Tensor, top: Tensor, temperature: float | Tensor, rows: int, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of exponentials about the largest of all processes' maxima; those; and the number of rows."""
    largest = top.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    total, count = sum_of_rows(total * ((top - largest) / temperature).exp(), rows, group)
    return total, largest, count
