"""The decoupled contrastive losses as modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastssl._arithmetic import dot, finish, inverse, logsumexp, unit
from fastssl._checks import (
    check_divisor,
    check_gather_distributed,
    check_pair,
    check_scalar,
    check_temperature,
    check_weights,
)
from fastssl._exponential_sums import row_sums
from fastssl.distributed import Ring, default_group, rank, world_size
from fastssl.functional import dcl
from fastssl.ops._precision import product_precision


class DCLLoss(nn.Module):
    """The decoupled contrastive loss (DCL, arXiv:2110.06848). It takes the place of lightly's class of this name.

    Attributes: as the arguments.

    Args:
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        weight_fn: (out0, out1) -> (B,) weights of the positives of out0, from normalised rows; None: 1.
        gather_distributed: take the rows of all processes as negatives, with their gradients. All processes must hold
            the same number of rows. The mean of the processes' losses, and so the gradients that
            DistributedDataParallel averages, are those of one process on the whole batch, except that weight_fn sees
            only the rows of its own process.

    Raises:
        TypeError: if temperature is neither number nor tensor, weight_fn no function, or gather_distributed no flag.
        ValueError: if temperature is zero or not finite, or gather_distributed is True and torch.distributed is not
            available.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_divisor("temperature", temperature)
        if weight_fn is not None and not callable(weight_fn):
            raise TypeError(f"weight_fn must be a function or None, got {type(weight_fn).__name__}")
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = check_gather_distributed(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean loss.

        Args:
            out0: (B, D) embeddings of the first views, of any length.
            out1: (B, D) embeddings of the second views.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.dcl` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.dcl`.
        """
        out0, out1 = check_pair(out0, out1, "out0", "out1")
        if not (self.gather_distributed and world_size() > 1):
            return dcl(out0, out1, temperature=self.temperature, weight_fn=self.weight_fn)
        temperature = check_temperature(self.temperature, out0)
        scale, precision = inverse(temperature, out0), product_precision(out0)
        views = [unit(out) for out in (out0, out1)]
        ring = Ring(default_group(rank(), world_size()), out0=out0, out1=out1, temperature=scale)
        rows, own = torch.cat(views), torch.arange(out0.shape[0], device=out0.device).repeat(2)
        negatives = [logsumexp(*row_sums(rows, y, scale, own, precision, ring)) for y in views]
        positive = dot(rows, torch.cat(views[::-1])) * scale
        if self.weight_fn is not None:
            weights = [check_weights(self.weight_fn(*pair), out0) for pair in (views, views[::-1])]
            positive = positive * torch.cat(weights)
        return finish(torch.logaddexp(*negatives) - positive, "mean", out0)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"


class DCLWLoss(DCLLoss):
    """DCL with the weights of von Mises and Fisher (arXiv:2110.06848). It takes the place of lightly's class.

        w_i = 2 - B softmax_i(<out0_i, out1_i> / sigma),

    which get no gradient.

    Args:
        temperature: divides the similarities.
        sigma: divides the similarities in the weights.
        gather_distributed: as `DCLLoss`.

    Raises:
        TypeError, ValueError: as `DCLLoss`, or if sigma is no number, zero or not finite.
    """

    def __init__(self, temperature: float | Tensor = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        weight_fn = partial(_von_mises_fisher, sigma=check_divisor("sigma", sigma))
        super().__init__(temperature, weight_fn, gather_distributed)


@torch.no_grad()
def _von_mises_fisher(out0: Tensor, out1: Tensor, sigma: float) -> Tensor:
    return 2 - out0.shape[0] * (dot(out0, out1) / check_scalar("sigma", sigma, out0)).softmax(0)
