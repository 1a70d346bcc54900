"""Patches of images: losses on the masked ones, embedding of the visible ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import needs_gradient
from fastssl._checks import (
    check_alike,
    check_choice,
    check_ids,
    check_number,
    check_pair_of_sizes,
    check_positive,
    check_range,
    check_reduction,
    check_rows,
    check_same_device,
    check_tensor,
)
from fastssl.ops import current_backend, patches
from fastssl.ops._precision import autocast_enabled

_NORMS = {False: "none", True: "patch", "per_channel": "channel"}


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
    """The reconstruction loss of masked autoencoders, straight from images: MAE (arXiv:2111.06377), VideoMAE
    (arXiv:2203.12602).

        loss[b, l] = mean over a patch's elements of (pred[b, l] - patch[b, l])^2, where it is masked

    No patches are copied: they are normalised as they are read. Those that are not masked are not used.

    Args:
        pred: (B, L, P), what the decoder makes of the L patches, in row-major order: of each the P = p q C elements in
            MAE's order (p, q, c), or (t, p, q, c) of videos. float32, bfloat16, float16 or float64.
        images: (B, C, H, W), or videos (B, C, T, H, W), whose sizes are multiples of a patch's; of any of those
            dtypes. They get no gradient.
        mask: (B, L), boolean, integer or floating-point: a patch is masked where it is not 0.
        patch_size: p = q, or (p, q).
        norm_pix_loss: True, MAE's: each patch minus its mean, over sqrt(var + 1e-6), of all elements;
            "per_channel", VideoMAE's: each channel of a patch minus its mean, over sqrt(var) + 1e-6; False: neither.
            Variances are unbiased.
        tubelet_size: t, the frames of a patch of a video; None: `images` are images.
        reduction: "mean" over masked patches, "sum", or "none", which is 0 where not masked.

    Returns:
        0-d, or (B, L) for "none", of the dtype that pred and images promote to, float32 under autocast. The mean over
        no masked patch is NaN, as in MAE.

    Raises:
        TypeError: if pred, images or mask is no tensor, or patch_size or tubelet_size no integer.
        ValueError: if shapes, sizes, dtypes or devices do not fit, images require grad, what is to be normalised has
            one element, or norm_pix_loss or reduction is unknown.
    """
    patch = _patch_sizes(patch_size, tubelet_size)
    _check_images("images", images, patch)
    check_rows("pred", pred, "(B, L, P)", 3)
    check_same_device("pred", pred, "images", images)
    _check_constant("images", images)
    length, pixels = math.prod(patches.grid_of(images.shape, patch)), math.prod(patch)
    shape = (images.shape[0], length, images.shape[1] * pixels)
    if pred.shape != shape:
        raise ValueError(f"pred must have shape {shape}, a row for each patch of images, got {tuple(pred.shape)}")
    mask = _as_mask(mask, pred)
    if not isinstance(norm_pix_loss, (bool, str)) or norm_pix_loss not in _NORMS:
        raise ValueError(f"norm_pix_loss must be True, False or 'per_channel', got {norm_pix_loss!r}")
    elements = pixels if norm_pix_loss == "per_channel" else shape[2]
    if norm_pix_loss and elements < 2:
        raise ValueError(f"norm_pix_loss needs at least 2 elements to normalise, got patches of {elements}")
    check_reduction(reduction)
    if current_backend() == "reference":
        return reference.patches.masked_patch_loss(
            pred,
            images,
            mask,
            (patch[-2], patch[-1]),
            norm_pix_loss=norm_pix_loss,
            tubelet_size=patch[0] if len(patch) == 3 else None,
            reduction=reduction,
        )
    loss = patches.masked_patch_loss(pred, images, mask, patch, _NORMS[norm_pix_loss])
    return _finish(loss, mask, reduction, pred, images)


def masked_feature_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    loss: str = "smooth_l1",
    beta: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss of predicting a teacher's features of masked patches: data2vec (arXiv:2202.03555), EVA
    (arXiv:2211.07636). With a beta of 0 and patches of images as their target, SimMIM's (arXiv:2111.09886).

    Args:
        pred: (B, L, D) features; float32, bfloat16, float16 or float64.
        target: (B, L, D), the teacher's, of any of those dtypes. They get no gradient.
        mask: (B, L), boolean, integer or floating-point: a patch is masked where it is not 0. No others are used.
        loss: of a patch: "smooth_l1", data2vec's, the mean over features of `torch.nn.functional.smooth_l1_loss`;
            "cosine", EVA's: 1 - cos of the angle between pred and target; "mse": the mean square of pred - target.
        beta: where smooth L1 turns from the square to the absolute value, 0 or above; 0: L1.
        reduction: "mean" over masked patches, "sum", or "none", which is 0 where not masked.

    Returns:
        0-d, or (B, L) for "none", of the dtype that pred and target promote to, float32 under autocast. The mean over
        no masked patch is NaN.

    Raises:
        TypeError: if pred, target or mask is no tensor, or beta no number.
        ValueError: if shapes, dtypes or devices do not fit, target requires grad, beta is negative or not finite, or
            loss or reduction is unknown.
    """
    check_rows("pred", pred, "(B, L, D)", 3)
    check_rows("target", target, "(B, L, D)", 3)
    if pred.shape != target.shape:
        shapes = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(f"pred and target must have the same shape, got {shapes}")
    check_same_device("pred", pred, "target", target)
    _check_constant("target", target)
    mask = _as_mask(mask, pred)
    check_choice("loss", loss, ("smooth_l1", "cosine", "mse"))
    beta = check_number("beta", beta)
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if beta < torch.finfo(torch.float32).tiny:  # whose inverse float32 does not hold
        beta = 0.0
    check_reduction(reduction)
    if current_backend() == "reference":
        return reference.patches.masked_feature_loss(pred, target, mask, loss=loss, beta=beta, reduction=reduction)
    return _finish(patches.masked_feature_loss(pred, target, mask, loss, beta), mask, reduction, pred, target)


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor | None, ids_keep: Tensor | None = None) -> Tensor:
    """The embedding of the visible patches alone: what a convolution whose kernel and stride are a patch would give,
    followed by a gather of its outputs.

    Visible patches are copied out of the images and multiplied with the weight: K / L of the convolution's work. The
    product is `torch.nn.functional.linear`'s, and follows autocast and `torch.set_float32_matmul_precision` as it does.

    Args:
        images: (B, C, H, W), or videos (B, C, T, H, W), whose sizes are multiples of a patch's; float32, bfloat16,
            float16 or float64.
        weight: (D, C, p, q), or (D, C, t, p, q) for videos, of images' dtype (any under autocast).
        bias: (D,), or None.
        ids_keep: (B, K) int64 or int32, the patches to embed of each sample, from 0 to L - 1 in row-major order,
            repeated or not, as `random_masking_ids` draws them; None: all.

    Returns:
        (B, K, D) tokens.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if shapes, sizes, dtypes or devices do not fit.
        IndexError: on the CPU, if one of ids_keep is below 0 or above L - 1. On CUDA an assertion stops the
            process.
    """
    check_tensor("weight", weight)
    if weight.dim() not in (4, 5) or weight.numel() == 0:
        raise ValueError(f"weight must have shape (D, C, [t,] p, q), none of them 0, got {tuple(weight.shape)}")
    patch = list(weight.shape[2:])
    _check_images("images", images, patch)
    if images.shape[1] != weight.shape[1]:
        channels = f"{images.shape[1]} and {weight.shape[1]}"
        raise ValueError(f"images and weight must have the same number of channels, got {channels}")
    check_alike("images", images, "weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight has rows, got {tuple(bias.shape)}")
        check_alike("images", images, "bias", bias)
    if ids_keep is None:
        length = math.prod(patches.grid_of(images.shape, patch))
        ids_keep = torch.arange(length, device=images.device).expand(images.shape[0], length)
    check_ids("ids_keep", ids_keep, images, "images")
    if current_backend() == "reference":
        check_range("ids_keep", ids_keep, math.prod(patches.grid_of(images.shape, patch)))
        return reference.patches.patch_embed(images, weight, bias, ids_keep)
    return F.linear(patches.gather_patches(images, ids_keep, patch), weight.flatten(1), bias)


def _patch_sizes(patch_size: int | tuple[int, int], tubelet_size: int | None) -> list[int]:
    """[p, q] or [t, p, q]."""
    sizes = check_pair_of_sizes("patch_size", patch_size)
    if tubelet_size is None:
        return [*sizes]
    return [check_positive("tubelet_size", tubelet_size), *sizes]


def _check_images(name: str, images: Tensor, patch: list[int]) -> None:
    check_rows(name, images, "(B, C, H, W)" if len(patch) == 2 else "(B, C, T, H, W)", 2 + len(patch))
    sizes = tuple(images.shape[2:])
    if images.shape[1] == 0:
        raise ValueError(f"{name} must have at least one channel, got shape {tuple(images.shape)}")
    if 0 in sizes or any(size % p for size, p in zip(sizes, patch, strict=True)):
        raise ValueError(f"sizes of {name} must be multiples of {tuple(patch)}, a patch's, got {sizes}")


def _check_constant(name: str, x: Tensor) -> None:
    if needs_gradient(x):
        raise ValueError(f"{name} must not require grad: a target gets no gradient, got one that does")


def _as_mask(mask: Tensor, pred: Tensor) -> Tensor:
    """Boolean."""
    check_tensor("mask", mask)
    if mask.is_complex():
        raise ValueError(f"mask must be boolean, integer or floating-point, got {mask.dtype}")
    if mask.shape != pred.shape[:2]:
        raise ValueError(f"mask must have shape {tuple(pred.shape[:2])}, one for each patch, got {tuple(mask.shape)}")
    check_same_device("mask", mask, "pred", pred)
    return mask != 0


def _finish(loss: Tensor, mask: Tensor, reduction: str, pred: Tensor, target: Tensor) -> Tensor:
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / mask.sum()
    return loss if autocast_enabled(pred) else loss.to(torch.promote_types(pred.dtype, target.dtype))
