"""Softmax contrastive losses."""

from __future__ import annotations

import math

import peers
import torch
import torch.nn.functional as F
from registry import Benchmark, Size
from torch import Tensor

TEMPERATURE = 0.5  # the default of fastssl, of the reference and of lightly
_FLOAT64_ROWS = 16384  # above, the oracle works in float32
_BLOCK_ELEMENTS = 1 << 22


def _nt_xent_inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, dim = size
    if rows < 2 or rows % 2:
        raise ValueError(f"sizes must have an even number of rows, two views of each sample, got {rows}")
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows // 2, dim, generator=generator).to(dtype).requires_grad_() for _ in range(2))


def _nt_xent_oracle(z1: Tensor, z2: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """NT-Xent and its gradients by autograd, one block of rows at a time."""
    rows = 2 * z1.shape[0]
    dtype = torch.float64 if rows <= _FLOAT64_ROWS else torch.float32
    x = torch.cat([z1, z2]).detach().to(dtype).requires_grad_()
    normalized = F.normalize(x, dim=1)
    z = normalized.detach().requires_grad_()
    column = torch.arange(rows)
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros(z.shape, dtype=torch.float64)
    for row in column.split(max(1, _BLOCK_ELEMENTS // rows)):
        similarity = z[row] @ z.T / TEMPERATURE
        lse = similarity.masked_fill(column == row[:, None], float("-inf")).logsumexp(1)
        part = (lse - similarity.gather(1, ((row + rows // 2) % rows)[:, None]).squeeze(1)).sum() / rows
        loss += part.detach()
        gradient += torch.autograd.grad(part, z)[0]
    return loss, torch.autograd.grad(normalized, x, gradient.to(dtype))[0].chunk(2)


def _nt_xent_needs(size: Size, itemsize: int) -> dict[str, float]:
    """By the number of rows x rows matrices alive at once: measured as 3.3 to 3.6, 1.1 to 1.2, and 4.2 to 5.8."""
    matrix = size[0] ** 2 * itemsize
    return {"naive": 4 * matrix, "compile": 2 * matrix, "lightly": 6 * matrix}


Benchmark(
    "nt_xent",
    sizes=((64, 128), (128, 128), (256, 128), (512, 128), (2048, 128), (8192, 128), (8192, 512)),
    memory_sizes=((32768, 128), (131072, 128)),
    inputs=_nt_xent_inputs,
    # S is symmetric: half of its tiles forward; backward that half again, and two products with it.
    flops=lambda size: 2 * (2 * size[0] ** 2 * size[1]),
    # Both passes read the rows, the backward pass writes their gradients; loss, shift and total are written, then read.
    traffic=lambda size, itemsize: 3 * size[0] * size[1] * itemsize + 6 * size[0] * 4,
    needs=_nt_xent_needs,
    arguments={"temperature": TEMPERATURE},
    peers={"lightly": lambda: peers.lightly_nt_xent_loss()(temperature=TEMPERATURE)},
    oracle=_nt_xent_oracle,
)


def _similarity_logsumexp_inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries that require gradients, and a queue of keys that does not, of unit length."""
    keys, queries, dim = size
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, dim, generator=generator), dim=1).to(dtype) for n in (queries, keys))
    return x.requires_grad_(), y


Benchmark(
    "similarity_logsumexp",
    sizes=((4096, 256, 128), (65536, 256, 128)),  # keys x queries x features: MoCo's queue
    memory_sizes=(),
    inputs=_similarity_logsumexp_inputs,
    # The keys are constant: the product with the weights accumulates beside the log-sum-exp, and backward only scales.
    flops=lambda size: 2 * (2 * math.prod(size)),
    # Keys and queries are read once; the weighted sum of keys is written and read in float32, the gradient written.
    traffic=lambda size, itemsize: (size[0] + 2 * size[1]) * size[2] * itemsize + 2 * size[1] * size[2] * 4,
    needs=lambda size, itemsize: {name: 4 * size[0] * size[1] * itemsize for name in ("naive", "compile")},
    arguments={"scale": 5.0},
)
