"""Barlow Twins: self-supervised learning via redundancy reduction (arXiv:2103.03230)."""

from __future__ import annotations

from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.functional import barlow_twins
from fastssl.train.two_views import TwoViews


class BarlowTwins(TwoViews):
    """Each feature of one view correlates with itself in the other view, and with no other feature.

    Args:
        lambda_param: weight of the correlations with other features.
    """

    def __init__(self, *, lambda_param: float = 5e-3) -> None:
        super().__init__(1024, 1024, 1024)
        self.lambda_param = lambda_param

    def loss(self, z1: Tensor, z2: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return barlow_twins(z1, z2, lambda_param=self.lambda_param, group=group)
