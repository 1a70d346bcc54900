"""Barlow Twins as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl._arithmetic import finish, without_autocast
from fastssl._checks import check_batch, check_gather_distributed, check_number, check_pair
from fastssl.distributed import check_alike, default_group, gather_rows, rank, world_size
from fastssl.distributed.correlation import correlate, standardize
from fastssl.functional import barlow_twins, correlation_algorithm
from fastssl.ops import correlation


class BarlowTwinsLoss(nn.Module):
    """Barlow Twins (arXiv:2103.03230). It takes the place of lightly's class of this name, without a change elsewhere.

    Attributes: as the arguments.

    Args:
        lambda_param: the weight of the redundancy.
        gather_distributed: take the loss of the mean of all processes' cross-correlations, each process standardising
            features over its own rows, as lightly does; `fastssl.functional.barlow_twins` with a group standardises
            over the rows of all. All processes must hold the same number of rows. They exchange these where
            `fastssl.functional.correlation_algorithm` of all rows is "dual", otherwise their D x D correlations, which
            are then stored. Each process's loss is the same, and gradients of features are those of their sum.

    Raises:
        TypeError, ValueError: if lambda_param is no number, or not finite, or gather_distributed is True and
            torch.distributed is not available.
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        check_number("lambda_param", lambda_param)
        self.lambda_param = lambda_param
        self.gather_distributed = check_gather_distributed(gather_distributed)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss.

        Args:
            z_a: (B, D) embeddings of the first views, B >= 2.
            z_b: (B, D) embeddings of the second views.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.barlow_twins` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.barlow_twins`.
        """
        if self.gather_distributed and world_size() > 1:
            return self._of_all_processes(z_a, z_b)
        return barlow_twins(z_a, z_b, lambda_param=self.lambda_param)

    def _of_all_processes(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        z_a, z_b = check_pair(z_a, z_b, "z_a", "z_b")
        group = default_group(rank(), world_size())
        check_alike(group, {"z_a": z_a, "z_b": z_b})
        check_batch(None, z_a=z_a)
        a, b = (standardize(z, 1e-5, False, None) for z in (z_a, z_b))
        if correlation_algorithm(world_size() * a.shape[0], a.shape[1]) == "dual":
            a, b = gather_rows(a, group), gather_rows(b, group)
            diagonal = (a * b).mean(0)
            with without_autocast(a):
                redundancy = correlation.gram_squares(a, b) / a.shape[0] ** 2
        else:
            C = correlate(a, b, group)
            diagonal, redundancy = C.diagonal(), correlation.off_diagonal_squares(C)
        return finish((diagonal - 1).square().sum() + self.lambda_param * redundancy, "none", z_a)

    def extra_repr(self) -> str:
        return f"lambda_param={self.lambda_param}, gather_distributed={self.gather_distributed}"
