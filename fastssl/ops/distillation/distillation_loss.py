"""Cross-entropies between the views of a teacher and those of a student: DINO's and iBOT's loss.

Logits come as pieces (V, N, K) of one or several views each, in the order of the views. Row i of all views belongs
together: loss_i is the sum over pairs of a teacher's and a student's view, of unlike numbers (`unlike_views`: DINO) or
of the same number (iBOT). Without `weight` the losses of the rows are returned, else their weighted sum, and its
gradient if that is asked for (`derive`): a row is still in the cache when its loss is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype


def _fake(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    derive: bool,
) -> tuple[Tensor, list[Tensor]]:
    first = student[0]
    loss = first.new_empty(first.shape[1:2] if weight is None else (), dtype=accumulate_dtype(first.dtype))
    return loss, [x.new_empty(x.shape) for x in student] if derive else []


def _inverse(temperature: float) -> float:
    return 1 / temperature if temperature > 0 else float("nan")


def _targets(
    rows: slice,
    views: int,
    teacher: Sequence[Tensor],
    center: Tensor | None,
    scale: float,
    unlike_views: bool,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, int]]:
    """For each of the student's views the sum of the distributions that teach it, and their number."""
    logits = [view[rows].to(dtype) for piece in teacher for view in piece]
    if center is not None:
        logits = [x - center.to(dtype) for x in logits]
    teachers = [((x - x.amax(-1, keepdim=True)) * scale).softmax(-1) for x in logits]
    for view in range(views):
        if unlike_views:
            chosen = [x for i, x in enumerate(teachers) if i != view]
        else:
            chosen = teachers[view : view + 1]
        yield sum(chosen, torch.zeros_like(teachers[0])), len(chosen)


def share_of_rows(
    rows: slice,
    grad_loss: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
) -> Tensor:
    views = [view[rows] for piece in student for view in piece]
    targets = _targets(rows, len(views), teacher, center, _inverse(teacher_temperature), unlike_views, grad_loss.dtype)
    factor = grad_loss[rows] if weight is None else grad_loss * weight[rows]
    total, scale = grad_loss.new_zeros(()), _inverse(student_temperature)
    for x, (P, count) in zip(views, targets, strict=True):
        below = x.detach().amax(-1, keepdim=True) / 2 - x / 2  # halves, lest it overflow
        if count:
            losses = count * (below * -scale * 2).logsumexp(-1) + (P * below).sum(-1) * scale * 2
            total = total + (factor * losses).sum()
    return total


def _blocks(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[slice]:
    """Rows of all views at a time, so that what is computed from them is of bounded size."""
    _, rows, columns = student[0].shape
    return row_blocks(rows, columns * sum(len(x) for x in teacher))


def _forward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    derive: bool,
) -> tuple[Tensor, list[Tensor]]:
    numbers = center, student_temperature, teacher_temperature, unlike_views
    loss = student[0].new_zeros(student[0].shape[1], dtype=accumulate_dtype(student[0].dtype))
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in student] if derive else []
    visit_rows(student, teacher, *numbers, loss, weight, gradients)
    return loss if weight is None else (loss * weight).sum(), gradients


def _backward(
    grad_loss: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
) -> list[Tensor]:
    numbers = center, student_temperature, teacher_temperature, unlike_views
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in student]
    visit_rows(student, teacher, *numbers, None, grad_loss if weight is None else grad_loss * weight, gradients)
    return gradients


def visit_rows(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    loss: Tensor | None,
    factor: Tensor | None,
    gradients: Sequence[Tensor],
) -> None:
    """Adds the rows' losses to `loss`, and writes their gradients times `factor`, if there are any."""
    dtype = accumulate_dtype(student[0].dtype)
    views = [view for piece in student for view in piece]
    outputs = [view for piece in gradients for view in piece] or [None] * len(views)
    scale = _inverse(student_temperature)
    for rows in _blocks(student, teacher):
        targets = _targets(rows, len(views), teacher, center, _inverse(teacher_temperature), unlike_views, dtype)
        for x, output, (P, count) in zip(views, outputs, targets, strict=True):
            if count == 0:
                if output is not None:
                    output[rows] = 0
                continue
            x = x[rows].to(dtype)
            below = x.amax(-1, keepdim=True) / 2 - x / 2
            exps = (below * -scale).mul_(2).exp_()
            sums = exps.sum(-1, keepdim=True)
            if loss is not None:
                loss[rows] += count * sums.squeeze(-1).log() + (P * below).sum(-1) * scale * 2
            if output is not None:
                output[rows] = exps.mul_(count / sums).sub_(P) * (factor[rows, None] * scale)


distillation_loss = Op(
    "distillation_loss(Tensor[] student, Tensor[] teacher, Tensor? center, Tensor? weight, float student_temperature,"
    " float teacher_temperature, bool unlike_views, bool derive) -> (Tensor loss, Tensor[] kept_student)",
    backward="(Tensor grad_loss, Tensor[] student, Tensor[] teacher, Tensor? center, Tensor? weight,"
    " float student_temperature, float teacher_temperature, bool unlike_views) -> Tensor[] grad_student",
    fake=_fake,
    portable=(_forward, _backward),
    share=share_of_rows,
    blocks=_blocks,
    triton="distillation",
)
