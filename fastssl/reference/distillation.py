"""Self-distillation, as the papers write it: the cross-entropy between a teacher's distribution and a student's.

DINO (arXiv:2104.14294) teaches each view of an image by the other views, iBOT (arXiv:2111.07832) each masked patch by
the same patch, unmasked. A teacher's center is the moving average of its logits, or that of Sinkhorn-Knopp, which gives
all prototypes the same share of a batch (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def dino_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    center: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """DINO's loss: the mean over pairs of a teacher's and a student's view of unlike numbers."""
    losses = [
        _cross_entropy(student, teacher, student_temperature, teacher_temperature, center)
        for t, teacher in enumerate(_views(teacher_logits))
        for s, student in enumerate(_views(student_logits))
        if s != t
    ]
    return _reduced(sum(losses) / len(losses), reduction)


def ibot_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    center: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """iBOT's loss of masked patches, each of a weight of its own."""
    loss = _cross_entropy(student_logits, teacher_logits, student_temperature, teacher_temperature, center)
    return _reduced(loss if weights is None else (weights * loss).to(loss.dtype), reduction)


def prototype_distillation_loss(
    student: Tensor | Sequence[Tensor],
    student_prototypes: Tensor,
    teacher: Tensor | Sequence[Tensor],
    teacher_prototypes: Tensor,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    center: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of iBOT, or with views that of DINO, of logits that are features times prototypes."""
    numbers = {
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
        "center": center,
        "reduction": "none",
    }
    if isinstance(student, Tensor) and student.dim() == 2:
        loss = ibot_loss(student @ student_prototypes.T, teacher @ teacher_prototypes.T, **numbers)
    else:
        student_logits, teacher_logits = (
            [view @ prototypes.T for view in _views(views)]
            for views, prototypes in ((student, student_prototypes), (teacher, teacher_prototypes))
        )
        loss = dino_loss(student_logits, teacher_logits, **numbers)
    return _reduced(loss if weights is None else (weights * loss).to(loss.dtype), reduction)


@torch.no_grad()
def sinkhorn_center(
    teacher_logits: Tensor | Sequence[Tensor], *, temperature: float | Tensor = 0.04, iterations: int = 3
) -> Tensor:
    """Columns and rows of exp(logits / temperature) are scaled in turn to the same sums, by their logarithms."""
    logits = _rows(teacher_logits) / temperature
    rows, prototypes = logits.shape
    row = logits.new_full((rows, 1), math.log(prototypes))
    for _ in range(iterations):
        column = (logits - row).logsumexp(0) + logits.new_full((), prototypes / rows if rows else math.nan).log()
        row = (logits - column).logsumexp(1, keepdim=True)
    return temperature * column


@torch.no_grad()
def sinkhorn_knopp(teacher_logits: Tensor, *, temperature: float | Tensor = 0.04, iterations: int = 3) -> Tensor:
    """Assignments: each row's sum up to 1, each column's to nearly the same."""
    center = sinkhorn_center([teacher_logits], temperature=temperature, iterations=iterations)
    return ((_rows([teacher_logits]) - center) / temperature).softmax(1).view(teacher_logits.shape)


@torch.no_grad()
def update_center_(center: Tensor, teacher_logits: Tensor | Sequence[Tensor], momentum: float | Tensor = 0.9) -> None:
    """The moving average of the mean over all rows. Without rows there is nothing to move to."""
    logits = _rows(teacher_logits)
    if len(logits):
        center.copy_(momentum * center + (1 - momentum) * logits.mean(0))


def _cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    center: Tensor | None,
) -> Tensor:
    """Of each row."""
    with torch.no_grad():
        centered = teacher if center is None else teacher - center
        target = (centered / teacher_temperature).softmax(-1)
    return -(target.to(student.dtype) * (student / student_temperature).log_softmax(-1)).sum(-1)


def _views(logits: Tensor | Sequence[Tensor]) -> Iterator[Tensor]:
    """Each (B, K), of views, or of groups of views (V, B, K)."""
    for x in logits:
        yield from (x,) if x.dim() == 2 else x


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return {"none": lambda x: x, "mean": Tensor.mean, "sum": Tensor.sum}[reduction](loss)


def _rows(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Those of all views, one after the other, in the dtype of sums."""
    views = [logits] if isinstance(logits, Tensor) else logits
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in views])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
