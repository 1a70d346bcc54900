"""lightly's losses and helpers, under their names: `fastssl.patch("lightly")` puts them in the place of lightly's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastssl.nn
from fastssl._arithmetic import finish, without_autocast
from fastssl.functional import ema_update_, gather_tokens, random_masking_ids, restore_tokens
from fastssl.nn import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    DINOLoss,
    IBOTPatchLoss,
    KoLeoLoss,
    MemoryBankModule,
    SwaVLoss,
)
from fastssl.ops._precision import accumulate_dtype

__all__ = [
    "BarlowTwinsLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "IBOTPatchLoss",
    "KoLeoLoss",
    "MSNLoss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SwaVLoss",
    "VICRegLoss",
    "get_at_index",
    "mask_at_index",
    "random_token_mask",
    "set_at_index",
    "update_momentum",
]

_GATHERED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NTXentLoss(fastssl.nn.NTXentLoss):
    """`fastssl.nn.NTXentLoss`, whose memory_bank_size may be the number of rows alone, as in lightly 1.5: their number
    of features is then that of the first batch."""

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        rows = memory_bank_size if isinstance(memory_bank_size, int) and memory_bank_size > 0 else 0
        super().__init__(temperature, 0 if rows else memory_bank_size, gather_distributed)
        self._rows = rows

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self._rows and isinstance(out0, Tensor) and out0.dim() == 2:
            self.memory_bank = MemoryBankModule((self._rows, out0.shape[1]), self.gather_distributed).to(out0.device)
            self._rows = 0
        return super().forward(out0, out1)


class MSNLoss(fastssl.nn.MSNLoss):
    """`fastssl.nn.MSNLoss`, with another name for regularization_weight, as in lightly 1.5."""

    def __init__(self, *args: Any, me_max_weight: float | None = None, **kwargs: Any) -> None:
        if me_max_weight is not None:
            kwargs["regularization_weight"] = me_max_weight
        super().__init__(*args, **kwargs)


class VICRegLoss(fastssl.nn.VICRegLoss):
    """`fastssl.nn.VICRegLoss`, which refuses shapes with an AssertionError, as lightly does."""

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        try:
            return super().forward(z_a, z_b)
        except ValueError as error:
            raise AssertionError(str(error)) from None


class NegativeCosineSimilarity(nn.Module):
    """The loss of SimSiam (arXiv:2011.10566): the mean of -<x0, x1> / (|x0| |x1|), with products of rows that store
    nothing of their size.

    Args:
        dim: along which the vectors lie.
        eps: the least length that a vector is taken to have.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """The 0-d loss of tensors whose shapes broadcast, in their dtype, float32 under autocast."""
        dtype = torch.promote_types(x0.dtype, x1.dtype)
        with without_autocast(x0):
            x0, x1 = (x.to(accumulate_dtype(dtype)) for x in (x0, x1))
            # Clamped before the root, whose gradient at 0 is infinite.
            lengths = [self._dot(x, x).clamp_min(self.eps**2).sqrt() for x in (x0, x1)]
            cosines = self._dot(x0, x1) / (lengths[0] * lengths[1])
        return finish(-cosines, "mean", x0.new_empty((), dtype=dtype))

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.vecdot(x, y, dim=self.dim)


def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """Move the parameters of model_ema towards those of model: m model_ema + (1 - m) model, in one pass over memory.

    Raises:
        TypeError, ValueError: as `fastssl.functional.ema_update_`.
    """
    ema_update_(model_ema.parameters(), model.parameters(), m)


def random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.6,
    mask_class_token: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tokens of each sample stay and which are masked, drawn at random, by `random_masking_ids`: the numbers are
    others than lightly draws from the same seed, and the same on every device.

    Args:
        size: (batch, length).
        mask_ratio: the share that is masked, from 0 to 1.
        mask_class_token: if False, token 0 stays, is the first of those that do, and does not count.
        device: of the result.

    Returns:
        (batch, kept) and (batch, length - kept) int64, in random order.

    Raises:
        TypeError, ValueError: as `fastssl.functional.random_masking_ids`.
    """
    batch, length = size
    first = int(not mask_class_token and length > 0)
    device = torch.get_default_device() if device is None else device
    keep, _, restore = random_masking_ids(batch, length - first, mask_ratio, device=device)
    order = torch.arange(first, length, device=restore.device).expand_as(restore)
    order = torch.empty_like(restore).scatter_(1, restore, order)
    if first:
        order = nn.functional.pad(order, (1, 0))  # token 0
    kept = keep.shape[1] + first
    return order[:, :kept], order[:, kept:]


def get_at_index(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens (B, K, D) of (B, L, D) that index (B, K) names; of any dtype.

    Raises:
        TypeError, ValueError, IndexError: as `fastssl.functional.gather_tokens`.
    """
    if tokens.dtype in _GATHERED:
        return gather_tokens(tokens, index)
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def set_at_index(tokens: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """A copy of tokens (B, L, D) with value (B, K, D) in the places that index (B, K) names.

    Raises:
        RuntimeError: if shapes do not fit, or on the CPU, if one of index is out of range. On CUDA an assertion stops
            the process.
    """
    rows, places = (torch.arange(size, device=index.device) for size in tokens.shape[:2])
    index = places.expand(tokens.shape[:2]).gather(1, index)  # refuses what index_put would count from the end
    value = torch.as_tensor(value, dtype=tokens.dtype, device=tokens.device)
    return tokens.index_put((rows[: len(index)].unsqueeze(1), index), value)


def mask_at_index(tokens: Tensor, index: Tensor, mask_token: Tensor) -> Tensor:
    """Tokens (B, L, D) with the mask token, of D elements, in the places that index (B, K) names, in one pass.

    Raises:
        TypeError, ValueError: as `fastssl.functional.restore_tokens`.
        RuntimeError: on the CPU, if one of index is out of range. On CUDA an assertion stops the process.
    """
    length = tokens.shape[1]
    places = torch.arange(length, device=index.device).expand(tokens.shape[:2])
    tokens = tokens.to(torch.promote_types(tokens.dtype, mask_token.dtype))
    return restore_tokens(tokens, places.scatter(1, index, length), mask_token)


VERSIONS = "1.5.21", "1.7"
REPLACES = {
    "lightly.loss.barlow_twins_loss.BarlowTwinsLoss": BarlowTwinsLoss,
    "lightly.loss.dcl_loss.DCLLoss": DCLLoss,
    "lightly.loss.dcl_loss.DCLWLoss": DCLWLoss,
    "lightly.loss.dino_loss.DINOLoss": DINOLoss,
    "lightly.loss.ibot_loss.IBOTPatchLoss": IBOTPatchLoss,
    "lightly.loss.koleo_loss.KoLeoLoss": KoLeoLoss,
    "lightly.loss.msn_loss.MSNLoss": MSNLoss,
    "lightly.loss.negative_cosine_similarity.NegativeCosineSimilarity": NegativeCosineSimilarity,
    "lightly.loss.ntx_ent_loss.NTXentLoss": NTXentLoss,
    "lightly.loss.swav_loss.SwaVLoss": SwaVLoss,
    "lightly.loss.vicreg_loss.VICRegLoss": VICRegLoss,
    "lightly.models.utils.get_at_index": get_at_index,
    "lightly.models.utils.mask_at_index": mask_at_index,
    "lightly.models.utils.random_token_mask": random_token_mask,
    "lightly.models.utils.set_at_index": set_at_index,
    "lightly.models.utils.update_momentum": update_momentum,
}
