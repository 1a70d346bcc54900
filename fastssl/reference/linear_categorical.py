"""Drawing a class of each row from the softmax of a linear layer's logits, as `torch.multinomial` does it."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_categorical(
    input: Tensor, linear_weight: Tensor, *, linear_bias: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    """All logits over the temperature, their softmax, and one class of each row."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias).double() / temperature
    probabilities = logits.reshape(-1, len(linear_weight)).softmax(1)
    drawn = probabilities.nan_to_num(1.0).multinomial(1)[:, 0] if len(probabilities) else probabilities[:, 0].long()
    return drawn.where(probabilities.isfinite().all(1), -1).view(input.shape[:-1])
