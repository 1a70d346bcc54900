"""Corrupting text and drawing negatives, against the code of their papers: BERT's and T5's collators, wav2vec 2.0."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.ops.registry import Benchmark, Inputs, Size, outputs

_VOCABULARY, _MASK, _SENTINEL = 30522, 103, 30521


def _text(size: Size, dtype: torch.dtype) -> Inputs:
    return (torch.randint(1000, 30000, size, generator=torch.Generator().manual_seed(0)),)


def _mask_tokens(input_ids: Tensor, mask_token_id: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """As a collator of BERT's does it: three rounds of coins, each over all tokens."""
    chosen = torch.bernoulli(torch.full(input_ids.shape, 0.15, device=input_ids.device)).bool()
    labels = input_ids.masked_fill(~chosen, -100)
    masked = torch.bernoulli(torch.full(input_ids.shape, 0.8, device=input_ids.device)).bool() & chosen
    corrupted = input_ids.masked_fill(masked, mask_token_id)
    random = torch.bernoulli(torch.full(input_ids.shape, 0.5, device=input_ids.device)).bool() & chosen & ~masked
    return torch.where(random, torch.randint(vocab_size, input_ids.shape, device=input_ids.device), corrupted), labels


Benchmark(
    "mask_tokens",
    sizes=((256, 128), (64, 512)),  # sequences x tokens
    memory_sizes=(),
    inputs=_text,
    # Tokens are read; corrupted ones and labels are written.
    traffic=lambda size, itemsize: 3 * 8 * size[0] * size[1],
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), 6 * 8 * size[0] * size[1]),
    arguments={"mask_token_id": _MASK, "vocab_size": _VOCABULARY},
    naive=_mask_tokens,
    step=outputs,
    timed="forward",
    # What was there, wherever it stands now.
    settle=lambda inputs, results: (torch.where(results[1] == -100, *results),),
    modes=("float32",),
)


def _span_corruption(input_ids: Tensor, first_sentinel_id: int) -> tuple[Tensor, Tensor]:
    """A loop over the sequences, as T5's preprocessing, in numpy."""
    batch, length = input_ids.shape
    noise = min(max(round(length * 0.15), 1), length - 1)
    spans = min(max(round(noise / 3), 1), noise, length - noise)

    def pieces(count: int) -> np.ndarray:
        return np.diff(np.concatenate([[0], 1 + np.sort(np.random.permutation(count - 1)[: spans - 1]), [count]]))

    inputs, labels = np.empty((batch, length - noise + spans), np.int64), np.empty((batch, noise + spans), np.int64)
    sentinels = first_sentinel_id - np.arange(spans)
    for row, left, cut in zip(input_ids.cpu().numpy(), inputs, labels, strict=True):
        ends = np.stack([pieces(length - noise), pieces(noise)], 1).reshape(-1).cumsum()
        parts = np.split(row, ends[:-1])
        left[:] = np.concatenate([x for s, part in zip(sentinels, parts[::2], strict=True) for x in (part, [s])])
        cut[:] = np.concatenate([x for s, part in zip(sentinels, parts[1::2], strict=True) for x in ([s], part)])
    return torch.from_numpy(inputs).to(input_ids.device), torch.from_numpy(labels).to(input_ids.device)


def _all_tokens(inputs: Inputs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sorted tokens of each sequence, sentinels twice."""
    return (torch.cat(results, 1).sort(1).values,)


Benchmark(
    "span_corruption",
    sizes=((128, 512),),  # sequences x tokens
    memory_sizes=(),
    inputs=_text,
    traffic=lambda size, itemsize: 2 * 8 * size[0] * size[1],  # tokens are read and written
    needs=lambda size, itemsize: {"naive": 4 * 8 * size[0] * size[1]},  # a loop is nothing to compile
    arguments={"first_sentinel_id": _SENTINEL},
    naive=_span_corruption,
    step=outputs,
    timed="forward",
    settle=_all_tokens,
    modes=("float32",),
)


def _sample_negatives(batch: int, length: int, num_negatives: int) -> Tensor:
    """With replacement, as wav2vec 2.0's code: the loop over sequences is numpy's."""
    own, ids = np.arange(length)[:, None], np.empty((batch, length, num_negatives), np.int64)
    for b in range(batch):
        drawn = np.random.randint(0, length - 1, (length, num_negatives))
        ids[b] = drawn + (drawn >= own) + b * length
    return torch.from_numpy(ids)


def _settle_negatives(inputs: Inputs, results: Tensor) -> tuple[Tensor, ...]:
    """The sequence of each, and whether it is not the step itself."""
    batch, length, _ = inputs
    return results // length, results != torch.arange(batch * length, device=results.device).view(batch, length, 1)


Benchmark(
    "sample_negatives",
    sizes=((8, 256, 100), (8, 750, 100)),  # sequences x steps x negatives
    memory_sizes=(),
    inputs=lambda size, dtype: size,
    traffic=lambda size, itemsize: 8 * size[0] * size[1] * size[2],  # ids are written
    needs=lambda size, itemsize: {"naive": 4 * 8 * size[0] * size[1] * size[2]},
    naive=_sample_negatives,
    step=outputs,
    timed="forward",
    settle=_settle_negatives,
    modes=("float32",),
)
