"""Self-distillation on the GPU."""

from fastssl.kernels.distillation.distillation_loss import distillation_loss, distillation_loss_backward
from fastssl.kernels.distillation.prototype_distillation_loss import (
    prototype_distillation_loss,
    prototype_distillation_loss_backward,
)
from fastssl.kernels.distillation.sinkhorn import assignment_sums, assignments, column_logsumexp, column_sums

__all__ = [
    "assignment_sums",
    "assignments",
    "column_logsumexp",
    "column_sums",
    "distillation_loss",
    "distillation_loss_backward",
    "prototype_distillation_loss",
    "prototype_distillation_loss_backward",
]
