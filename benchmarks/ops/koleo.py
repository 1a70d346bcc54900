"""KoLeo: the distance of every row to its nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import peers
from benchmarks.ops.registry import Benchmark, Size, small_batches, square_matrices, square_products


def _rows(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*size, generator=generator).to(dtype).requires_grad_(),)


Benchmark(
    "koleo_loss",
    sizes=(*small_batches(768), (4096, 768)),
    memory_sizes=((65536, 768),),
    inputs=_rows,
    # The similarities are symmetric: half of them, in bfloat16, which tells apart most. The rest, in float32, is the
    # distances of N pairs of rows.
    flops=square_products(0.5),
    products="bfloat16",
    traffic=lambda size, itemsize: 3 * size[0] * size[1] * itemsize,
    needs=square_matrices(naive=2, compile=2, lightly=2),
    peers={"lightly": lambda: peers.lightly().KoLeoLoss()},
    modes=("float32",),  # the search decides in float32 in every mode
)
