"""VICReg: variance-invariance-covariance regularization for self-supervised learning (arXiv:2105.04906)."""

from __future__ import annotations

from torch import Tensor

from fastssl.distributed import ProcessGroup
from fastssl.functional import vicreg
from fastssl.train.two_views import TwoViews


class VICReg(TwoViews):
    """Two views of an image are alike, while features vary among images, each in its own way.

    Args:
        lambda_param: weight of the invariance term.
        mu_param: weight of the variance term.
        nu_param: weight of the covariance term.
    """

    def __init__(self, *, lambda_param: float = 25.0, mu_param: float = 25.0, nu_param: float = 1.0) -> None:
        super().__init__(1024, 1024, 1024)
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param

    def loss(self, z1: Tensor, z2: Tensor, group: ProcessGroup | None = None) -> Tensor:
        weights = {"lambda_param": self.lambda_param, "mu_param": self.mu_param, "nu_param": self.nu_param}
        return vicreg(z1, z2, **weights, group=group)
