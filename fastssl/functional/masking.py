"""Masking and moving tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl import reference
from fastssl._checks import (
    check_ids,
    check_rows,
    check_share,
    check_size,
)
from fastssl.ops import current_backend, masking


def random_masking_ids(
    batch: int,
    length: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of each sample stay, drawn at random (MAE, arXiv:2111.06377).

    One seed is drawn from the generator; what follows from it is the same on every device.

    Args:
        batch: B, the number of samples.
        length: L, the number of tokens of each.
        mask_ratio: the share that is masked, from 0 to 1: int(L (1 - mask_ratio)) stay.
        generator: the source of randomness; None: PyTorch's default one of the CPU.
        device: of the result; None: the generator's.

    Returns:
        ids_keep (B, L_keep) int64, the tokens that stay, in random order; mask (B, L) float32, 1 where a token is
        masked, else 0; ids_restore (B, L) int64, the inverse of the permutation that begins with ids_keep.

    Raises:
        TypeError: if mask_ratio is no number, or batch or length no integer.
        ValueError: if mask_ratio is not from 0 to 1, or batch or length is negative.
    """
    check_size("batch", batch)
    check_size("length", length)
    check_share("mask_ratio", mask_ratio)
    if batch * length >= 1 << 62:
        raise ValueError(f"batch x length must be below 2^62, got {batch} x {length}")
    source = generator.device if generator is not None else "cpu"
    seed = torch.randint(1 << 62, (), generator=generator, device=source).to(device or source)
    ids_keep, ids_restore, mask = masking.masking_ids(seed, batch, length, int(length * (1 - mask_ratio)))
    return ids_keep, mask, ids_restore


def random_masking(
    x: Tensor, mask_ratio: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a random part of the tokens of each sample (MAE, arXiv:2111.06377).

    Args:
        x: (B, L, D) tokens; float32, bfloat16, float16 or float64.
        mask_ratio: the share that is masked, from 0 to 1: int(L (1 - mask_ratio)) stay.
        generator: the source of randomness; None: PyTorch's default one of the CPU. The same seed draws the same masks
            on every device. torch.compile cannot trace one.

    Returns:
        The triple of the paper's code: x_visible (B, L_keep, D), the tokens that stay, in random order; mask (B, L)
        float32, 1 where a token is masked, else 0; ids_restore (B, L) int64, for `restore_tokens`.

    Raises:
        TypeError: if x is no tensor, or mask_ratio no number.
        ValueError: if x's shape or dtype does not fit, or mask_ratio is not from 0 to 1.
    """
    check_rows("x", x, "(B, L, D)", 3)
    batch, length, _ = x.shape
    ids_keep, mask, ids_restore = random_masking_ids(batch, length, mask_ratio, generator=generator, device=x.device)
    return gather_tokens(x, ids_keep), mask, ids_restore


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """The tokens of each sample that are named: out[b, k] = x[b, ids[b, k]].

    Args:
        x: (B, L, D) tokens; float32, bfloat16, float16 or float64.
        ids: (B, K) int64 or int32, from 0 to L - 1, in any order, repeated or not.

    Returns:
        (B, K, D) of x's dtype.

    Raises:
        TypeError: if x or ids is no tensor.
        ValueError: if shapes, dtypes or devices do not fit.
        IndexError: on the CPU, if one of ids is below 0 or above L - 1. On CUDA PyTorch's assertion stops the process.
    """
    check_rows("x", x, "(B, L, D)", 3)
    check_ids("ids", ids, x)
    return _implementation("gather_tokens")(x, ids)


def scatter_tokens(tokens: Tensor, ids: Tensor, length: int, fill: float | Tensor = 0.0) -> Tensor:
    """Put tokens in their places: out[b, l] = the sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none.

    Args:
        tokens: (B, K, D); float32, bfloat16, float16 or float64.
        ids: (B, K) int64 or int32, from 0 to length - 1, in any order, repeated or not.
        length: L, the number of places.
        fill: for places that get no token: a number, or a tensor of D elements, which gets its gradient.

    Returns:
        (B, L, D) of tokens' dtype.

    Raises:
        TypeError: if tokens or ids is no tensor, or length no integer.
        ValueError: if shapes, dtypes or devices do not fit, or length is negative.
        IndexError: on the CPU, if one of ids is below 0 or above length - 1. On CUDA PyTorch's assertion stops the
            process.
    """
    check_rows("tokens", tokens, "(B, K, D)", 3)
    check_ids("ids", ids, tokens)
    if ids.shape != tokens.shape[:2]:
        raise ValueError(f"ids must have shape {tuple(tokens.shape[:2])}, one for each token, got {tuple(ids.shape)}")
    check_size("length", length)
    fill = _feature_row("fill", fill, tokens)
    return _implementation("scatter_tokens")(tokens, ids, length, fill)


def restore_tokens(
    x_visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None
) -> Tensor:
    """Undo `random_masking`, as MAE's decoder does (arXiv:2111.06377): tokens back in their places, mask tokens
    between them, and the position embedding added, in one pass.

    Args:
        x_visible: (B, L_keep, D) tokens; float32, bfloat16, float16 or float64.
        ids_restore: (B, L) int64 or int32: place l holds token ids_restore[b, l], and where that is L_keep or above the
            mask token.
        mask_token: D elements, of any shape, such as (1, 1, D).
        pos_embed: L D elements, of any shape, such as (1, L, D); None: none is added.

    Returns:
        (B, L, D) of x_visible's dtype, to which mask_token and pos_embed are converted.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if shapes, dtypes or devices do not fit.
        IndexError: on the CPU, if one of ids_restore is negative. On CUDA PyTorch's assertion stops the process.
    """
    check_rows("x_visible", x_visible, "(B, L_keep, D)", 3)
    check_ids("ids_restore", ids_restore, x_visible)
    length, dim = ids_restore.shape[1], x_visible.shape[2]
    mask_token = _feature_row("mask_token", mask_token, x_visible)
    if pos_embed is not None:
        if not isinstance(pos_embed, Tensor):
            raise TypeError(f"pos_embed must be a Tensor, got {type(pos_embed).__name__}")
        if pos_embed.device != x_visible.device:
            devices = f"{pos_embed.device} and {x_visible.device}"
            raise ValueError(f"pos_embed and x_visible must be on the same device, got {devices}")
        if pos_embed.numel() != length * dim:
            shape = tuple(pos_embed.shape)
            raise ValueError(f"pos_embed must have {length} x {dim} elements, a row for each place, got shape {shape}")
        pos_embed = pos_embed.reshape(length, dim)
    return _implementation("restore_tokens")(x_visible, ids_restore, mask_token, pos_embed)


def _implementation(name: str) -> Callable[..., Tensor]:
    """Of masking, in the backend that is chosen."""
    return getattr(reference.masking if current_backend() == "reference" else masking, name)


def _feature_row(name: str, value: float | Tensor, tokens: Tensor) -> Tensor:
    """(D,), from a number or a tensor of D elements."""
    dim = tokens.shape[2]
    if not isinstance(value, Tensor):
        if name != "fill" or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a Tensor{' or a number' * (name == 'fill')}, got {type(value).__name__}")
        return tokens.new_full((dim,), value)
    if value.numel() != dim:
        raise ValueError(f"{name} must have {dim} elements, one for each feature, got shape {tuple(value.shape)}")
    if value.device != tokens.device:
        raise ValueError(f"{name} and tokens must be on the same device, got {value.device} and {tokens.device}")
    return value.reshape(dim)
