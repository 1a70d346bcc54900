"""Barlow Twins: self-supervised learning via redundancy reduction (arXiv:2103.03230)."""

from __future__ import annotations

from torch import Tensor

from fastssl.train.models import Expander
from fastssl.train.two_views import TwoViews, implementation


class BarlowTwins(TwoViews):
    """Each feature of one view correlates with itself in the other view, and with no other feature.

    Args:
        lambda_param: weight of what other features correlate.
        impl: what computes the loss: "fastssl", or "naive", eager PyTorch that builds the correlation matrix.
    """

    def __init__(self, *, lambda_param: float = 5e-3, impl: str = "fastssl") -> None:
        super().__init__(Expander)
        self.lambda_param = lambda_param
        self.barlow_twins = implementation("barlow_twins", impl)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        return self.barlow_twins(z1, z2, lambda_param=self.lambda_param)
