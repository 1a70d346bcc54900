"""Self-distillation: a teacher's distribution over prototypes teaches a student's."""

from fastssl.functional.distillation.dino_loss import dino_loss
from fastssl.functional.distillation.ibot_loss import ibot_loss

__all__ = ["dino_loss", "ibot_loss"]
