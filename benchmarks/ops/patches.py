"""Losses on masked patches and the embedding of visible ones, against the code of masked autoencoders (MAE,
arXiv:2111.06377) and of data2vec (arXiv:2202.03555)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.ops.registry import Benchmark, Inputs, Loss, Size, output_and_gradients
from fastssl import reference

MASK_RATIO = 0.75  # MAE's
DIM = 768  # of a ViT-B's tokens
MODES = ("float32", "bfloat16")


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _order(batch: int, length: int) -> Tensor:
    """A permutation for each sample; the first ones are visible."""
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1)


def _visible(length: int) -> int:
    return int(length * (1 - MASK_RATIO))


def _mask(batch: int, length: int) -> Tensor:
    return (_order(batch, length) >= _visible(length)).float()


def _image_size(size: Size) -> tuple[int, ...]:
    """Samples x channels x image side x patch side, as (B, C, H, W)."""
    return *size[:3], size[2]


def _length(size: Size) -> int:
    return (size[2] // size[3]) ** 2


def _patch_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    batch, channels, _, patch = size
    pred = _random(batch, _length(size), channels * patch**2, dtype=dtype).requires_grad_()
    return pred, _random(*_image_size(size), dtype=dtype, seed=1), _mask(batch, _length(size))


def _of_patches(loss: Loss, pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    return loss(pred, images, mask, patch_size=math.isqrt(pred.shape[2] // images.shape[1]))


def _loss_traffic(elements: int, itemsize: int) -> float:
    """The masked parts of pred and target are read in both passes; the gradient is written."""
    return (4 * MASK_RATIO + 1) * elements * itemsize


Benchmark(
    "masked_patch_loss",
    sizes=((256, 3, 224, 16), (64, 3, 224, 16)),  # samples x channels x pixels x pixels of a patch
    memory_sizes=(),
    inputs=_patch_inputs,
    traffic=lambda size, itemsize: _loss_traffic(math.prod(_image_size(size)), itemsize),
    # By the number of tensors of all pixels alive at once.
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), 7 * math.prod(_image_size(size)) * itemsize),
    call=_of_patches,
    timed="forward + backward",
    modes=MODES,
)


def _feature_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    pred = _random(*size, dtype=dtype).requires_grad_()
    return pred, _random(*size, dtype=dtype, seed=1), _mask(*size[:2])


for _loss in ("smooth_l1", "cosine"):
    Benchmark(
        "masked_feature_loss",
        name="masked_feature_loss" if _loss == "smooth_l1" else f"masked_feature_loss_{_loss}",
        sizes=((256, 196, 768), (64, 196, 768)),  # samples x patches x features
        memory_sizes=(),
        inputs=_feature_inputs,
        traffic=lambda size, itemsize: _loss_traffic(math.prod(size), itemsize),
        needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), 8 * math.prod(size) * itemsize),
        arguments={"loss": _loss},
        timed="forward + backward",
        modes=MODES,
    )


def _embed_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """Images; weight and bias, which require gradients; the visible patches; the output's gradient."""
    batch, channels, _, patch = size
    keep = _visible(_length(size))
    weight = _random(DIM, channels, patch, patch, dtype=dtype, seed=1) / (channels * patch**2) ** 0.5
    ids_keep = _order(batch, _length(size))[:, :keep]
    return (
        _random(*_image_size(size), dtype=dtype),
        weight.requires_grad_(),
        _random(DIM, dtype=dtype, seed=2).requires_grad_(),
        ids_keep,
        _random(batch, keep, DIM, dtype=dtype, seed=3),
    )


def _embed_elements(size: Size) -> int:
    """Of the visible patches."""
    return size[0] * _visible(_length(size)) * size[1] * size[3] ** 2


Benchmark(
    "patch_embed",
    sizes=((256, 3, 224, 16), (64, 3, 224, 16)),  # samples x channels x pixels x pixels of a patch
    memory_sizes=(),
    inputs=_embed_inputs,
    flops=lambda size: 2 * 2 * _embed_elements(size) * DIM,  # tokens, and the gradient of the weight
    # Visible patches are read in both passes; tokens are written, and their gradient is read.
    traffic=lambda size, itemsize: 2 * (_embed_elements(size) + size[0] * _visible(_length(size)) * DIM) * itemsize,
    # Tokens of all patches, their gradient, and a copy of either as the convolution wants it.
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), 4 * size[0] * _length(size) * DIM * itemsize),
    naive=reference.patches.patch_embed,
    step=output_and_gradients,
    timed="forward + backward",
    modes=MODES,
    kernel="gather_patches",
)
