"""Moving tokens about, as masked autoencoders do (MAE, arXiv:2111.06377): schemas, derivatives, portable code.

    masking_ids      which tokens of each sample stay: a random permutation, drawn from a seed by a hash, so that every
                     device draws the same one
    block_masking_ids  the same where rectangles of tokens are masked
    gather_tokens    out[b, k] = x[b, ids[b, k]]
    scatter_tokens   out[b, l] = sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none
    restore_tokens   out[b, l] = x_visible[b, ids_restore[b, l]], or the mask token where that is beyond the last,
                     plus pos_embed[l]

gather_tokens and scatter_tokens are each other's derivatives. They move memory and multiply nothing: B L D elements are
read once and written once.

The lowest bits of each position's random number (`_random.py`) are replaced by the position: so all numbers differ, and
sorting them draws a permutation. Blocks are drawn one after another, as many as it takes; each sample hashes the
numbers of a seed of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import add_rows_
from fastssl.ops._random import numbers, seeds

ATTEMPTS = 10  # as in BEiT: after so many blocks in a row that do not fit, a sample gets no more
ASPECT_ONE = 1 << 16  # an aspect ratio of 1, of block_masking_ids


def _distinct(random: Tensor) -> Tensor:
    """Their lowest bits replaced by their position in the last dimension."""
    length = random.shape[-1]
    bits = max(length - 1, 0).bit_length()
    return (random >> bits << bits) | torch.arange(length, device=random.device)


def _masking_ids_fake(seed: Tensor, batch: int, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = seed.new_empty((batch, length))
    return seed.new_empty((batch, keep)), ids, ids.new_empty((batch, length), dtype=torch.float32)


def _masking_ids_portable(seed: Tensor, batch: int, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = _distinct(numbers(seed, 0, batch * length).view(batch, length)).sort(1).indices
    ids_restore = _inverse(ids_shuffle)
    return ids_shuffle[:, :keep].contiguous(), ids_restore, (ids_restore >= keep).float()


def _inverse(permutation: Tensor) -> Tensor:
    position = torch.arange(permutation.shape[1], device=permutation.device)
    return torch.empty_like(permutation).scatter_(1, permutation, position.expand_as(permutation))


def ids_of(masked: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep, ids_restore and mask of masked tokens, (B, L) bool, of which `keep` in each row are not: in ascending
    order, visible ones and masked ones."""
    ids_restore = torch.where(masked, keep + masked.cumsum(1), (~masked).cumsum(1)) - 1
    return _inverse(ids_restore)[:, :keep].contiguous(), ids_restore, masked.float()


def first_turn(turn: Tensor, span_length: int) -> Tensor:
    """(B, L): the smallest turn of the spans that cover a step, from those of all spans, (B, L - span_length + 1)."""
    turn = torch.nn.functional.pad(turn, (span_length - 1, span_length - 1), value=turn.shape[1])
    covered = 1  # spans, from the one at a place on
    while covered < span_length:
        more = min(covered, span_length - covered)
        turn = torch.minimum(turn[:, : turn.shape[1] - more], turn[:, more:])
        covered += more
    return turn


def smallest(order: Tensor, count: int) -> Tensor:
    """(B, L) bool: which are the `count` smallest of each row, whose numbers differ."""
    if count == 0 or order.numel() == 0:
        return torch.zeros_like(order, dtype=torch.bool)
    # Not kthvalue, which CUDA refuses under use_deterministic_algorithms, for the sake of indices.
    return order <= order.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


def _block_masking_ids_fake(
    seed: Tensor, batch: int, height: int, width: int, keep: int, low: int, high: int, aspect_ratios: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _masking_ids_fake(seed, batch, height * width, keep)


def _block_masking_ids_portable(
    seed: Tensor, batch: int, height: int, width: int, keep: int, low: int, high: int, aspect_ratios: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    length, target = height * width, height * width - keep
    own = seeds(seed, torch.arange(batch, device=seed.device)[:, None])
    ratios = torch.tensor(aspect_ratios, device=seed.device)
    rows, columns = torch.arange(height, device=seed.device), torch.arange(width, device=seed.device)
    masked = torch.zeros((batch, height, width), dtype=torch.bool, device=seed.device)
    failures = torch.zeros((batch, 1), dtype=torch.int64, device=seed.device)
    attempt = 0
    while True:
        left = target - masked.sum((1, 2)).unsqueeze(1)
        active = (left > 0) & (failures < ATTEMPTS)
        if not active.any():
            break
        area, aspect, top, side = numbers(own, length + 4 * attempt, 4).split(1, 1)
        attempt += 1
        most = left.clamp_max(high)
        fewest = most.clamp_max(low)
        area = fewest + area % (most.clamp_min(low) - fewest + 1)
        ratio = ratios[aspect % len(ratios)]
        h = (area * ratio).double().div(ASPECT_ONE).sqrt().add(0.5).long()
        w = (area * ASPECT_ONE).double().div(ratio).sqrt().add(0.5).long()
        fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
        h, w = h.where(fits, 1), w.where(fits, 1)
        top, side = top % (height - h + 1), side % (width - w + 1)
        block = ((rows >= top) & (rows < top + h))[:, :, None] & ((columns >= side) & (columns < side + w))[:, None]
        added = (block & ~masked).sum((1, 2)).unsqueeze(1)
        taken = active & fits & (added > 0) & (added <= most)
        masked |= block & taken[:, :, None]
        failures = (failures + 1).where(~taken, 0)
    first, then = torch.arange(-length, 0, device=seed.device), _distinct(numbers(own, 0, length))
    return ids_of(smallest(torch.where(masked.flatten(1), first, then), target), keep)


masking_ids = Op(
    "masking_ids(Tensor seed, SymInt batch, SymInt length, SymInt keep)"
    " -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)",
    fake=_masking_ids_fake,
    portable=_masking_ids_portable,
)


block_masking_ids = Op(
    "block_masking_ids(Tensor seed, SymInt batch, int height, int width, int keep, int low, int high,"
    " int[] aspect_ratios) -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)",
    fake=_block_masking_ids_fake,
    portable=_block_masking_ids_portable,
)


def _places(ids_restore: Tensor, keep: int) -> Tensor:
    """ids_restore, but `keep` where they are that or above."""
    if ids_restore.device.type == "cpu" and ids_restore.numel() and ids_restore.min() < 0:
        raise IndexError(f"ids_restore must not be negative, got {ids_restore.min()}")
    return ids_restore.clamp_max(keep)


def _check_range(ids: Tensor, length: int) -> None:
    if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < length:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"ids must be from 0 to below {length}, got {worst}")


def _take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Those of x (B, L, D) that ids (B, K) name."""
    _check_range(ids, x.shape[1])
    return x.gather(1, ids.long()[:, :, None].expand(-1, -1, x.shape[2]))


def _add_tokens_(sums: Tensor, ids: Tensor, tokens: Tensor) -> None:
    """Adds tokens (B, K, D) to those of sums (B, L, D) that ids (B, K) name."""
    batch, length, _ = sums.shape
    _check_range(ids, length)
    first = length * torch.arange(batch, device=ids.device)[:, None]
    add_rows_(sums.flatten(0, 1), (ids + first).flatten(), tokens.flatten(0, 1))


def _gather_tokens_fake(x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty((*ids.shape, x.shape[2]))


def _gather_tokens_portable(x: Tensor, ids: Tensor) -> Tensor:
    return _take_tokens(x, ids)


def _scatter_tokens_fake(tokens: Tensor, ids: Tensor, length: int, fill: Tensor) -> Tensor:
    return tokens.new_empty((ids.shape[0], length, tokens.shape[2]))


def _scatter_tokens_portable(tokens: Tensor, ids: Tensor, length: int, fill: Tensor) -> Tensor:
    batch, _, dim = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    sums = tokens.new_zeros((batch, length, dim), dtype=wide)
    _add_tokens_(sums, ids, tokens.to(wide))
    return torch.where(_is_filled(ids, length), fill.to(wide), sums).to(tokens.dtype)


def _is_filled(ids: Tensor, length: int) -> Tensor:
    """(B, length, 1): where no token goes."""
    taken = torch.zeros((ids.shape[0], length), dtype=torch.bool, device=ids.device)
    return ~taken.scatter_(1, ids.long(), True)[:, :, None]


def _gather_tokens_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.length = x.shape[1]


def _gather_tokens_backward(ctx: Any, variant: str, grad: Tensor) -> tuple:
    (ids,) = ctx.saved_tensors
    scatter = getattr(scatter_tokens, variant)
    return scatter(grad, ids, ctx.length, grad.new_zeros(grad.shape[2])), None


def _scatter_tokens_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ids, ctx.length, fill = inputs
    ctx.save_for_backward(ids)
    ctx.dtype = fill.dtype


def _scatter_tokens_backward(ctx: Any, variant: str, grad: Tensor) -> tuple:
    (ids,) = ctx.saved_tensors
    filled = None
    if ctx.needs_input_grad[3]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        filled = (grad * _is_filled(ids, ctx.length)).sum((0, 1), dtype=wide).to(ctx.dtype)
    return getattr(gather_tokens, variant)(grad, ids), None, None, filled


gather_tokens = Op(
    "gather_tokens(Tensor x, Tensor ids) -> Tensor",
    fake=_gather_tokens_fake,
    portable=_gather_tokens_portable,
    derivative=(_gather_tokens_setup_context, _gather_tokens_backward),
)
scatter_tokens = Op(
    "scatter_tokens(Tensor tokens, Tensor ids, int length, Tensor fill) -> Tensor",
    fake=_scatter_tokens_fake,
    portable=_scatter_tokens_portable,
    derivative=(_scatter_tokens_setup_context, _scatter_tokens_backward),
)


def _restore_tokens_fake(
    x_visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None
) -> Tensor:
    return x_visible.new_empty((*ids_restore.shape, x_visible.shape[2]))


def _restore_tokens_portable(
    x_visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None
) -> Tensor:
    batch, keep, dim = x_visible.shape
    masked = mask_token.to(x_visible.dtype).expand(batch, 1, dim)
    restored = _take_tokens(torch.cat([x_visible, masked], 1), _places(ids_restore, keep))
    return restored if pos_embed is None else restored + pos_embed.to(restored.dtype)


def _restore_tokens_backward_fake(
    grad_tokens: Tensor, ids_restore: Tensor, size_x_visible: Sequence[int], needs_pos_embed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, length, dim = grad_tokens.shape
    wide = torch.promote_types(grad_tokens.dtype, torch.float32)
    return (
        grad_tokens.new_empty(size_x_visible),
        grad_tokens.new_empty((dim,), dtype=wide),
        grad_tokens.new_empty((length if needs_pos_embed else 0, dim), dtype=wide),
    )


def _restore_tokens_backward(
    grad_tokens: Tensor, ids_restore: Tensor, size_x_visible: Sequence[int], needs_pos_embed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, keep, dim = size_x_visible
    wide = torch.promote_types(grad_tokens.dtype, torch.float32)
    grads = grad_tokens.to(wide)
    sums = grads.new_zeros((batch, keep + 1, dim))
    _add_tokens_(sums, _places(ids_restore, keep), grads)
    grad_pos_embed = grads.sum(0) if needs_pos_embed else grads.new_empty((0, dim))
    return sums[:, :keep].to(grad_tokens.dtype).contiguous(), sums[:, keep].sum(0), grad_pos_embed


restore_tokens = Op(
    "restore_tokens(Tensor x_visible, Tensor ids_restore, Tensor mask_token, Tensor? pos_embed) -> Tensor tokens",
    backward="(Tensor grad_tokens, Tensor ids_restore, SymInt[] size_x_visible, bool needs_pos_embed)"
    " -> (Tensor grad_x_visible, Tensor grad_mask_token, Tensor grad_pos_embed)",
    fake=(_restore_tokens_fake, _restore_tokens_backward_fake),
    portable=(_restore_tokens_portable, _restore_tokens_backward),
    linear=True,
)
