"""The sigmoid contrastive loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import peers
from benchmarks.ops.registry import (
    Benchmark,
    Blockwise,
    Size,
    small_batches,
    square_matrices,
    square_products,
    unit_pairs,
)

LOGIT_SCALE, LOGIT_BIAS = 10.0, -10.0  # SigLIP's, before training


def _inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Images and texts of unit length, the logit scale and the bias, all of which require gradients."""
    scalars = (torch.tensor(value, requires_grad=True) for value in (LOGIT_SCALE, LOGIT_BIAS))
    return *unit_pairs(size, dtype), *scalars


@Blockwise
def _oracle(row: Tensor, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    S = scale * images[row] @ texts.T + bias
    own = torch.arange(len(texts), device=row.device) == row[:, None]
    return -F.logsigmoid(S.where(own, -S)).sum() / len(images)


Benchmark(
    "siglip_loss",
    sizes=(*small_batches(512), (2048, 512), (8192, 512)),
    memory_sizes=((65536, 512),),
    inputs=_inputs,
    # S, and a product with its weights for either side: there is no normaliser to wait for.
    flops=square_products(3),
    # Both sides are read, their gradients written, then read and written once more.
    traffic=lambda size, itemsize: 4 * size[0] * size[1] * itemsize + 4 * size[0] * size[1] * 4,
    needs=square_matrices(naive=6, compile=2, open_clip=6),  # measured as 5.2, 1.4, 5.2
    peers={"open_clip": lambda: peers.open_clip().SigLipLoss()},
    oracle=_oracle,
)
