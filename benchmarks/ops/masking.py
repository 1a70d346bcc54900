"""Masking tokens and restoring them, against the code of masked autoencoders (MAE, arXiv:2111.06377; BEiT's blocks,
arXiv:2106.08254)."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from benchmarks.ops.registry import Benchmark, Inputs, Size, output_and_gradients, outputs
from fastssl import reference

MASK_RATIO = 0.75  # MAE's
MODES = ("float32", "bfloat16")


def _visible(length: int) -> int:
    return int(length * (1 - MASK_RATIO))


def _random_masking(x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise is sorted, and the order sorted again to undo it."""
    batch, length, dim = x.shape
    keep = int(length * (1 - mask_ratio))
    noise = torch.rand(batch, length, device=x.device)
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    visible = x.gather(1, ids_shuffle[:, :keep, None].repeat(1, 1, dim))
    mask = torch.ones(batch, length, device=x.device)
    mask[:, :keep] = 0
    return visible, mask.gather(1, ids_restore), ids_restore


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _settle(inputs: Inputs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tokens, with the visible ones back in their places; how many of each sample are masked; the sorted places."""
    x, (visible, mask, ids_restore) = inputs[0], results
    ids = ids_restore[:, :, None].expand(x.shape)
    places = torch.cat([visible, torch.zeros_like(x[:, visible.shape[1] :])], 1).gather(1, ids)
    return torch.where(mask[:, :, None] > 0, x, places), mask.sum(1), ids_restore.sort(1).values


def _random_masking_traffic(size: Size, itemsize: int) -> float:
    """Visible tokens are read and written; the mask in float32 and two places of 64 bits are written."""
    batch, length, dim = size
    keep = _visible(length)
    return batch * (2 * keep * dim * itemsize + length * (4 + 8) + keep * 8)


Benchmark(
    "random_masking",
    sizes=((256, 196, 768), (64, 196, 768)),  # samples x tokens x features: a ViT-B/16's encoder
    memory_sizes=(),
    inputs=lambda size, dtype: (_random(*size, dtype=dtype),),
    traffic=_random_masking_traffic,
    # The visible tokens, and an index of 64 bits for each of their elements.
    needs=lambda size, itemsize: dict.fromkeys(
        ("naive", "compile"), size[0] * _visible(size[1]) * size[2] * (itemsize + 8)
    ),
    arguments={"mask_ratio": MASK_RATIO},
    naive=_random_masking,
    step=outputs,
    timed="forward",
    settle=_settle,
    modes=MODES,
    kernel="gather_tokens",
)


def _restore_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """Visible tokens, mask token and position embedding, which require gradients; places; the output's gradient."""
    batch, length, dim = size
    ids_restore = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1)
    leaves = [
        _random(*shape, dtype=dtype, seed=i).requires_grad_()
        for i, shape in enumerate(((batch, _visible(length), dim), (1, 1, dim), (1, length, dim)))
    ]
    return leaves[0], ids_restore, *leaves[1:], _random(*size, dtype=dtype, seed=3)


def _restore_traffic(size: Size, itemsize: int) -> float:
    """Visible tokens are read and all are written; the gradient is read and that of visible tokens written; the
    places are read twice."""
    batch, length, dim = size
    return batch * (2 * (_visible(length) + length) * dim * itemsize + 2 * length * 8)


Benchmark(
    "restore_tokens",
    sizes=((256, 196, 512), (64, 196, 512)),  # samples x tokens x features: MAE's decoder
    memory_sizes=(),
    inputs=_restore_inputs,
    traffic=_restore_traffic,
    # By the number of tensors of all tokens alive at once; an index has 64 bits for each element.
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), size[0] * size[1] * size[2] * (4 * itemsize + 8)),
    naive=reference.masking.restore_tokens,
    step=output_and_gradients,
    timed="forward + backward",
    modes=MODES,
)


def _scatter_tokens(tokens: Tensor, ids: Tensor, length: int, fill: Tensor) -> Tensor:
    """The mask token everywhere, and the tokens written over it: right where no place is named twice."""
    batch, _, dim = tokens.shape
    places = ids[:, :, None].expand(tokens.shape)
    return fill.to(tokens.dtype).expand(batch, length, dim).scatter(1, places, tokens)


def _scatter_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """Visible tokens and the mask token, which require gradients; their places; the output's gradient."""
    batch, length, dim = size
    ids = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1)[:, : _visible(length)]
    tokens = _random(batch, _visible(length), dim, dtype=dtype).requires_grad_()
    fill = _random(dim, dtype=dtype, seed=1).requires_grad_()
    return tokens, ids, length, fill, _random(*size, dtype=dtype, seed=3)


def _scatter_traffic(size: Size, itemsize: int) -> float:
    """Visible tokens are read and all are written; the gradient is read and that of visible tokens written; the
    places are read twice."""
    batch, length, dim = size
    return batch * 2 * ((_visible(length) + length) * dim * itemsize + _visible(length) * 8)


Benchmark(
    "scatter_tokens",
    sizes=((256, 196, 512), (64, 196, 512)),  # samples x tokens x features
    memory_sizes=(),
    inputs=_scatter_inputs,
    traffic=_scatter_traffic,
    # The output, and its gradient without the visible tokens.
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), size[0] * size[1] * size[2] * 3 * itemsize),
    naive=_scatter_tokens,
    step=output_and_gradients,
    timed="forward + backward",
    modes=MODES,
)


def _block_masking_ids(
    batch: int, height: int, width: int, mask_ratio: float, min_block: int = 16, aspect: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """A loop over the samples of a batch, as BEiT's loader runs it, in Python's numbers; then sorted as MAE does."""
    length = height * width
    keep = int(length * (1 - mask_ratio))
    masks = np.zeros((batch, height, width), dtype=np.int64)
    for grid in masks:
        missing, failures = length - keep, 0
        while missing and failures < 10:
            failures += 1
            area = random.uniform(min_block, max(missing, min_block))
            ratio = math.exp(random.uniform(math.log(aspect), -math.log(aspect)))
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = random.randint(0, height - rows), random.randint(0, width - columns)
                block = grid[top : top + rows, left : left + columns]
                new = block.size - int(block.sum())
                if 0 < new <= missing:
                    block[:] = 1
                    missing, failures = missing - new, 0
        free = np.flatnonzero(grid == 0)
        grid.reshape(-1)[np.random.permutation(free)[:missing]] = 1
    ids_shuffle = torch.from_numpy(masks).flatten(1).argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :keep], (ids_restore >= keep).float(), ids_restore


def _settle_ids(inputs: Inputs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """How many of each sample are masked; of the kept, that they are not, and their places; the sorted places."""
    ids_keep, mask, ids_restore = results
    return mask.sum(1), 1 - mask.gather(1, ids_keep), ids_restore.gather(1, ids_keep), ids_restore.sort(1).values


Benchmark(
    "block_masking_ids",
    sizes=((256, 14, 14), (64, 14, 14)),  # samples x rows x columns of patches
    memory_sizes=(),
    inputs=lambda size, dtype: size,
    # The mask in float32 and places of 64 bits are written.
    traffic=lambda size, itemsize: size[0] * (size[1] * size[2] * (4 + 8) + int(size[1] * size[2] * 0.6) * 8),
    needs=lambda size, itemsize: {"naive": 4 * size[0] * size[1] * size[2] * 8},  # a loop is nothing to compile
    arguments={"mask_ratio": 0.4},  # BEiT's
    naive=_block_masking_ids,
    step=outputs,
    timed="forward",
    settle=_settle_ids,
    modes=("float32",),
)
