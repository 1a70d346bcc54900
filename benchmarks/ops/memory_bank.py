"""A queue of keys, against code like MoCo's (arXiv:1911.05722)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.registry import Benchmark, Inputs, Size, in_place


@torch.no_grad()
def _enqueue(keys: Tensor, position: Tensor, new_keys: Tensor, normalize: bool) -> None:
    """Up to the end, then on from the beginning. MoCo's keys are columns, which takes longer."""
    first, count = int(position), len(new_keys)
    entered, before_the_end = F.normalize(new_keys, dim=1), min(count, len(keys) - first)
    keys[first : first + before_the_end] = entered[:before_the_end]
    keys[: count - before_the_end] = entered[before_the_end:]
    position[()] = (first + count) % len(keys)


def _inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """A float32 queue, the place of its oldest key, and new ones."""
    keys, batch, dim = size
    generator = torch.Generator().manual_seed(0)
    queue, new_keys = (torch.randn(rows, dim, generator=generator) for rows in (keys, batch))
    return F.normalize(queue, dim=1), torch.tensor(0), new_keys.to(dtype)


Benchmark(
    "enqueue_",
    sizes=((65536, 256, 128), (65536, 4096, 256)),  # keys x new ones x features
    memory_sizes=(),
    inputs=_inputs,
    # New keys are read and written.
    traffic=lambda size, itemsize: size[1] * size[2] * (itemsize + 4),
    needs=lambda size, itemsize: {"naive": 4 * size[1] * size[2]},
    arguments={"normalize": True},
    naive=_enqueue,
    step=in_place,
    timed="one update",
    modes=("float32", "bfloat16"),
)
