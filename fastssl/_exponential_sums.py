"""Sums of exponentials of similarities, over rows and columns, in one process or several."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import distributed
from fastssl._arithmetic import needs_gradient
from fastssl.distributed import Ring
from fastssl.ops import contrastive

Sums = tuple[Tensor, Tensor]  # (total, shift) of the exponentials of similarities: log-sum-exp = log(total) + shift


def row_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str, ring: Ring | None = None
) -> Sums:
    if ring is not None:
        return distributed.contrastive.similarity_logsumexp(ring, x, y, scale, exclude, precision)
    weigh = needs_gradient(x, y, scale)
    keep = bytes_to_keep_for(y, precision, (x, y, scale))
    return contrastive.similarity_logsumexp(x, y, scale, exclude, weigh, keep, precision)[:2]


def bytes_to_keep_for(y: Tensor, precision: str, inputs: tuple[Tensor, Tensor, Tensor]) -> int:
    """`bytes_to_keep` of an operation that keeps what serves y's gradient alone; inputs: x, y and scale."""
    return contrastive.bytes_to_keep(precision, inputs, *(t.shape[0] for t in inputs[:2])) if y.requires_grad else 0


def pair_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str, ring: Ring | None = None
) -> tuple[Sums, Sums]:
    """Those of the rows, and those of the columns."""
    if ring is not None:
        sums = distributed.contrastive.pair_logsumexp(ring, x, y, scale, exclude, precision)
    else:
        keep = contrastive.bytes_to_keep(precision, (x, y, scale), x.shape[0], y.shape[0])
        sums = contrastive.pair_logsumexp(x, y, scale, exclude, keep, precision)
    return sums[:2], sums[2:4]


def sums_with_others(ring: Ring, z: Tensor, scale: Tensor, precision: str) -> Sums:
    """Those of the rows of scale z z^T, of which z's columns are other processes'."""
    return distributed.contrastive.others_logsumexp(ring, z, scale, precision)


def self_sums(z: Tensor, scale: Tensor, precision: str) -> Sums:
    """Those of the rows of scale z z^T without its diagonal."""
    keep = contrastive.bytes_to_keep(precision, (z, scale), z.shape[0])
    return contrastive.self_logsumexp(z, scale, keep, precision)[:2]


def joined(sums: list[Sums]) -> Sums:
    """Their sum, of which every derivative is finite where one of them is of nothing."""
    if len(sums) == 1:
        return sums[0]
    shifts = torch.stack([shift.where(total != 0, float("-inf")) for total, shift in sums])
    shift = shifts.amax(0)
    shift = shift.where(shift != float("-inf"), 0)
    return sum(total * factor for (total, _), factor in zip(sums, (shifts - shift).exp(), strict=True)), shift


def largest_similarity(sums: list[Sums]) -> Tensor | float:
    """The largest similarity of each row that any of the sums has: NaN if one is, minus infinity if there is none."""
    shifts = [shift.where(total != 0, float("-inf")) + 0 * total for total, shift in sums]
    return torch.stack(shifts).amax(0) if shifts else float("-inf")
