"""Masking and moving tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import as_scalar
from fastssl._checks import (
    check_device,
    check_holds,
    check_ids,
    check_lengths,
    check_memory,
    check_number,
    check_range,
    check_rows,
    check_same_device,
    check_share,
    check_size,
    check_tensor,
)
from fastssl._random import draw_seed
from fastssl.ops import current_backend, masking
from fastssl.ops._fake import mode_of

_ASPECT_RATIOS = 256  # of equal probability, between which a block's is drawn


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
    batch, length = check_size("batch", batch), check_size("length", length)
    keep = _visible(batch, length, mask_ratio)
    ids_keep, ids_restore, mask = masking.masking_ids(draw_seed(generator, device), batch, length, keep)
    return ids_keep, mask, ids_restore


def tube_masking_ids(
    batch: int,
    frames: int,
    length: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of each video stay: the same ones in every frame (tube masking; VideoMAE, arXiv:2203.12602).

    Args:
        batch: B, the number of videos.
        frames: T, the number of frames, or of groups of frames that share tokens.
        length: N, the number of tokens in each frame; those of a video are numbered frame by frame, L = T N.
        mask_ratio: the share that is masked, from 0 to 1: int(N (1 - mask_ratio)) of each frame stay.
        generator, device: as in `random_masking_ids`, whose masks are repeated here.

    Returns:
        ids_keep (B, L_keep), frame by frame, with the tokens of every frame in the same random order; mask (B, L) and
        ids_restore (B, L), as in `random_masking_ids`.

    Raises:
        TypeError: if mask_ratio is no number, or batch, frames or length no integer.
        ValueError: if mask_ratio is not from 0 to 1, or batch, frames or length is negative.
    """
    batch, frames, length = check_size("batch", batch), check_size("frames", frames), check_size("length", length)
    check_memory("frames", (batch, frames, length), 8)
    ids_keep, mask, ids_restore = random_masking_ids(batch, length, mask_ratio, generator=generator, device=device)
    keep = ids_keep.shape[1]
    frame = torch.arange(frames, device=ids_keep.device)[:, None]
    masked = ids_restore[:, None] >= keep
    before = torch.where(masked, (frames - 1) * keep + frame * (length - keep), frame * keep)
    return (
        (ids_keep[:, None] + frame * length).flatten(1),
        mask.repeat(1, frames),
        (ids_restore[:, None] + before).flatten(1),
    )


def span_masking_ids(
    batch: int,
    length: int,
    mask_ratio: float,
    span_length: int,
    *,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which time steps of each sequence stay, where spans are masked (wav2vec 2.0, arXiv:2006.11477; HuBERT,
    arXiv:2106.07447).

    The first steps of spans are drawn without replacement, all equally likely; spans have one length and may overlap.
    Spans are added until the required number of steps is masked; the last span is cut off where that number is reached.

    Args:
        batch: B, the number of sequences.
        length: L, the number of steps of each.
        mask_ratio: the share that is masked, overlaps counted once, from 0 to 1: int(L (1 - mask_ratio)) stay.
        span_length: M, the number of steps of a span, from 1 to L.
        lengths: (B,) int64 or int32, the steps of each sequence, from 0 to L, where what follows them is padding. Spans
            lie within them (a sequence shorter than M is one span), and mask that share of them; None: L.
        generator: as in `random_masking_ids`.
        device: of the result; None: that of lengths, or of the generator.

    Returns:
        ids_keep (B, L_keep) in ascending order; mask (B, L) and ids_restore (B, L), as in `random_masking_ids`. With
        lengths, all of a sequence's visible steps are in ids_keep, and then as much of the padding as makes up L_keep;
        mask is 0 in the padding.

    Raises:
        TypeError: if mask_ratio is no number, batch, length or span_length no integer, or lengths no tensor.
        ValueError: if mask_ratio is not from 0 to 1, batch or length is negative, span_length not from 1 to L, lengths
            not (B,) int64 or int32, or on the CPU, if one of them is not from 0 to L. On CUDA an assertion stops the
            process.
    """
    batch, length = check_size("batch", batch), check_size("length", length)
    span_length = check_size("span_length", span_length)
    if not 1 <= span_length <= length:
        raise ValueError(f"span_length must be from 1 to length, {length}, got {span_length}")
    keep = _visible(batch, length, mask_ratio)
    if lengths is not None:
        check_tensor("lengths", lengths)
        device = lengths.device if device is None else device
    seed = draw_seed(generator, device)
    if lengths is not None:
        check_lengths(lengths, batch, length, seed)
    _, turn, _ = masking.masking_ids(seed, batch, length - span_length + 1, 0)
    step = torch.arange(length, device=turn.device)
    if lengths is None:
        order = masking.first_turn(turn, span_length) * length + step
        ids_keep, ids_restore, mask = masking.ids_of(masking.smallest(order, length - keep), keep)
        return ids_keep, mask, ids_restore
    ends = lengths.to(device=turn.device, dtype=torch.int64)[:, None]
    turn = turn.where(step[: turn.shape[1]] <= (ends - span_length).clamp_min(0), turn.shape[1])
    order = (masking.first_turn(turn, span_length) * length + step).where(step < ends, (length + 1) * length + step)
    count = ends - (ends.double() * (1 - mask_ratio)).long()
    turns = order.sort(1).values.gather(1, (count - 1).clamp_min(0))
    masked = (order <= turns) & (count > 0)
    # As many in every row go without being kept: what is missing is taken from the end of the padding.
    ids_keep, ids_restore, _ = masking.ids_of(masked | (step >= keep + count), keep)
    return ids_keep, masked.float(), ids_restore


def block_masking_ids(
    batch: int,
    height: int,
    width: int,
    mask_ratio: float,
    *,
    min_block: int = 16,
    max_block: int | None = None,
    aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of each image stay, where rectangles are masked (BEiT, arXiv:2106.08254; iBOT, arXiv:2111.07832).

    A block's area is drawn uniformly between min_block and the number of tokens still to be masked, at most max_block;
    the logarithm of its aspect ratio uniformly; its place uniformly. A block is used if it masks some new tokens, and
    no more than that number. After ten blocks in a row that are not used, the rest are single tokens, drawn uniformly.

    The masks are drawn on the CPU and copied to the device; if the generator is on a GPU, the CPU waits for it.

    Args:
        batch: B, the number of images.
        height, width: of the grid of tokens, which are numbered row by row: L = height x width.
        mask_ratio: the share that is masked, from 0 to 1: int(L (1 - mask_ratio)) stay.
        min_block: the smallest area of a block, in tokens.
        max_block: the largest; None: no limit.
        aspect_ratio: the smallest and the largest ratio of height to width.
        generator, device: as in `random_masking_ids`.

    Returns:
        ids_keep (B, L_keep) in ascending order; mask (B, L) and ids_restore (B, L), as in `random_masking_ids`.

    Raises:
        TypeError: if mask_ratio is no number, aspect_ratio not two, or a size no integer.
        ValueError: if mask_ratio is not from 0 to 1, a size is negative, min_block not from 1 to max_block, or
            aspect_ratio not from 1/1000 to 1000 and in ascending order.
    """
    batch, height, width = check_size("batch", batch), check_size("height", height), check_size("width", width)
    min_block = check_size("min_block", min_block)
    length = height * width
    keep = _visible(batch, length, mask_ratio)
    if max_block is None:
        max_block = max(length, min_block)
    max_block = check_size("max_block", max_block)
    if not 1 <= min_block <= max_block:
        raise ValueError(f"min_block must be from 1 to max_block, {max_block}, got {min_block}")
    min_block, max_block = (min(size, max(length, 1)) for size in (min_block, max_block))
    if not isinstance(aspect_ratio, (tuple, list)) or len(aspect_ratio) != 2:
        raise TypeError(f"aspect_ratio must be two numbers, got {type(aspect_ratio).__name__}")
    low, high = (check_number("aspect_ratio", ratio) for ratio in aspect_ratio)
    if not 1e-3 <= low <= high <= 1e3:
        raise ValueError(f"aspect_ratio must be from 1/1000 to 1000, in ascending order, got {aspect_ratio}")
    step = (high / low) ** (1 / _ASPECT_RATIOS)
    ratios = [round(masking.ASPECT_ONE * low * step ** (i + 0.5)) for i in range(_ASPECT_RATIOS)]
    seed = draw_seed(generator, "cpu")
    triple = masking.block_masking_ids(seed, batch, height, width, keep, min_block, max_block, ratios)
    target = check_device(device) or (generator.device if generator is not None else "cpu")
    ids_keep, ids_restore, mask = (x.to(target, non_blocking=True) for x in triple)  # a GPU need not be waited for
    return ids_keep, mask, ids_restore


def _visible(batch: int, length: int, mask_ratio: float) -> int:
    """How many of each sample's tokens stay."""
    mask_ratio = check_share("mask_ratio", mask_ratio)
    if batch * length >= 1 << 62:
        raise ValueError(f"batch x length must be below 2^62, got {batch} x {length}")
    return int(length * (1 - mask_ratio))


def random_masking(
    x: Tensor, mask_ratio: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a random part of the tokens of each sample (MAE, arXiv:2111.06377).

    Args:
        x: (B, L, D) tokens; float32, bfloat16, float16 or float64.
        mask_ratio: the share that is masked, from 0 to 1: int(L (1 - mask_ratio)) stay.
        generator: the source of randomness; None: PyTorch's default one of the CPU. The same seed draws the same masks
            on every device. torch.compile cannot trace a generator.

    Returns:
        The triple of the paper's code: x_visible (B, L_keep, D), the tokens that stay, in random order; mask (B, L)
        float32, 1 where a token is masked, else 0; ids_restore (B, L) int64, for `restore_tokens`.

    Raises:
        TypeError: if x is no tensor, or mask_ratio no number.
        ValueError: if x's shape or dtype does not fit, or mask_ratio is not from 0 to 1.
    """
    check_rows("x", x, "(B, L, D)", 3)
    batch, length, _ = x.shape
    with mode_of(x):
        options = {"generator": generator, "device": x.device}
        ids_keep, mask, ids_restore = random_masking_ids(batch, length, mask_ratio, **options)
    return gather_tokens(x, ids_keep), mask, ids_restore


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """The tokens of each sample that `ids` names: out[b, k] = x[b, ids[b, k]].

    Args:
        x: (B, L, D) tokens; float32, bfloat16, float16 or float64.
        ids: (B, K) int64 or int32, from 0 to L - 1, in any order, repeated or not.

    Returns:
        (B, K, D) of x's dtype.

    Raises:
        TypeError: if x or ids is no tensor.
        ValueError: if shapes, dtypes or devices do not fit.
        IndexError: on the CPU, if one of ids is below 0 or above L - 1. On CUDA an assertion stops the process.
    """
    check_rows("x", x, "(B, L, D)", 3)
    check_ids("ids", ids, x, "x")
    if current_backend() == "reference":
        check_range("ids", ids, x.shape[1])
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
        IndexError: on the CPU, if one of ids is below 0 or above length - 1. On CUDA an assertion stops the
            process.
    """
    check_rows("tokens", tokens, "(B, K, D)", 3)
    check_ids("ids", ids, tokens)
    if ids.shape != tokens.shape[:2]:
        raise ValueError(f"ids must have shape {tuple(tokens.shape[:2])}, one for each token, got {tuple(ids.shape)}")
    length = check_size("length", length)
    check_memory("length", (tokens.shape[0], length, tokens.shape[2]), tokens.element_size())
    fill = _feature_row("fill", fill, tokens)
    if current_backend() == "reference":
        check_range("ids", ids, length)
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
        IndexError: on the CPU, if one of ids_restore is negative. On CUDA an assertion stops the process.
    """
    check_rows("x_visible", x_visible, "(B, L_keep, D)", 3)
    check_ids("ids_restore", ids_restore, x_visible, "x_visible")
    if current_backend() == "reference":
        check_range("ids_restore", ids_restore)
    length, dim = ids_restore.shape[1], x_visible.shape[2]
    mask_token = _feature_row("mask_token", mask_token, x_visible)
    if pos_embed is not None:
        _check_convertible("pos_embed", pos_embed, "x_visible", x_visible)
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
    if name == "fill" and not isinstance(value, Tensor):
        value = check_number(name, value, "a Tensor or a number")
        check_holds(name, value, value, tokens)
        return as_scalar(value, tokens).expand(dim)
    _check_convertible(name, value, "tokens", tokens)
    if value.numel() != dim:
        raise ValueError(f"{name} must have {dim} elements, one for each feature, got shape {tuple(value.shape)}")
    return value.reshape(dim)


def _check_convertible(name: str, x: Tensor, name_tokens: str, tokens: Tensor) -> None:
    """To tokens' dtype, where they are."""
    check_tensor(name, x)
    if x.is_complex():
        raise ValueError(f"{name} must be real, got {x.dtype}")
    check_same_device(name, x, name_tokens, tokens)
