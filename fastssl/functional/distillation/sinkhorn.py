"""Sinkhorn-Knopp: assignments of a batch to prototypes, all of which get the same share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl import distributed, reference
from fastssl._checks import check_positive, check_positive_temperature, check_rows
from fastssl.distributed import ProcessGroup
from fastssl.functional.distillation.teacher import check_teacher_logits, rows_of
from fastssl.ops import current_backend
from fastssl.ops.distillation import assignment_sums, assignments, column_logsumexp


@torch.no_grad()
def sinkhorn_center(
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.04,
    iterations: int = 3,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""What to subtract from a teacher's logits, so that all prototypes get about the same share of the batch.

    Sinkhorn-Knopp (SwAV, arXiv:2006.09882; DINOv2, arXiv:2304.07193) scales the columns and the rows of
    exp(teacher_logits / temperature) in turn, to the same sums. Its assignments are

        softmax((teacher_logits - center) / temperature)

    so that a vector is all that it has to find: `dino_loss` and `ibot_loss` take it as their center, with this
    temperature as the teacher's. Each iteration reads the logits once (on GPUs all but the first twice), and nothing of
    their size is written. It works with logarithms, and is right at scales at which the exponentials overflow.

    Args:
        teacher_logits: (N, K), or (V, B, K) of several views; or a sequence of such tensors. Their rows, N in all, are
            one batch. float32, bfloat16, float16 or float64. There is no gradient.
        temperature: positive, a number or a 0-d tensor.
        iterations: at least 1. Each scales columns, then rows.
        group: processes that each hold some rows of one batch, as many as they like, perhaps none; the center is that
            of all. They exchange K numbers in each iteration, and as many again in the first.

    Returns:
        (K,) in float32, in float64 for float64, whose last digits are those of the largest logit and of temperature:
        assignments are rough where temperature is below 1e-6 of the logits. NaN without rows, or if a logit is NaN or
        infinite.

    Raises:
        TypeError: if a tensor is none, temperature neither number nor tensor, or iterations no integer.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is not finite and positive (a
            tensor that is not positive makes the center NaN), or iterations is below 1; or on every process, if those
            of group differ in K or dtype.
    """
    matrices = check_teacher_logits(teacher_logits, group)
    temperature = check_positive_temperature("temperature", temperature, matrices[0])
    iterations = check_positive("iterations", iterations)
    if current_backend() == "reference":
        return reference.distillation.sinkhorn_center(matrices, temperature=temperature, iterations=iterations)
    return _center(matrices, temperature, iterations, group)


@torch.no_grad()
def sinkhorn_knopp(
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 0.04,
    iterations: int = 3,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Assignments of rows to prototypes, by Sinkhorn-Knopp: softmax((teacher_logits - center) / temperature) with the
    center of `sinkhorn_center`. A loss that takes the center needs no assignments.

    Args:
        teacher_logits: (N, K), or (V, B, K), whose V B rows are one batch.
        temperature, iterations, group: as in `sinkhorn_center`. Assignments are those of this process's rows.

    Returns:
        Assignments, of teacher_logits' shape, in float32, in float64 for float64. Rows sum up to 1, and all columns
        to nearly the same.

    Raises:
        TypeError, ValueError: as `sinkhorn_center`.
    """
    dims = 3 if isinstance(teacher_logits, Tensor) and teacher_logits.dim() == 3 else 2
    check_rows("teacher_logits", teacher_logits, "(N, K) or (V, B, K)", dims)
    matrices = check_teacher_logits(teacher_logits, group)
    temperature = check_positive_temperature("temperature", temperature, teacher_logits)
    iterations = check_positive("iterations", iterations)
    if current_backend() == "reference":
        return reference.distillation.sinkhorn_knopp(teacher_logits, temperature=temperature, iterations=iterations)
    center = _center(matrices, temperature, iterations, group)
    rows = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    return assignments(rows, center, temperature).view(teacher_logits.shape)


def _center(
    matrices: Sequence[Tensor], temperature: float | Tensor, iterations: int, group: ProcessGroup | None
) -> Tensor:
    total, top = column_logsumexp(matrices, temperature)
    rows, prototypes = rows_of(matrices), matrices[0].shape[1]
    if group is not None:
        total, top, rows = distributed.distillation.unite_logsumexps(total, top, temperature, rows, group)
    center = top + temperature * (total / rows).log()
    for _ in range(iterations - 1):
        total = assignment_sums(matrices, center, temperature)
        if group is not None:
            total = distributed.sum_over_processes(total, group)
        center = center + temperature * (total * prototypes / rows).log()
    return center
