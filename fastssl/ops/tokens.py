"""Corrupting text, and drawing negatives: schemas, fake kernels, portable code.

    mask_tokens        BERT's corruption (arXiv:1810.04805): which tokens are to be predicted, and what stands there
    sample_negatives   for each step of a sequence, other steps of it, no two alike (wav2vec 2.0, arXiv:2006.11477)

Both are drawn from a seed by position (`_random.py`), so that every device draws the same. Probabilities are integers:
p becomes p 2^62, and something happens where half of a 63-bit number is below that.

Negatives are drawn by Floyd's algorithm: of n steps, for i = n - k, ..., n - 1, a number t_i up to i, or i itself where
that number was drawn before. All sets of k are as likely. A kernel does that step by step. Portable code draws all t_i
at once. One was drawn before if it is equal to an earlier t, or if it is an earlier i, say j, whose t_j was itself
drawn before, so that j stands there. Following these references to their ends takes log2(k) rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._random import numbers, numbers_at, seeds

ONE = 1 << 62  # the probability 1
IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index


def _mask_tokens_fake(
    seed: Tensor,
    input_ids: Tensor,
    special_tokens_mask: Tensor | None,
    word_ids: Tensor | None,
    chosen: int,
    masked: int,
    replaced: int,
    mask_token_id: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    return input_ids.new_empty(input_ids.shape), input_ids.new_empty(input_ids.shape, dtype=torch.int64)


def _mask_tokens_portable(
    seed: Tensor,
    input_ids: Tensor,
    special_tokens_mask: Tensor | None,
    word_ids: Tensor | None,
    chosen: int,
    masked: int,
    replaced: int,
    mask_token_id: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    rows, length = input_ids.shape
    if word_ids is None:
        chance = numbers(seed, 0, rows * length).view(rows, length)
    else:
        chance = numbers_at(seeds(seed, torch.arange(rows, device=seed.device)[:, None]), word_ids)
    taken = (chance >> 1) < chosen
    if word_ids is not None:
        taken = taken & (word_ids >= 0)
    if special_tokens_mask is not None:
        taken = taken & ~special_tokens_mask
    fate = numbers(seed, rows * length, rows * length).view(rows, length)
    token = numbers_at(fate, torch.zeros_like(fate)) % vocab_size
    fate = fate >> 1
    corrupted = torch.where(fate < replaced, token, input_ids.long())
    corrupted = torch.where(fate < masked, mask_token_id, corrupted)
    corrupted = torch.where(taken, corrupted, input_ids.long()).to(input_ids.dtype)
    return corrupted.contiguous(), torch.where(taken, input_ids.long(), IGNORED).contiguous()


mask_tokens = Op(
    "mask_tokens(Tensor seed, Tensor input_ids, Tensor? special_tokens_mask, Tensor? word_ids, int chosen, int masked,"
    " int replaced, int mask_token_id, int vocab_size) -> (Tensor corrupted, Tensor labels)",
    fake=_mask_tokens_fake,
    portable=_mask_tokens_portable,
)


def _sample_negatives_fake(seed: Tensor, mask: Tensor | None, batch: int, length: int, count: int) -> Tensor:
    return seed.new_empty((batch, length, count))


def _sample_negatives_portable(seed: Tensor, mask: Tensor | None, batch: int, length: int, count: int) -> Tensor:
    steps = torch.arange(length, device=seed.device).expand(batch, length)
    if batch * length * count == 0:
        return seed.new_empty((batch, length, count))
    if mask is None:
        mask = torch.ones_like(steps, dtype=torch.bool)
    rank = mask.cumsum(1) - 1
    # The steps of the mask in their order; the others are written behind them.
    order = steps.new_empty((batch, length + 1)).scatter_(1, torch.where(mask, rank, length), steps)
    others = torch.where(mask, mask.sum(1, keepdim=True) - 1, 0)[:, :, None]
    column = torch.arange(count, device=seed.device)
    wanted = others.clamp_max(count)
    draw = numbers(seed, 0, batch * length * count).view(batch, length, count)
    draw = (draw >> 31) * (others - wanted + column + 1) >> 32
    values, places = draw.sort(stable=True, dim=2)
    equal = torch.nn.functional.pad(values[:, :, 1:] == values[:, :, :-1], (1, 0))
    again = torch.empty_like(equal).scatter_(2, places, equal)
    earlier = draw - (others - wanted)  # the column whose own number this is
    earlier = torch.where((earlier >= 0) & (earlier < column), earlier, column)
    for _ in range((count - 1).bit_length()):
        again, earlier = again | again.gather(2, earlier), earlier.gather(2, earlier)
    draw = torch.where(again, others - wanted + column, draw)
    draw = draw + (draw >= rank[:, :, None])  # the step itself is left out
    valid = column < wanted
    ids = order.gather(1, draw.where(valid, 0).flatten(1)).view_as(draw)
    first = torch.arange(batch, device=seed.device)[:, None, None] * length
    return torch.where(valid, ids + first, -1).contiguous()


sample_negatives = Op(
    "sample_negatives(Tensor seed, Tensor? mask, SymInt batch, SymInt length, SymInt count) -> Tensor ids",
    fake=_sample_negatives_fake,
    portable=_sample_negatives_portable,
)
