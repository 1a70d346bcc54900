"""Masking and moving tokens, as the code of masked autoencoders writes it (MAE, arXiv:2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """out[b, k] = x[b, ids[b, k]]."""
    return torch.gather(x, 1, ids.long().unsqueeze(-1).repeat(1, 1, x.shape[2]))


def scatter_tokens(tokens: Tensor, ids: Tensor, length: int, fill: Tensor) -> Tensor:
    """out[b, l] = the sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none."""
    goes = torch.nn.functional.one_hot(ids.long(), length).to(tokens.dtype)  # (B, K, L)
    empty = (goes.sum(1) == 0).to(tokens.dtype).unsqueeze(-1)
    return goes.transpose(1, 2) @ tokens + empty * fill


def restore_tokens(x_visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> Tensor:
    """Mask tokens appended, all put in their places, the position embedding added."""
    batch, keep, dim = x_visible.shape
    masked = mask_token.to(x_visible.dtype).reshape(1, 1, dim).repeat(batch, ids_restore.shape[1], 1)
    tokens = gather_tokens(torch.cat([x_visible, masked], 1), ids_restore.clamp_max(keep))
    return tokens if pos_embed is None else tokens + pos_embed.to(tokens.dtype)
