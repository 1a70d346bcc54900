"""Patches of images, as masked autoencoders use them (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602), and losses on
the features of masked patches (data2vec, arXiv:2202.03555; EVA, arXiv:2211.07636): schemas, derivatives, portable code.

Images (B, C, H, W) are cut into L patches of sizes `patch` = [p, q], videos (B, C, T, H, W) of [t, p, q], numbered in
row-major order. With x = pred[b, l], and y the P elements of patch l of image b in the order (t, p, q, c), or D
features,

    masked_patch_loss     loss[b, l] = sum_i (x_i - y_i)^2 / P; the elements of y are first normalised, if norm is
                              "patch":    (y - mean) / sqrt(var + 1e-6), of all elements
                              "channel":  (y - mean) / (sqrt(var) + 1e-6), of each channel
    masked_feature_loss   loss[b, l] = sum_i f(x_i - y_i) / D; f of "mse": d^2; of "smooth_l1": d^2 / (2 beta), and
                              |d| - beta / 2 where |d| is not below beta
                          of "cosine":  1 - <x, y> / (|x| |y|), lengths being 1e-12 at least
    gather_patches        out[b, k] = patch ids[b, k] of image b, in the order (c, t, p, q) of a convolution's weight
    scatter_patches       image b = sum of patches[b, k] at ids[b, k], 0 where there is none

The losses are 0 where nothing is masked: what is there in pred and in images is not used. They have derivatives by pred
alone, which read the same inputs once more. gather_patches and scatter_patches are each other's derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype

_EPS = 1e-12  # of lengths, as in torch.nn.functional.normalize


def grid_of(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """The numbers of patches along each dimension of images of that size."""
    return tuple(n // p for n, p in zip(size[2:], patch, strict=True))


def _by_patches(images: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, *grid, C, *patch), a view."""
    dims = len(patch)
    for i, sizes in enumerate(zip(grid_of(images.shape, patch), patch, strict=True)):
        images = images.unflatten(2 + 2 * i, sizes)
    return images.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))


def _targets(images: Tensor, mask: Tensor, patch: Sequence[int], norm: str, dtype: torch.dtype) -> Tensor:
    """(N, P): the masked patches of images, normalised."""
    patches = _by_patches(images, patch)
    masked = patches[mask.view(mask.shape[0], *grid_of(images.shape, patch))].to(dtype)
    pixels = masked.movedim(1, -1).flatten(1, -2)  # (N, T, C)
    x = pixels if norm == "channel" else pixels.flatten(1)
    if norm != "none":
        x = x - x.mean(1, keepdim=True)
        var = x.square().sum(1, keepdim=True) / (x.shape[1] - 1)
        x = x / ((var + 1e-6).sqrt() if norm == "patch" else var.sqrt() + 1e-6)
    return x.flatten(1)


def _values(x: Tensor, y: Tensor, kind: str, beta: float) -> Tensor:
    """(N,): the loss of each row."""
    if kind == "mse":
        return (x - y).square().mean(1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(x, y, reduction="none", beta=beta).mean(1)
    return 1 - (F.normalize(x, dim=1, eps=_EPS) * F.normalize(y, dim=1, eps=_EPS)).sum(1)


def _gradients(x: Tensor, y: Tensor, kind: str, beta: float) -> Tensor:
    """(N, D): the gradient of each row's loss by x."""
    apart = x - y
    if kind == "mse":
        return apart * (2 / x.shape[1])
    if kind == "smooth_l1":
        slope = (apart / beta).clamp(-1, 1) if beta else apart.sign().where(apart == apart, apart)  # keeps a NaN
        return slope / x.shape[1]
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    unit_x, unit_y = x / length.clamp_min(_EPS), F.normalize(y, dim=1, eps=_EPS)
    along = (unit_x * unit_y).sum(1, keepdim=True) * (length >= _EPS)
    return (along * unit_x - unit_y) / length.clamp_min(_EPS)


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype of losses and sums."""
    return accumulate_dtype(torch.promote_types(x.dtype, y.dtype))


Target = Callable[[slice], Tensor]  # rows -> (N, D), the targets of what is masked there


def _losses(pred: Tensor, mask: Tensor, target: Target, kind: str, beta: float, dtype: torch.dtype) -> Tensor:
    out = pred.new_zeros(mask.shape, dtype=dtype)
    for rows in _blocks(pred):
        masked = mask[rows]
        out[rows][masked] = _values(pred[rows][masked].to(dtype), target(rows), kind, beta)
    return out


def _losses_backward(
    grad_losses: Tensor, pred: Tensor, mask: Tensor, target: Target, kind: str, beta: float, dtype: torch.dtype
) -> Tensor:
    grad_pred = pred.new_zeros(pred.shape)
    for rows in _blocks(pred):
        masked = mask[rows]
        gradients = _gradients(pred[rows][masked].to(dtype), target(rows), kind, beta)
        grad_pred[rows][masked] = (gradients * grad_losses[rows][masked][:, None]).to(pred.dtype)
    return grad_pred


def _losses_share(
    rows: slice, grad_losses: Tensor, pred: Tensor, mask: Tensor, target: Target, kind: str, beta: float
) -> Tensor:
    masked = mask[rows]
    return (grad_losses[rows][masked] * _values(pred[rows][masked], target(rows), kind, beta)).sum()


def _blocks(pred: Tensor) -> list[slice]:
    return row_blocks(pred.shape[0], math.prod(pred.shape[1:]))


def _losses_fake(pred: Tensor, other: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(mask.shape, dtype=_dtype(pred, other))


def _patch_targets(images: Tensor, mask: Tensor, patch: Sequence[int], norm: str, dtype: torch.dtype) -> Target:
    return lambda rows: _targets(images[rows], mask[rows], patch, norm, dtype)


def _masked_patch_loss(pred: Tensor, images: Tensor, mask: Tensor, patch: Sequence[int], norm: str) -> Tensor:
    dtype = _dtype(pred, images)
    return _losses(pred, mask, _patch_targets(images, mask, patch, norm, dtype), "mse", 0, dtype)


def _masked_patch_loss_backward(
    grad_losses: Tensor, pred: Tensor, images: Tensor, mask: Tensor, patch: Sequence[int], norm: str
) -> Tensor:
    dtype = _dtype(pred, images)
    return _losses_backward(grad_losses, pred, mask, _patch_targets(images, mask, patch, norm, dtype), "mse", 0, dtype)


def _masked_patch_loss_share(
    rows: slice, grad_losses: Tensor, pred: Tensor, images: Tensor, mask: Tensor, patch: Sequence[int], norm: str
) -> Tensor:
    target = _patch_targets(images, mask, patch, norm, grad_losses.dtype)
    return _losses_share(rows, grad_losses, pred, mask, target, "mse", 0)


masked_patch_loss = Op(
    "masked_patch_loss(Tensor pred, Tensor images, Tensor mask, int[] patch, str norm) -> Tensor losses",
    backward="(Tensor grad_losses, Tensor pred, Tensor images, Tensor mask, int[] patch, str norm) -> Tensor grad_pred",
    fake=_losses_fake,
    portable=(_masked_patch_loss, _masked_patch_loss_backward),
    share=_masked_patch_loss_share,
    blocks=_blocks,
)


def _feature_targets(target: Tensor, mask: Tensor, dtype: torch.dtype) -> Target:
    return lambda rows: target[rows][mask[rows]].to(dtype)


def _masked_feature_loss(pred: Tensor, target: Tensor, mask: Tensor, kind: str, beta: float) -> Tensor:
    dtype = _dtype(pred, target)
    return _losses(pred, mask, _feature_targets(target, mask, dtype), kind, beta, dtype)


def _masked_feature_loss_backward(
    grad_losses: Tensor, pred: Tensor, target: Tensor, mask: Tensor, kind: str, beta: float
) -> Tensor:
    dtype = _dtype(pred, target)
    return _losses_backward(grad_losses, pred, mask, _feature_targets(target, mask, dtype), kind, beta, dtype)


def _masked_feature_loss_share(
    rows: slice, grad_losses: Tensor, pred: Tensor, target: Tensor, mask: Tensor, kind: str, beta: float
) -> Tensor:
    targets = _feature_targets(target, mask, grad_losses.dtype)
    return _losses_share(rows, grad_losses, pred, mask, targets, kind, beta)


masked_feature_loss = Op(
    "masked_feature_loss(Tensor pred, Tensor target, Tensor mask, str kind, float beta) -> Tensor losses",
    backward="(Tensor grad_losses, Tensor pred, Tensor target, Tensor mask, str kind, float beta) -> Tensor grad_pred",
    fake=_losses_fake,
    portable=(_masked_feature_loss, _masked_feature_loss_backward),
    share=_masked_feature_loss_share,
    blocks=_blocks,
)


def _places(ids: Tensor, grid: Sequence[int]) -> Iterator[Tensor]:
    """Indices of the patches `ids` (B, K) among (B, *grid), beyond the grid where ids are out of range."""
    length = math.prod(grid)
    if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < length:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"ids_keep must be from 0 to below {length}, got {worst}")
    yield torch.arange(ids.shape[0], device=ids.device)[:, None]
    ids = ids.long().where(ids >= 0, length)
    for i in range(len(grid)):
        place = ids // math.prod(grid[i + 1 :])
        yield place % grid[i] if i else place


def _gather_patches_fake(images: Tensor, ids: Tensor, patch: Sequence[int]) -> Tensor:
    return images.new_empty((*ids.shape, images.shape[1] * math.prod(patch)))


def _gather_patches_portable(images: Tensor, ids: Tensor, patch: Sequence[int]) -> Tensor:
    places = tuple(_places(ids, grid_of(images.shape, patch)))
    return _by_patches(images, patch)[places].flatten(2)


def _scatter_patches_fake(patches: Tensor, ids: Tensor, size: Sequence[int], patch: Sequence[int]) -> Tensor:
    return patches.new_empty(size)


def _scatter_patches_portable(patches: Tensor, ids: Tensor, size: Sequence[int], patch: Sequence[int]) -> Tensor:
    sums = patches.new_zeros(size, dtype=accumulate_dtype(patches.dtype))
    places = tuple(_places(ids, grid_of(size, patch)))
    values = patches.to(sums.dtype).unflatten(2, (size[1], *patch))
    _by_patches(sums, patch).index_put_(places, values, accumulate=True)
    return sums.to(patches.dtype)


def _gather_patches_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    images, ids, ctx.patch = inputs
    ctx.save_for_backward(ids)
    ctx.size = images.shape


def _gather_patches_backward(ctx: Any, variant: str, grad: Tensor) -> tuple:
    scatter = getattr(scatter_patches, variant)
    return scatter(grad, *ctx.saved_tensors, ctx.size, ctx.patch), None, None


def _scatter_patches_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ids, _, ctx.patch = inputs
    ctx.save_for_backward(ids)


def _scatter_patches_backward(ctx: Any, variant: str, grad: Tensor) -> tuple:
    gather = getattr(gather_patches, variant)
    return gather(grad, *ctx.saved_tensors, ctx.patch), None, None, None


gather_patches = Op(
    "gather_patches(Tensor images, Tensor ids, int[] patch) -> Tensor",
    fake=_gather_patches_fake,
    portable=_gather_patches_portable,
    derivative=(_gather_patches_setup_context, _gather_patches_backward),
)
scatter_patches = Op(
    "scatter_patches(Tensor patches, Tensor ids, SymInt[] size, int[] patch) -> Tensor",
    fake=_scatter_patches_fake,
    portable=_scatter_patches_portable,
    derivative=(_scatter_patches_setup_context, _scatter_patches_backward),
)
