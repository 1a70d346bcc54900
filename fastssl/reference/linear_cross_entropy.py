"""The cross-entropy of a linear layer's logits, as PyTorch writes it: `F.cross_entropy(F.linear(...))`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 1.0,
    normalize: bool = False,
) -> Tensor:
    """All logits, those of unit vectors where `normalize`, over the temperature, and their cross-entropy."""
    x, w = input.reshape(-1, input.shape[-1]), linear_weight
    soft, ignore_index = target.is_floating_point(), -100 if ignore_index is None else ignore_index
    if not soft:  # rows without a label take no part, whatever they hold
        x = x.where(target.reshape(-1, 1) != ignore_index, 1)
    if normalize:
        x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
    logits = (x @ w.T / temperature).to(x.dtype)
    if linear_bias is not None:
        logits = logits + linear_bias
    loss = F.cross_entropy(
        logits,
        target.reshape(logits.shape) if soft else target.reshape(-1),
        weight=None if weight is None else weight.detach().to(logits.dtype),
        reduction=reduction,
        ignore_index=-100 if soft else ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss.view(input.shape[:-1]) if reduction == "none" else loss
