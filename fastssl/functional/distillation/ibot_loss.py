"""iBOT's loss of masked patches."""

from __future__ import annotations

from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import of_reference
from fastssl._checks import check_positive_temperature, check_reduction, check_rows
from fastssl.functional.distillation.logits import check_center, check_rows_alike, check_weights, loss_of_rows
from fastssl.ops import current_backend


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
    r"""iBOT's loss of masked patches (arXiv:2111.07832; DINOv2, arXiv:2304.07193): each row is taught by the same row.

        P = softmax((teacher_logits - center) / teacher_temperature)
        loss_i = -weights_i sum_k P_ik log softmax(student_logits / student_temperature)_ik

    Memory and gradients are as in `dino_loss`. The number of rows may change from step to step.

    Args:
        student_logits: (N, K) of N masked patches; float32, bfloat16, float16 or float64.
        teacher_logits: (N, K), of student_logits' dtype and device. A constant.
        student_temperature, teacher_temperature, center: as in `dino_loss`.
        weights: (N,) of any floating-point dtype; in iBOT 1 / (masked patches of the image). None: 1.
        reduction: "mean", which divides by N with weights, too; "sum"; or "none".

    Returns:
        0-d loss, or (N,) with reduction "none", in student_logits' dtype, float32 under autocast. The mean over no rows
        is NaN. What is not finite is as in `dino_loss`.

    Raises:
        TypeError: if logits, center or weights are no tensors, or a temperature is neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, a temperature is a number that is not finite and positive
            (a tensor that is not positive makes the loss NaN), or reduction is unknown.
    """
    check_rows("student_logits", student_logits, "(N, K)")
    check_rows("teacher_logits", teacher_logits, "(N, K)")
    check_rows_alike([("student_logits", student_logits), ("teacher_logits", teacher_logits)])
    student_temperature = check_positive_temperature("student_temperature", student_temperature, student_logits)
    teacher_temperature = check_positive_temperature("teacher_temperature", teacher_temperature, student_logits)
    constant = check_center(center, student_logits, "student_logits")
    if weights is not None:
        check_weights(weights, student_logits, "student_logits")
    check_reduction(reduction)
    if current_backend() == "reference":
        loss = reference.distillation.ibot_loss(
            student_logits,
            teacher_logits,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            center=center,
            weights=weights,
            reduction=reduction,
        )
        return of_reference(loss, student_logits)
    return loss_of_rows(
        [student_logits[None]],
        [teacher_logits[None]],
        constant,
        student_temperature,
        teacher_temperature,
        unlike_views=False,
        pairs=1,
        weights=weights,
        reduction=reduction,
    )
