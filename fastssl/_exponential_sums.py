"""Sums of exponentials of similarities, over rows and columns, in one process or several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import distributed
from fastssl._arithmetic import needs_gradient
from fastssl.distributed import Ring
from fastssl.ops import contrastive

Sums = tuple[Tensor, Tensor]  # (total, shift) of the exponentials of similarities: log-sum-exp = log(total) + shift


def sum_exponentials(S: Tensor) -> Sums:
    """(total, shift) of the rows of a matrix that is stored, as the operations give them."""
    shift = F.pad(S.detach(), (0, 1), value=float("-inf")).amax(1)
    shift = shift.where(shift != float("-inf"), 0)
    return (S - shift[:, None]).exp().sum(1), shift


def row_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str, ring: Ring | None = None
) -> Sums:
    if ring is not None:
        return distributed.contrastive.similarity_logsumexp(ring, x, y, scale, exclude, precision)
    weigh = needs_gradient(x, y, scale)
    return contrastive.similarity_logsumexp(x, y, scale, exclude, weigh, precision)[:2]


def pair_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str, ring: Ring | None = None
) -> tuple[Sums, Sums]:
    """Those of the rows, and those of the columns."""
    if ring is not None:
        sums = distributed.contrastive.pair_logsumexp(ring, x, y, scale, exclude, precision)
    else:
        sums = contrastive.pair_logsumexp(x, y, scale, exclude, precision)
    return sums[:2], sums[2:]


def largest_similarity(sums: list[Sums]) -> Tensor | float:
    """The largest similarity of each row that any of the sums has: NaN if one is, minus infinity if there is none."""
    shifts = [shift.where(total != 0, float("-inf")) + 0 * total for total, shift in sums]
    return torch.stack(shifts).amax(0) if shifts else float("-inf")
