"""The uniformity of embeddings on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.registry import Benchmark, Size, small_batches, square_matrices, square_products


def _rows(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*size, generator=generator).to(dtype).requires_grad_(),)


Benchmark(
    "uniformity",
    sizes=(*small_batches(128), (4096, 128)),
    memory_sizes=(),
    inputs=_rows,
    # S is symmetric: half of its tiles forward, and backward where they could not be kept; two products with that half.
    flops=square_products(1.5, again=0.5),
    traffic=lambda size, itemsize: 3 * size[0] * size[1] * itemsize,
    needs=square_matrices(naive=5, compile=3),
)
