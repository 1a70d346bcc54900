"""The sigmoid contrastive loss, as the paper writes it (SigLIP, arXiv:2303.15343).

With S_ij = scale <x_i, y_j> + bias, every pair (i, j) is a binary decision of its own, true where i = j.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    reduction: str = "mean",
) -> Tensor:
    """SigLIP's loss: minus the log-sigmoid of the logits, their sign changed off the diagonal."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    loss = -F.logsigmoid(sign * logits).sum()
    return loss / len(logits) if reduction == "mean" else loss
