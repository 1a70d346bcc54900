"""Corrupting text and drawing negatives, token by token: BERT (arXiv:1810.04805), T5 (arXiv:1910.10683), wav2vec 2.0
(arXiv:2006.11477)."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_tokens(
    input_ids: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    special_tokens_mask: Tensor | None = None,
    word_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A coin for each token or word; then a die for each token chosen."""
    chance = torch.rand(input_ids.shape)
    if word_ids is not None:
        for numbers, row in zip(
            word_ids.reshape(-1, input_ids.shape[-1]), chance.view(-1, input_ids.shape[-1]), strict=True
        ):
            for word in numbers.unique():
                row[numbers == word] = torch.rand(()) if word >= 0 else 1
    chosen = chance < probability
    if special_tokens_mask is not None:
        chosen &= special_tokens_mask == 0
    die = torch.rand(input_ids.shape)
    corrupted = input_ids.clone()
    replaced = chosen & (die < mask_share + random_share)
    corrupted[replaced] = torch.randint(vocab_size, input_ids.shape, dtype=input_ids.dtype)[replaced]
    corrupted[chosen & (die < mask_share)] = mask_token_id
    return corrupted, torch.where(chosen, input_ids.long(), -100)


def span_corruption(
    input_ids: Tensor,
    *,
    first_sentinel_id: int,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    lengths: Tensor | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: pieces of text and of what is cut out take turns."""
    length = input_ids.shape[1]
    ends = [length] * len(input_ids) if lengths is None else lengths.tolist()
    inputs, labels = [], []
    for row, end in zip(input_ids.tolist(), ends, strict=True):
        noise, spans = span_counts(end, noise_density, mean_span_length)
        kept, cut, position = [], [], 0
        sizes = zip(_partition(end - noise, spans), _partition(noise, spans), strict=True)
        for sentinel, (before, size) in zip(range(first_sentinel_id, -1, -1), sizes, strict=False):
            kept += [*row[position : position + before], sentinel]
            cut += [sentinel, *row[position + before : position + before + size]]
            position += before + size
        last = [] if eos_token_id is None else [eos_token_id]
        inputs.append([*kept, *row[position:end], *last])
        labels.append([*cut, *last])
    noise, spans = span_counts(length, noise_density, mean_span_length)
    more = spans + (eos_token_id is not None)
    return (
        _padded(inputs, length - noise + more, pad_token_id).to(input_ids.dtype),
        _padded(labels, noise + more, -100),
    )


def span_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """How many of a sequence's tokens are cut out, and in how many spans."""
    if length < 2:
        return 0, 0
    noise = min(max(int(length * noise_density + 0.5), 1), length - 1)
    return noise, min(max(int(noise / mean_span_length + 0.5), 1), noise, length - noise)


def _partition(count: int, pieces: int) -> list[int]:
    if pieces == 0:
        return []
    ends = [*sorted(1 + torch.randperm(count - 1)[: pieces - 1]), count]
    return [int(end - start) for start, end in zip([0, *ends], ends, strict=False)]


def _padded(rows: list[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)


def sample_negatives(batch: int, length: int, num_negatives: int, *, mask: Tensor | None = None) -> Tensor:
    """For each step, the others of its sequence in a random order, the first of them."""
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    ids = torch.full((batch, length, num_negatives), -1)
    for b, sequence in enumerate(mask):
        for step in sequence.nonzero()[:, 0]:
            others = sequence.nonzero()[:, 0]
            others = others[others != step]
            chosen = others[torch.randperm(len(others))][:num_negatives]
            ids[b, step, : len(chosen)] = b * length + chosen
    return ids
