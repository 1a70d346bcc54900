"""KoLeo as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl._checks import check_eps, check_number, check_rows
from fastssl.functional import koleo_loss


class KoLeoLoss(nn.Module):
    """KoLeo (arXiv:1806.03198): features keep away from their nearest neighbours. It takes the place of lightly's class
    of this name.

    Attributes: as the arguments.

    Args:
        p: of the distance's norm; only 2.
        eps: added to the distances, and to their coordinates.

    Raises:
        TypeError, ValueError: if p is not 2, or eps no number, negative or not finite.
    """

    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__()
        if check_number("p", p) != 2:
            raise ValueError(f"p must be 2, the norm of the nearest neighbours, got {p}")
        self.p = p
        self.eps = check_eps(eps)

    def forward(self, x: Tensor) -> Tensor:
        """The loss.

        Args:
            x: (N, D) features, of any length.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.koleo_loss` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.koleo_loss`.
        """
        check_rows("x", x, "(N, D)")
        if x.shape[0] == 1:
            raise ValueError(f"x must not have a single row, which has no neighbour, got shape {tuple(x.shape)}")
        return koleo_loss(x, eps=self.eps)

    def extra_repr(self) -> str:
        return f"p={self.p}, eps={self.eps}"
