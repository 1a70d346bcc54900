"""DINO's loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import of_reference
from fastssl._checks import check_positive_temperature, check_reduction
from fastssl.functional.distillation.logits import (
    check_center,
    check_pairs_of_views,
    check_rows_alike,
    check_views,
    loss_of_rows,
)
from fastssl.ops import current_backend


def dino_loss(
    student_logits: Tensor | Sequence[Tensor],
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    center: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""DINO's loss (arXiv:2104.14294): each view of an image is taught by a teacher's distributions of its other views.

        P_t = softmax((teacher_logits_t - center) / teacher_temperature)
        loss_i = mean over pairs t != s of  -sum_k P_tik log softmax(student_logits_s / student_temperature)_ik

    Logits are read where they are, and once: with "mean" and "sum" the forward pass takes the gradient, too. The only
    extra memory that grows with K is that gradient. A second backward pass computes it again.

    Args:
        student_logits: (S, B, K) of S views of B images; or a sequence of views (B, K) and of groups of views
            (V, B, K), as multi-crop delivers them; float32, bfloat16, float16 or float64. The first T views are those
            of the teacher.
        teacher_logits: (T, B, K), or such a sequence, of student_logits' dtype and device. A constant.
        student_temperature: positive, a number or a 0-d tensor, which gets its exact gradient.
        teacher_temperature: likewise, a constant.
        center: (K,) or (1, K), subtracted from the teacher's logits: their moving average, or what `sinkhorn_center`
            returns. A constant of any floating-point dtype. None: 0.
        reduction: "mean" or "sum" over the images, or "none".

    Returns:
        0-d loss, or (B,) with reduction "none", in student_logits' dtype, float32 under autocast. The mean over an
        empty batch is NaN. A row's loss is NaN where a logit is NaN or infinity, or all of a view are minus infinity.
        Where one is minus infinity, its probability is 0: of a student, the loss is infinite, but NaN if the teacher's
        is 0, too.

    Raises:
        TypeError: if logits or center are no tensors, or a temperature is neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, there is no pair of unlike views, a temperature is a number
            that is not finite and positive (a tensor that is not positive makes the loss NaN), or reduction is unknown.
    """
    student, teacher = (
        check_views("student_logits", student_logits), check_views("teacher_logits", teacher_logits)
    )  # fmt: skip
    check_rows_alike([*student, *teacher])
    name, x = student[0]
    student, teacher = ([x for _, x in views] for views in (student, teacher))
    student_views, teacher_views = (sum(len(x) for x in views) for views in (student, teacher))
    pairs = check_pairs_of_views("student_logits and teacher_logits", student_views, teacher_views)
    student_temperature = check_positive_temperature("student_temperature", student_temperature, x)
    teacher_temperature = check_positive_temperature("teacher_temperature", teacher_temperature, x)
    constant = check_center(center, x, name)
    check_reduction(reduction)
    if current_backend() == "reference":
        loss = reference.distillation.dino_loss(
            student,
            teacher,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            center=center,
            reduction=reduction,
        )
        return of_reference(loss, x)
    return loss_of_rows(
        student,
        teacher,
        constant,
        student_temperature,
        teacher_temperature,
        unlike_views=True,
        pairs=pairs,
        weights=None,
        reduction=reduction,
    )
