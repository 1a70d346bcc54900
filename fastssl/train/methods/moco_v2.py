"""MoCo v2: improved baselines with momentum contrastive learning (arXiv:2003.04297)."""

from __future__ import annotations

from fastssl.train.data.augment import STRONG
from fastssl.train.methods.moco_v1 import MoCoV1


class MoCoV2(MoCoV1):
    """MoCo with a projector of two layers, stronger augmentation and a higher temperature.

    The paper's third change, a cosine schedule, applies to all methods here.

    Args:
        temperature: of InfoNCE.
        momentum: of the teacher; the paper's 0.999 is for longer runs.
        queue: number of keys.
    """

    augmentations = STRONG, STRONG
    head = (256, 128)

    def __init__(self, *, temperature: float = 0.2, momentum: float = 0.97, queue: int = 4096) -> None:
        super().__init__(temperature=temperature, momentum=momentum, queue=queue)
