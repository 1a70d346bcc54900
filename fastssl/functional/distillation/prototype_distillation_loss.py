"""The losses of DINO and iBOT from features and prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import as_scalar, needs_gradient, of_reference
from fastssl._checks import check_compatible, check_positive_temperature, check_reduction, check_rows
from fastssl.functional.distillation.logits import (
    check_center,
    check_pairs_of_views,
    check_views,
    check_weights,
    detached,
    reduced,
)
from fastssl.ops import current_backend, distillation
from fastssl.ops._precision import product_precision, widen


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
    r"""The losses of iBOT and DINO from features and prototypes: the last layer and the loss in one.

        student_logits = student student_prototypes^T,    teacher_logits = teacher teacher_prototypes^T

    and of these `ibot_loss`, or `dino_loss` if features come as views. Logits are computed for some rows at a time, and
    never stored as a whole: no memory grows with N K. With "mean" and "sum" the forward pass takes the gradients, too,
    while it has the logits.

    Args:
        student: features (N, D) of N masked patches; or those of S views of B images, as (S, B, D) or as a sequence of
            views (B, D) and of groups of views (V, B, D), the first T of them being the views of the teacher; float32,
            bfloat16, float16 or float64.
        student_prototypes: (K, D), the weight of the student's last layer, of student's dtype and device.
        teacher: features (N, D'); or those of T views of B images. A constant, as all that is the teacher's.
        teacher_prototypes: (K, D').
        student_temperature: positive, a number or a 0-d tensor, which gets its exact gradient.
        teacher_temperature: likewise, a constant.
        center: (K,) or (1, K), subtracted from the teacher's logits, as in `dino_loss`.
        weights: one for each row or image, (N,) or (B,), of any floating-point dtype. None: 1.
        reduction: "mean", which divides by N or B with weights, too; "sum"; or "none".

    Returns:
        0-d loss, or (N,) or (B,) with reduction "none", in student's dtype, float32 under autocast. The mean over no
        rows is NaN. What is not finite is as in `dino_loss`.

    Raises:
        TypeError: if features, prototypes, center or weights are no tensors, or a temperature is neither number nor
            tensor.
        ValueError: if shapes, dtypes or devices do not fit, there is no pair of unlike views, a temperature is a number
            that is not finite and positive (a tensor that is not positive makes the loss NaN), or reduction is unknown.
    """
    unlike_views = not (isinstance(student, Tensor) and student.dim() == 2)
    students, teachers = (
        _check_features(name, features, unlike_views) for name, features in (("student", student), ("teacher", teacher))
    )
    name, first = students[0]
    for prototypes_name, prototypes, features in (
        ("student_prototypes", student_prototypes, students),
        ("teacher_prototypes", teacher_prototypes, teachers),
    ):
        check_rows(prototypes_name, prototypes, "(K, D)")
        for other, x in features:
            _check_fit(prototypes_name, prototypes, other, x)
            check_compatible(name, first, other, x)
        check_compatible(name, first, prototypes_name, prototypes)
    for other, x in [*students, *teachers]:
        if x.shape[1] != first.shape[1]:
            raise ValueError(f"{name} and {other} must have as many rows, got {first.shape[1]} and {x.shape[1]}")
    _check_prototypes(student_prototypes, teacher_prototypes)
    student_views, teacher_views = (sum(len(x) for _, x in views) for views in (students, teachers))
    pairs = check_pairs_of_views("student and teacher", student_views, teacher_views) if unlike_views else 1
    student_temperature = check_positive_temperature("student_temperature", student_temperature, first)
    teacher_temperature = check_positive_temperature("teacher_temperature", teacher_temperature, first)
    constant = check_center(center, student_prototypes.mT, "student_prototypes")
    if weights is not None:
        check_weights(weights, first, name)
    check_reduction(reduction)
    if current_backend() == "reference":
        loss = reference.distillation.prototype_distillation_loss(
            student,
            student_prototypes,
            teacher,
            teacher_prototypes,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            center=center,
            weights=weights,
            reduction=reduction,
        )
        return of_reference(loss, first)
    precision = product_precision(first)
    x, y = (torch.cat([x for _, x in views]) if len(views) > 1 else views[0][1] for views in (students, teachers))
    if isinstance(student_temperature, Tensor) and needs_gradient(student_temperature):
        x = widen(x) / as_scalar(student_temperature, x)
        student_temperature = 1.0
    constants = y.detach(), teacher_prototypes.detach(), constant
    temperatures = detached(student_temperature, teacher_temperature)

    def loss_of(weight: Tensor | None, derive: bool) -> Tensor:
        numbers = *temperatures, unlike_views, derive, precision
        return distillation.prototype_distillation_loss(x, student_prototypes, *constants, weight, *numbers)[0]

    inputs = x, student_prototypes
    return reduced(loss_of, first, first.shape[1], inputs, pairs=pairs, weights=weights, reduction=reduction)


def _check_features(name: str, features: Tensor | Sequence[Tensor], views: bool) -> list[tuple[str, Tensor]]:
    """(V, N, D) of one or several views each, with their names."""
    if views:
        return check_views(name, features, "B, D")
    check_rows(name, features, "(N, D)")
    return [(name, features[None])]


def _check_fit(name: str, prototypes: Tensor, name_x: str, x: Tensor) -> None:
    if prototypes.shape[1] != x.shape[2]:
        raise ValueError(f"{name_x} and {name} must have as many features, got {x.shape[2]} and {prototypes.shape[1]}")


def _check_prototypes(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            "student_prototypes and teacher_prototypes must have as many rows, at least one, got"
            f" {len(student)} and {len(teacher)}"
        )
