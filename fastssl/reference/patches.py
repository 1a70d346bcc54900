"""Patches of images, as the code of masked autoencoders writes it (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602),
and losses on features of masked patches (data2vec, arXiv:2202.03555; EVA, arXiv:2211.07636)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sizes_of(patch_size: int | tuple[int, int], tubelet_size: int | None) -> tuple[int, ...]:
    """(p, q), or of videos (t, p, q)."""
    p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return (p, q) if tubelet_size is None else (tubelet_size, p, q)


def patchify(images: Tensor, patch_size: int | tuple[int, int], tubelet_size: int | None = None) -> Tensor:
    """(B, L, T, C): L patches in row-major order, of T = [t] p q pixels of C channels."""
    t, p, q = (1, *sizes_of(patch_size, tubelet_size))[-3:]
    videos = images.unsqueeze(2) if tubelet_size is None else images
    batch, channels, frames, height, width = videos.shape
    x = videos.reshape(batch, channels, frames // t, t, height // p, p, width // q, q)
    x = torch.einsum("ncfthpwq->nfhwtpqc", x)
    return x.reshape(batch, frames // t * (height // p) * (width // q), t * p * q, channels)


def masked_patch_loss(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    *,
    norm_pix_loss: bool | str = True,
    tubelet_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Patchify, normalise, square, and average where masked."""
    target = patchify(images, patch_size, tubelet_size)
    if norm_pix_loss == "per_channel":
        mean, var = target.mean(2, keepdim=True), target.var(2, unbiased=True, keepdim=True)
        target = (target - mean) / (var.sqrt() + 1e-6)
    target = target.flatten(2)
    if norm_pix_loss is True:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, unbiased=True, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    return _reduce(((pred - target) ** 2).mean(-1), mask, reduction)


def masked_feature_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    loss: str = "smooth_l1",
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Smooth L1 (data2vec), 1 - cosine (EVA) or the mean square, averaged where masked."""
    dtype = torch.promote_types(pred.dtype, target.dtype)
    pred, target = pred.to(dtype), target.to(dtype)
    if loss == "smooth_l1":
        values = F.smooth_l1_loss(pred, target, reduction="none", beta=beta).mean(-1)
    elif loss == "cosine":
        values = 1 - (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    else:
        values = ((pred - target) ** 2).mean(-1)
    return _reduce(values, mask, reduction)


def _reduce(loss: Tensor, mask: Tensor, reduction: str) -> Tensor:
    if torch.is_autocast_enabled(loss.device.type):
        loss = loss.float()
    mask = (mask != 0).to(loss.dtype)
    if reduction == "none":
        return loss * mask
    total = (loss * mask).sum()
    return total / mask.sum() if reduction == "mean" else total


def gather_patches(images: Tensor, ids: Tensor, patch: tuple[int, ...]) -> Tensor:
    """(B, K, C [t] p q): patch ids[b, k] of image b, in the order of a convolution's weight."""
    patches = patchify(images, patch[-2:], patch[0] if len(patch) == 3 else None).transpose(2, 3).flatten(2)
    return patches.gather(1, ids.long()[:, :, None].expand(-1, -1, patches.shape[2]))


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor | None, ids_keep: Tensor | None = None) -> Tensor:
    """A strided convolution, then a gather."""
    convolve = F.conv2d if images.dim() == 4 else F.conv3d
    tokens = convolve(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if ids_keep is None:
        return tokens
    return tokens.gather(1, ids_keep.long()[:, :, None].expand(-1, -1, tokens.shape[2]))
