"""Moving tokens about, as masked autoencoders do (MAE, arXiv:2111.06377): schemas, derivatives, portable code.

    masking_ids      which tokens of each sample stay: a random permutation, drawn from a seed by a hash, so that every
                     device draws the same one
    gather_tokens    out[b, k] = x[b, ids[b, k]]
    scatter_tokens   out[b, l] = sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none
    restore_tokens   out[b, l] = x_visible[b, ids_restore[b, l]], or the mask token where that is beyond the last,
                     plus pos_embed[l]

gather_tokens and scatter_tokens are each other's derivatives. They move memory and multiply nothing: B L D elements are
read once and written once.

The hash is SplitMix64's: each position's number, times an odd constant, added to the seed, is mixed by shifts and
multiplications. Its lowest bits give way to the position: numbers differ, and to sort them is to draw a permutation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.ops._op import Op

_STEP, _MIX1, _MIX2 = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _masking_ids_fake(seed: Tensor, batch: int, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = seed.new_empty((batch, length))
    return seed.new_empty((batch, keep)), ids, ids.new_empty((batch, length), dtype=torch.float32)


def _masking_ids_portable(seed: Tensor, batch: int, length: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    bits = max(length - 1, 0).bit_length()
    position = torch.arange(length, device=seed.device)
    x = seed + (torch.arange(batch * length, device=seed.device).view(batch, length) + 1) * _STEP
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    x = _shift(x ^ _shift(x, 31), 1)
    ids_shuffle = ((x >> bits << bits) | position).sort(1).values & ((1 << bits) - 1)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, position.expand(batch, length))
    return ids_shuffle[:, :keep].contiguous(), ids_restore, (ids_restore >= keep).float()


def _no_gradients(ctx: Any, _: None, *grads: Tensor) -> tuple[None, ...]:
    return None, None, None, None


def _mark_non_differentiable(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


masking_ids = Op(
    "masking_ids(Tensor seed, int batch, int length, int keep) -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)",
    fake=_masking_ids_fake,
    portable=_masking_ids_portable,
    setup_context=_mark_non_differentiable,
    backward=_no_gradients,
)


def _places(ids_restore: Tensor, keep: int) -> Tensor:
    """ids_restore, but `keep` where they are that or above."""
    if ids_restore.device.type == "cpu" and ids_restore.numel() and ids_restore.min() < 0:
        raise IndexError(f"ids_restore must not be negative, got {ids_restore.min()}")
    return ids_restore.clamp_max(keep)


def _rows_of(ids: Tensor, x: Tensor, length: int) -> Tensor:
    """ids (B, K), below length, as an index of (B, length, D) rows like x's."""
    if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < length:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"ids must be from 0 to below {length}, got {worst}")
    return ids.long()[:, :, None].expand(-1, -1, x.shape[2])


def _gather_tokens_fake(x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty((*ids.shape, x.shape[2]))


def _gather_tokens_portable(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, _rows_of(ids, x, x.shape[1]))


def _scatter_tokens_fake(tokens: Tensor, ids: Tensor, length: int, fill: Tensor) -> Tensor:
    return tokens.new_empty((ids.shape[0], length, tokens.shape[2]))


def _scatter_tokens_portable(tokens: Tensor, ids: Tensor, length: int, fill: Tensor) -> Tensor:
    batch, _, dim = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    sums = tokens.new_zeros((batch, length, dim), dtype=wide)
    sums.scatter_add_(1, _rows_of(ids, tokens, length), tokens.to(wide))
    return torch.where(_is_filled(ids, length), fill.to(wide), sums).to(tokens.dtype)


def _is_filled(ids: Tensor, length: int) -> Tensor:
    """(B, length, 1): where no token goes."""
    taken = torch.zeros((ids.shape[0], length), dtype=torch.bool, device=ids.device)
    return ~taken.scatter_(1, ids.long(), True)[:, :, None]


def _gather_tokens_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.length = x.shape[1]


def _gather_tokens_backward(ctx: Any, _: None, grad: Tensor) -> tuple:
    (ids,) = ctx.saved_tensors
    return scatter_tokens(grad, ids, ctx.length, grad.new_zeros(grad.shape[2])), None


def _scatter_tokens_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ids, ctx.length, fill = inputs
    ctx.save_for_backward(ids)
    ctx.fill = ctx.needs_input_grad[3]


def _scatter_tokens_backward(ctx: Any, _: None, grad: Tensor) -> tuple:
    (ids,) = ctx.saved_tensors
    filled = None
    if ctx.needs_input_grad[3]:
        filled = (grad * _is_filled(ids, ctx.length)).sum((0, 1))
    return gather_tokens(grad, ids), None, None, filled


gather_tokens = Op(
    "gather_tokens(Tensor x, Tensor ids) -> Tensor",
    fake=_gather_tokens_fake,
    portable=_gather_tokens_portable,
    setup_context=_gather_tokens_setup_context,
    backward=_gather_tokens_backward,
)
scatter_tokens = Op(
    "scatter_tokens(Tensor tokens, Tensor ids, int length, Tensor fill) -> Tensor",
    fake=_scatter_tokens_fake,
    portable=_scatter_tokens_portable,
    setup_context=_scatter_tokens_setup_context,
    backward=_scatter_tokens_backward,
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
    restored = torch.cat([x_visible, masked], 1).gather(1, _rows_of(_places(ids_restore, keep), x_visible, keep + 1))
    return restored if pos_embed is None else restored + pos_embed.to(restored.dtype)


def _restore_tokens_backward_fake(
    grad: Tensor, ids_restore: Tensor, keep: int, positions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, dim = grad.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (
        grad.new_empty((batch, keep, dim)),
        grad.new_empty((dim,), dtype=wide),
        grad.new_empty((length if positions else 0, dim), dtype=wide),
    )


def _restore_tokens_backward_portable(
    grad: Tensor, ids_restore: Tensor, keep: int, positions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    grads = grad.to(wide)
    sums = grads.new_zeros((grad.shape[0], keep + 1, grad.shape[2]))
    sums.scatter_add_(1, _rows_of(_places(ids_restore, keep), grad, keep + 1), grads)
    dpos = grads.sum(0) if positions else grads.new_empty((0, grad.shape[2]))
    return sums[:, :keep].to(grad.dtype).contiguous(), sums[:, keep].sum(0), dpos


def _restore_tokens_backward_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, ids_restore, ctx.keep, ctx.positions = inputs
    ctx.save_for_backward(ids_restore)


def _restore_tokens_double_backward(ctx: Any, _: None, dx: Tensor, dmask: Tensor, dpos: Tensor) -> tuple:
    (ids_restore,) = ctx.saved_tensors
    return restore_tokens(dx, ids_restore, dmask, dpos if ctx.positions else None), None, None, None


def _restore_tokens_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_visible, ids_restore, mask_token, pos_embed = inputs
    ctx.save_for_backward(ids_restore)
    ctx.keep, ctx.dtypes = x_visible.shape[1], (mask_token.dtype, pos_embed is not None and pos_embed.dtype)


def _restore_tokens_derivative(ctx: Any, backward_op: Any, grad: Tensor) -> tuple:
    (ids_restore,) = ctx.saved_tensors
    positions = ctx.needs_input_grad[3]
    dx, dmask, dpos = backward_op(grad, ids_restore, ctx.keep, positions)
    return dx, None, dmask.to(ctx.dtypes[0]), dpos.to(ctx.dtypes[1]) if positions else None


restore_tokens = Op(
    "restore_tokens(Tensor x_visible, Tensor ids_restore, Tensor mask_token, Tensor? pos_embed) -> Tensor",
    fake=_restore_tokens_fake,
    portable=_restore_tokens_portable,
    setup_context=_restore_tokens_setup_context,
    backward=_restore_tokens_derivative,
    backward_op=Op(
        "restore_tokens_backward(Tensor grad, Tensor ids_restore, int keep, bool positions)"
        " -> (Tensor dx, Tensor dmask, Tensor dpos)",
        fake=_restore_tokens_backward_fake,
        portable=_restore_tokens_backward_portable,
        setup_context=_restore_tokens_backward_setup_context,
        backward=_restore_tokens_double_backward,
    ),
)
