"""Self-distillation: a teacher's distribution over prototypes teaches a student's."""

from fastssl.functional.distillation.dino_loss import dino_loss
from fastssl.functional.distillation.ibot_loss import ibot_loss
from fastssl.functional.distillation.prototype_distillation_loss import prototype_distillation_loss
from fastssl.functional.distillation.sinkhorn import sinkhorn_center, sinkhorn_knopp
from fastssl.functional.distillation.update_center import update_center_

__all__ = [
    "dino_loss",
    "ibot_loss",
    "prototype_distillation_loss",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "update_center_",
]
