"""The moving average of a teacher's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl import distributed, reference
from fastssl._checks import DTYPES, check_not_negated, check_same_device, check_scalar, check_share, check_tensor
from fastssl.distributed import ProcessGroup
from fastssl.functional.distillation.teacher import check_teacher_logits, rows_of
from fastssl.functional.ema import ema_update_
from fastssl.ops import current_backend
from fastssl.ops.distillation import column_sums


@torch.no_grad()
def update_center_(
    center: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    momentum: float | Tensor = 0.9,
    group: ProcessGroup | None = None,
) -> None:
    """Move DINO's center (arXiv:2104.14294) towards the mean of a teacher's logits, in place.

        center = momentum center + (1 - momentum) mean_i teacher_logits_i

    Args:
        center: (K,) or (1, K); float32, bfloat16, float16 or float64; changed.
        teacher_logits: (N, K), or (V, B, K) of several views; or a sequence of such tensors, as of micro-batches whose
            gradients are accumulated; of any of those dtypes. Their rows, N in all, are one batch: without any, center
            stays as it is. The mean is taken in float32, in float64 for float64.
        momentum: from 0, which copies the mean, to 1, which leaves center as it is: a number, or a 0-d tensor, whose
            value is not checked.
        group: processes that each hold some rows of one batch, as many as they like; the mean is that of all.

    Raises:
        TypeError: if a tensor is none, or momentum neither number nor tensor.
        ValueError: before anything is changed, if shapes, dtypes or devices do not fit, momentum is a number below 0 or
            above 1, or two elements of center share memory; or on every process, if those of group differ in K or
            dtype.
    """
    check_tensor("center", center)
    check_not_negated("center", center)
    matrices = check_teacher_logits(teacher_logits, group)
    like, prototypes = matrices[0], matrices[0].shape[1]
    if center.dtype not in DTYPES:
        raise ValueError(f"center must have a floating-point dtype of 16, 32 or 64 bits, got {center.dtype}")
    if center.shape not in ((prototypes,), (1, prototypes)):
        found = f"{tuple(center.shape)}"
        raise ValueError(f"center must have shape ({prototypes},) or (1, {prototypes}), as teacher_logits, got {found}")
    if prototypes > 1 and center.stride(-1) == 0:
        raise ValueError(f"center must have no two elements in one place, got strides {center.stride()}")
    check_same_device("center", center, "teacher_logits", like)
    momentum = check_scalar("momentum", momentum) if isinstance(momentum, Tensor) else check_share("momentum", momentum)
    if current_backend() == "reference":
        reference.distillation.update_center_(center, matrices, momentum)
        return
    row, rows = center.view(prototypes), rows_of(matrices)
    if group is None and rows == 0:
        return
    total = column_sums(matrices)
    if group is None:
        mean = total / rows
    else:
        total, rows = distributed.distillation.sum_of_rows(total, rows, group)
        mean = torch.where(rows > 0, total / rows, row.to(total.dtype))
    ema_update_([row], [mean], momentum)
