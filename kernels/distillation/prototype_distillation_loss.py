"""The losses of DINO and iBOT from features and prototypes on the GPU.

    s = X W^T,   t = Y V^T,   G = dloss/ds,   dX = G W,   dW = G^T X

Algorithm. A block of rows of all views at a time, as common/logits.py says: products give the student's and the
teacher's logits, the kernel of distillation_loss.py the losses and, in the place of the student's logits, G, which is
multiplied twice more.

Cost. With U = 2 M K D floating-point operations, M the rows of all views of one side, 4 U with gradients, 2 U without,
for as many views of the teacher as of the student: 8 D operations for each logit of the student. Of memory, each logit
of both sides is written once and read once (twice where rows in flight do not fit the second-level cache), and G is
written once and read twice: 28 bytes for each of the student's logits in float32, 14 in 16 bits. By a card's data
sheet, D decides which of the two is the floor: about 300 on an H100 in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels.common.logits import Gradients, Logits, gain_for, row_blocks
from fastssl.kernels.distillation.distillation_loss import launch
from fastssl.kernels.distillation.logits import inverse


def prototype_distillation_loss(
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
    loss = student.new_empty(student.shape[1], dtype=torch.float32)
    gradients = _visit(*tensors, weight if derive else None, None, loss, *numbers)
    if gradients is None:
        gradients = tuple(x.new_empty((0, *x.shape[1:])) for x in (student, student_prototypes))
    return loss if weight is None else (loss * weight).sum(), *gradients


def prototype_distillation_loss_backward(
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
    factors = (grad_loss, None) if weight is None else (weight, grad_loss)  # the bits of what the forward pass takes
    numbers = student_temperature, teacher_temperature, unlike_views, precision
    return _visit(*tensors, *factors, None, *numbers)


def _visit(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None,
    factor: Tensor | None,
    scale: Tensor | None,
    loss: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    precision: str,
) -> tuple[Tensor, Tensor] | None:
    """Writes each row's loss, if that is wanted; and returns the gradients of features and prototypes, if there is a
    `factor`: those of the rows' losses times it, summed, times `scale`."""
    s, t = Logits(student, student_prototypes, precision), Logits(teacher, teacher_prototypes, precision)
    numbers = student_temperature, teacher_temperature, unlike_views
    gradients = None
    if factor is not None:
        # A weight is the difference of two sums of as many probabilities as a view has teachers.
        largest = torch.cat([factor, factor.new_zeros(1)]).abs().amax() * len(teacher) * inverse(student_temperature)
        gain = gain_for(largest)
        factor = factor * gain
        gradients = Gradients(s, student, student_prototypes, (1 if scale is None else scale) / gain)
    for rows in row_blocks(student.shape[1], s.row_bytes + t.row_bytes):
        logits = s(rows)
        losses = None if loss is None else loss.new_empty(logits.shape[:2])
        weights = (None, None) if factor is None else (factor[rows], logits)
        launch(logits, t(rows), center, weights[0], losses, weights[1], *numbers)
        if losses is not None:
            loss[rows] = losses.sum(0)
        if gradients is not None:
            gradients.add(rows, logits)
    return None if gradients is None else gradients.finish()
