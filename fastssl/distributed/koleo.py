"""The rows among which KoLeo looks for neighbours: those of all processes, which may hold unlike numbers of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed.processes import ProcessGroup, check_alike, gather_numbers, gather_rows, uncompiled
from fastssl.ops._precision import widen


@uncompiled
def gather_unlike_rows(name: str, x: Tensor, group: ProcessGroup) -> tuple[Tensor, int]:
    """The rows of x of all processes, in the order of their ranks, in the dtype of sums; and which of them is the first
    of this one's.

    The gradient of a process's x is that of the sum of all processes' losses.
    """
    check_alike(group, {f"a row of {name}": x.new_empty(x.shape[1], requires_grad=x.requires_grad)})
    counts = [count for (count,) in gather_numbers([x.shape[0]], x.device, group)]
    longest = max(counts)
    x = F.pad(widen(x), (0, 0, 0, longest - x.shape[0]))
    parts = gather_rows(x, group).view(len(counts), longest, x.shape[1])
    rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return rows, sum(counts[: group.rank()])
