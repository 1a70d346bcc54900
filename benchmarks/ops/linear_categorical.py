"""Drawing from the softmax of a linear layer's logits, against PyTorch's `multinomial`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.registry import Benchmark, Inputs, Size, outputs


def _inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """Rows (N, D), and a weight (V, D) that gives logits of about 1."""
    rows, dim, classes = size
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, dim, generator=generator) for n in (rows, classes))
    return x.to(dtype), (w / dim**0.5).to(dtype)


def _eager(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).float().softmax(1).multinomial(1)[:, 0]


Benchmark(
    "linear_categorical",
    sizes=((4096, 768, 30522), (256, 768, 30522)),  # rows x features, classes
    memory_sizes=(),
    inputs=_inputs,
    traffic=lambda size, itemsize: (size[0] + size[2]) * size[1] * itemsize,
    flops=lambda size: 2.0 * size[0] * size[1] * size[2],
    # Logits, in float32 for bfloat16 too, and probabilities.
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), 2 * size[0] * size[2] * 4),
    naive=_eager,
    step=outputs,
    timed="forward",
    settle=lambda inputs, ids: ((ids >= 0) & (ids < len(inputs[1])),),
)
