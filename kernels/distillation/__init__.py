"""Self-distillation on the GPU."""

from fastssl.kernels.distillation.distillation_loss import distillation_loss, distillation_loss_backward

__all__ = ["distillation_loss", "distillation_loss_backward"]
