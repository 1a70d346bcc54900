"""VICReg as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl._arithmetic import finish
from fastssl._checks import check_eps, check_gather_distributed, check_number, check_pair
from fastssl.distributed import check_alike, default_group, rank, world_size
from fastssl.functional import vicreg
from fastssl.ops._precision import accumulate_dtype


class VICRegLoss(nn.Module):
    """VICReg (arXiv:2105.04906). It takes the place of lightly's class of this name, without a change elsewhere.

    Attributes: as the arguments.

    Args:
        lambda_param: the weight of the invariance.
        mu_param: the weight of the variance.
        nu_param: the weight of the covariance.
        gather_distributed: variance and covariance of the rows of all processes, and invariance of this process's. All
            processes must hold the same number of rows. The mean of the processes' losses is that of one process on
            the whole batch, and so are the gradients that DistributedDataParallel averages.
        eps: added to the variances.

    Raises:
        TypeError, ValueError: if a weight or eps is no number, or not finite, or eps is negative, or gather_distributed
            is True and torch.distributed is not available.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ) -> None:
        super().__init__()
        for name, number in (("lambda_param", lambda_param), ("mu_param", mu_param), ("nu_param", nu_param)):
            check_number(name, number)
        check_eps(eps)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = check_gather_distributed(gather_distributed)
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss.

        Args:
            z_a: (B, ..., D) embeddings of the first views, B >= 2. Of more than two dimensions (VICRegL,
                arXiv:2210.01571), the mean of the losses at every position between the first and the last.
            z_b: (B, ..., D) embeddings of the second views.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.vicreg` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.vicreg`.
        """
        if not isinstance(z_a, Tensor) or not isinstance(z_b, Tensor):
            return self._loss(z_a, z_b)
        if self.gather_distributed and world_size() > 1:
            check_alike(None, {"z_a": z_a, "z_b": z_b})  # all processes are to take as many losses
        if z_a.dim() < 3 or z_a.shape != z_b.shape:
            return self._loss(z_a, z_b)
        if 0 in z_a.shape[1:-1]:
            raise ValueError(f"z_a and z_b must have at least one position, got shape {tuple(z_a.shape)}")
        views = zip(*(z.flatten(1, -2).unbind(1) for z in (z_a, z_b)), strict=True)
        return torch.stack([self._loss(*pair) for pair in views]).mean()

    def _loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        options = dict(mu_param=self.mu_param, nu_param=self.nu_param, eps=self.eps)
        if not (self.gather_distributed and world_size() > 1):
            return vicreg(z_a, z_b, lambda_param=self.lambda_param, **options)
        z_a, z_b = check_pair(z_a, z_b, "z_a", "z_b")
        dtype = accumulate_dtype(z_a.dtype)
        invariance = F.mse_loss(z_a.to(dtype), z_b.to(dtype))
        group = default_group(rank(), world_size())
        loss = vicreg(z_a, z_b, lambda_param=0.0, **options, group=group)
        return finish(self.lambda_param * invariance + loss, "none", z_a)

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param}, mu_param={self.mu_param}, nu_param={self.nu_param},"
            f" gather_distributed={self.gather_distributed}, eps={self.eps}"
        )
