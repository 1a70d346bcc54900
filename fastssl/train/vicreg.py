"""VICReg: variance-invariance-covariance regularization for self-supervised learning (arXiv:2105.04906)."""

from __future__ import annotations

from torch import Tensor

from fastssl.train.models import Expander
from fastssl.train.two_views import TwoViews, implementation


class VICReg(TwoViews):
    """Two views of an image are alike, while features vary among images, each in its own way.

    Args:
        lambda_param: weight of the invariance term.
        mu_param: weight of the variance term.
        nu_param: weight of the covariance term.
        impl: what computes the loss: "fastssl", or "naive", eager PyTorch that builds the covariance matrices.
    """

    def __init__(
        self, *, lambda_param: float = 25.0, mu_param: float = 25.0, nu_param: float = 1.0, impl: str = "fastssl"
    ) -> None:
        super().__init__(Expander)
        self.weights = {"lambda_param": lambda_param, "mu_param": mu_param, "nu_param": nu_param}
        self.vicreg = implementation("vicreg", impl)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        return self.vicreg(z1, z2, **self.weights)
