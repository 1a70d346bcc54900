"""Self-distillation, as the papers write it: the cross-entropy between a teacher's distribution and a student's.

DINO (arXiv:2104.14294) teaches each view of an image by the other views, iBOT (arXiv:2111.07832) each masked patch by
the same patch, unmasked.
"""

from __future__ import annotations

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
    return _reduced(torch.stack(losses).mean(0), reduction)


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
