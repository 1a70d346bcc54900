"""What Sinkhorn-Knopp, and the moving average of a center, read of a teacher's logits.

The assignments of logits t (N, K) at a temperature T are P = softmax((t - center) / T). Sinkhorn-Knopp's iterations
(SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193) find the center at which all K prototypes get the same share:

    center_k = T log mean_i exp(t_ik / T),             at first
    center_k = center_k + T log(K mean_i P_ik),        then

A row's normaliser is known before its exponentials are added to the columns' sums, so that each iteration reads the
logits once, and writes nothing of their size. Of the first, sums of exponentials are about the columns' maxima
(`column_logsumexp`). The following need no maxima (`assignment_sums`): before each of them the columns of
exp((t - center) / T) have one sum, N / K; a row's sum is then at most N, so that a column keeps 1 / K of its sum at
least. Logits come as several matrices, whose rows make up one. There are no derivatives: teachers are constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype


def _blocks(logits: Sequence[Tensor]) -> Iterator[Tensor]:
    """Rows, in the dtype of sums."""
    for x in logits:
        for rows in row_blocks(*x.shape):
            yield x[rows].to(accumulate_dtype(x.dtype))


def _column(logits: Sequence[Tensor]) -> Tensor:
    """A number for each column."""
    return logits[0].new_empty(logits[0].shape[1], dtype=accumulate_dtype(logits[0].dtype))


def _positive(temperature: float) -> float:
    return temperature if temperature > 0 else float("nan")


def _column_logsumexp(logits: Sequence[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    total = _column(logits).zero_()
    lowest = torch.finfo(total.dtype).min  # in place of minus infinity, whose differences would be NaN
    top = torch.full_like(total, lowest)
    for x in _blocks(logits):
        before, top = top, torch.maximum(top, x.amax(0))
        total = total * _exponential(before - top, temperature) + _exponential(x - top, temperature).sum(0)
    return total, top


def _exponential(x: Tensor, temperature: float) -> Tensor:
    return x.div_(_positive(temperature)).exp_()


def _assign(x: Tensor, center: Tensor, temperature: float) -> Tensor:
    x = x - center
    return x.sub_(x.amax(1, keepdim=True)).div_(_positive(temperature)).softmax(1)


def _assignment_sums(logits: Sequence[Tensor], center: Tensor, temperature: float) -> Tensor:
    total = _column(logits).zero_()
    for x in _blocks(logits):
        total += _assign(x, center, temperature).sum(0)
    return total


def _assignments(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    output = logits.new_empty(logits.shape, dtype=center.dtype)
    for rows in row_blocks(*logits.shape):
        output[rows] = _assign(logits[rows].to(center.dtype), center, temperature)
    return output


def _column_sums(logits: Sequence[Tensor]) -> Tensor:
    total = _column(logits).zero_()
    for x in _blocks(logits):
        total += x.sum(0)
    return total


# (total, top) with sum_i exp(t_ik / temperature) = total_k exp(top_k / temperature).
column_logsumexp = Op(
    "column_logsumexp(Tensor[] logits, float temperature) -> (Tensor total, Tensor top)",
    fake=lambda logits, temperature: (_column(logits), _column(logits)),
    portable=_column_logsumexp,
    triton="distillation",
)

# sum_i P_ik.
assignment_sums = Op(
    "assignment_sums(Tensor[] logits, Tensor center, float temperature) -> Tensor",
    fake=lambda logits, center, temperature: _column(logits),
    portable=_assignment_sums,
    triton="distillation",
)

# P, in the dtype of sums.
assignments = Op(
    "assignments(Tensor logits, Tensor center, float temperature) -> Tensor",
    fake=lambda logits, center, temperature: logits.new_empty(logits.shape, dtype=center.dtype),
    portable=_assignments,
    triton="distillation",
)

# sum_i t_ik.
column_sums = Op(
    "column_sums(Tensor[] logits) -> Tensor",
    fake=_column,
    portable=_column_sums,
    triton="distillation",
)
