"""The cross-entropy of a linear layer over a vocabulary, against eager code and PyTorch's own function of this name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ops.registry import Benchmark, Blockwise, Function, Inputs, Loss, Results, Size

LABELLED = 0.15  # BERT's share of tokens that are to be predicted


def _inputs(size: Size, dtype: torch.dtype, labelled: float = 1.0) -> Inputs:
    """Rows (N, D), a weight (V, D) that gives logits of about 1, and labels."""
    rows, dim, classes = size
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, dim, generator=generator) for n in (rows, classes))
    labels = torch.randint(classes, (rows,), generator=generator)
    labels = labels.where(torch.rand(rows, generator=generator) < labelled, -100)
    return x.to(dtype).requires_grad_(), (w / dim**0.5).to(dtype).requires_grad_(), labels


def _eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def _pytorchs() -> Loss:
    """In chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("No module named torch.nn.functional.linear_cross_entropy before PyTorch 2.13")
    options = nn.LinearCrossEntropyOptions()
    return lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options)


def _share(rows: Tensor, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x[rows] @ w.T, y[rows], reduction="sum") / (y != -100).sum()


@torch.no_grad()
def _value(function: Function, inputs: Inputs) -> Results:
    return (function(*inputs),), ()


def _products(units: float, labelled: float = 1.0) -> Any:
    return lambda size: units * labelled * 2.0 * size[0] * size[1] * size[2]


def _needs(matrices: float) -> Any:
    """By the number of N x V matrices that eager code holds at once."""
    baselines = "naive", "compile", "pytorch"
    return lambda size, itemsize: dict.fromkeys(baselines, matrices * size[0] * size[2] * itemsize)


Benchmark(
    "linear_cross_entropy",
    sizes=((4096, 768, 30522), (512, 768, 30522), (4096, 256, 1024)),  # tokens x features, words
    memory_sizes=((8192, 1024, 128256),),
    inputs=_inputs,
    # Rows, the weight, and the gradients of both.
    traffic=lambda size, itemsize: 2 * (size[0] + size[2]) * size[1] * itemsize,
    # Logits, and a product with their weights for either side.
    flops=_products(3),
    needs=_needs(3),
    naive=_eager,
    peers={"pytorch": _pytorchs},
    timed="forward + backward, from features",
    oracle=Blockwise(_share),
)

Benchmark(
    "linear_cross_entropy",
    name="masked_linear_cross_entropy",
    sizes=((32768, 768, 30522), (4096, 768, 30522)),
    memory_sizes=(),
    inputs=lambda size, dtype: _inputs(size, dtype, LABELLED),
    traffic=lambda size, itemsize: ((1 + LABELLED) * size[0] + 2 * size[2]) * size[1] * itemsize,
    flops=_products(3, LABELLED),
    needs=_needs(3),
    naive=_eager,
    peers={"pytorch": _pytorchs},
    timed="forward + backward, 15 % of the rows labelled",
    oracle=Blockwise(_share),
)

Benchmark(
    "linear_cross_entropy",
    name="linear_cross_entropy_without_gradients",
    sizes=((4096, 768, 30522), (512, 768, 30522)),
    memory_sizes=(),
    inputs=_inputs,
    traffic=lambda size, itemsize: (size[0] + size[2]) * size[1] * itemsize,
    flops=_products(1),
    needs=_needs(2),
    naive=_eager,
    peers={"pytorch": _pytorchs},
    step=_value,
    timed="forward alone",
)
