"""`distillation_loss` of logits that are features times prototypes, which are never stored as a whole.

Features come as (V, N, D) of V views, prototypes as (K, D):

    s = student student_prototypes^T,    t = teacher teacher_prototypes^T
    dstudent = G student_prototypes,    dstudent_prototypes = G^T student,    G = dloss/ds

A block of rows of all views at a time: its logits, their weights G in place, and both products with them. With
U = 2 V N K D floating-point operations, one product, that is 4 U for as many views of the teacher as of the student, in
the forward pass if gradients are taken there (`derive`), and O(rows K) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights
from fastssl.ops.distillation.distillation_loss import share_of_rows, visit_rows


def _fake(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = student.shape[1:2] if weight is None else ()
    taken = (x.new_empty(x.shape if derive else (0, *x.shape[1:])) for x in (student, student_prototypes))
    return student.new_empty(shape, dtype=accumulate_dtype(student.dtype)), *taken


def _blocks(student: Tensor, student_prototypes: Tensor, teacher: Tensor) -> list[slice]:
    """Rows of all views at a time, so that their logits are of bounded size."""
    return row_blocks(student.shape[1], student_prototypes.shape[0] * (len(student) + len(teacher)))


def _share(
    rows: slice,
    grad_loss: Tensor,
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
) -> Tensor:
    y, v = (z.to(grad_loss.dtype) for z in (teacher[:, rows], teacher_prototypes))
    logits = [student[:, rows] @ student_prototypes.T], [y @ v.T]
    numbers = student_temperature, teacher_temperature, unlike_views
    if weight is None:
        grad_loss = grad_loss[rows]
    else:
        weight = weight[rows]
    return share_of_rows(slice(None), grad_loss, *logits, center, weight, *numbers)


def _forward(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    derive: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = student, student_prototypes, teacher, teacher_prototypes, center
    numbers = student_temperature, teacher_temperature, unlike_views, precision
    loss, *gradients = _visit(*tensors, weight if derive else None, *numbers)
    return loss if weight is None else (loss * weight).sum(), *gradients


def _backward(
    grad_loss: Tensor,
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    tensors = student, student_prototypes, teacher, teacher_prototypes, center
    numbers = student_temperature, teacher_temperature, unlike_views, precision
    if weight is None:
        _, *gradients = _visit(*tensors, grad_loss, *numbers)
    else:
        _, *gradients = _visit(*tensors, weight, *numbers, grad_loss)  # the bits of what the forward pass takes
    return tuple(gradients)


def _visit(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None,
    factor: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    precision: str,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss; and the gradients of features and prototypes: those of the rows' losses times `factor`, summed,
    times `scale`."""
    dtype = accumulate_dtype(student.dtype)
    x, w, y, v = (
        round_operand(z.to(dtype), precision) for z in (student, student_prototypes, teacher, teacher_prototypes)
    )
    loss = x.new_zeros(x.shape[1])
    grad_x, grad_w = (z.new_zeros(z.shape if factor is not None else (0, *z.shape[1:])) for z in (x, w))
    for rows in _blocks(student, student_prototypes, teacher):
        logits = x[:, rows] @ w.T
        weights = [] if factor is None else [torch.empty_like(logits)]
        visit_rows(
            [logits],
            [y[:, rows] @ v.T],
            center,
            student_temperature,
            teacher_temperature,
            unlike_views,
            loss[rows],
            None if factor is None else factor[rows],
            weights,
        )
        for G in weights:
            G = round_weights(G, precision)
            grad_x[:, rows] = G @ w
            grad_w.addmm_(G.flatten(0, 1).T, x[:, rows].flatten(0, 1))
    if scale is not None:
        grad_x, grad_w = grad_x * scale, grad_w * scale
    return loss, grad_x.to(student.dtype), grad_w.to(student_prototypes.dtype)


prototype_distillation_loss = Op(
    "prototype_distillation_loss(Tensor student, Tensor student_prototypes, Tensor teacher, Tensor teacher_prototypes,"
    " Tensor? center, Tensor? weight, float student_temperature, float teacher_temperature, bool unlike_views,"
    " bool derive, str precision) -> (Tensor loss, Tensor kept_student, Tensor kept_student_prototypes)",
    backward="(Tensor grad_loss, Tensor student, Tensor student_prototypes, Tensor teacher, Tensor teacher_prototypes,"
    " Tensor? center, Tensor? weight, float student_temperature, float teacher_temperature, bool unlike_views,"
    " str precision) -> (Tensor grad_student, Tensor grad_student_prototypes)",
    fake=_fake,
    portable=(_forward, _backward),
    share=_share,
    blocks=_blocks,
    triton="distillation",
)
