"""Masking and moving tokens, as the code of masked autoencoders writes it (MAE, arXiv:2111.06377).

Masks are drawn sample by sample: tubes (VideoMAE, arXiv:2203.12602), spans (wav2vec 2.0, arXiv:2006.11477), blocks
(BEiT, arXiv:2106.08254).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Masking = tuple[Tensor, Tensor, Tensor]  # ids_keep, mask, ids_restore


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """out[b, k] = x[b, ids[b, k]]."""
    return torch.gather(x, 1, ids.long().unsqueeze(-1).repeat(1, 1, x.shape[2]))


def scatter_tokens(tokens: Tensor, ids: Tensor, length: int, fill: float | Tensor = 0.0) -> Tensor:
    """out[b, l] = the sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none."""
    place = ids.long().unsqueeze(-1).expand_as(tokens)
    sums = tokens.new_zeros(len(tokens), length, tokens.shape[2]).scatter_add(1, place, tokens)
    filled = torch.zeros_like(sums, dtype=torch.bool).scatter(1, place, True)
    return torch.where(filled, sums, fill)


def restore_tokens(
    x_visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None
) -> Tensor:
    """Mask tokens appended, all put in their places, the position embedding added."""
    batch, keep, dim = x_visible.shape
    length = ids_restore.shape[1]
    masked = mask_token.to(x_visible.dtype).reshape(1, 1, dim).repeat(batch, length, 1)
    tokens = gather_tokens(torch.cat([x_visible, masked], 1), ids_restore.clamp_max(keep))
    return tokens if pos_embed is None else tokens + pos_embed.to(tokens.dtype).reshape(length, dim)


def random_masking_ids(batch: int, length: int, mask_ratio: float) -> Masking:
    """MAE's: a random order of each sample's tokens, whose first stay."""
    ids_shuffle = torch.rand(batch, length).argsort(dim=1)
    return _masking(ids_shuffle, int(length * (1 - mask_ratio)))


def random_masking(x: Tensor, mask_ratio: float) -> Masking:
    """MAE's: the tokens that stay, mask, and the way back."""
    ids_keep, mask, ids_restore = random_masking_ids(x.shape[0], x.shape[1], mask_ratio)
    return gather_tokens(x, ids_keep), mask, ids_restore


def tube_masking_ids(batch: int, frames: int, length: int, mask_ratio: float) -> Masking:
    """One random order, of every frame; all frames' first stay."""
    order = torch.rand(batch, 1, length).argsort(dim=2) + torch.arange(frames)[:, None] * length  # (B, T, N)
    keep = int(length * (1 - mask_ratio))
    ids_shuffle = torch.cat([order[..., :keep].flatten(1), order[..., keep:].flatten(1)], 1)
    return _masking(ids_shuffle, frames * keep)


def span_masking_ids(batch: int, length: int, mask_ratio: float, span_length: int) -> Masking:
    """Spans at random places, until enough is masked."""
    keep = int(length * (1 - mask_ratio))
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in mask:
        for start in torch.randperm(length - span_length + 1).tolist():
            for i in range(start, start + span_length):
                row[i] |= row.sum() < length - keep
    return _masking(mask.int().argsort(dim=1, stable=True), keep)


def block_masking_ids(
    batch: int,
    height: int,
    width: int,
    mask_ratio: float,
    *,
    min_block: int = 16,
    max_block: int | None = None,
    aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Masking:
    """Rectangles at random places, until ten in a row do not fit; then single tokens."""
    length = height * width
    keep = int(length * (1 - mask_ratio))
    low, high = map(math.log, aspect_ratio)
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    for grid in mask:
        failures = 0
        while failures < 10 and (missing := length - keep - int(grid.sum())) > 0:
            largest = max(min(missing, max_block or length), min_block)
            area = min_block + (largest - min_block) * torch.rand(()).item()
            ratio = math.exp(low + (high - low) * torch.rand(()).item())
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            failures += 1
            if 0 < rows <= height and 0 < columns <= width:
                top = int(torch.randint(height - rows + 1, ()))
                left = int(torch.randint(width - columns + 1, ()))
                block = grid[top : top + rows, left : left + columns]
                if 0 < block.logical_not().sum() <= missing:
                    block.fill_(True)
                    failures = 0
        free = grid.view(-1).logical_not().nonzero()[:, 0]
        grid.view(-1)[free[torch.randperm(len(free))[: len(free) - keep]]] = True
    return _masking(mask.flatten(1).int().argsort(dim=1, stable=True), keep)


def _masking(ids_shuffle: Tensor, keep: int) -> Masking:
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :keep], (ids_restore >= keep).float(), ids_restore
