"""Random views of a batch of images, as tensors: one for each image, all at once, reproducible by a generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """(B, H, W) grey or (B, 3, H, W) uint8 images -> (B, 1 or 3, H, W) float32 in [0, 1]."""
    return (images.unsqueeze(1) if images.dim() == 3 else images).float().div_(255)


def random_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 images -> float32 views, see `to_float`: cropped, flipped, jittered in saturation, brightness, contrast."""
    view = random_resized_crop_flip(to_float(images), generator)
    return color_jitter(saturation_jitter(view, generator), generator)


def strong_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """The same with smaller crops, and half of them blurred (MoCo v2, arXiv:2003.04297)."""
    view = random_resized_crop_flip(to_float(images), generator, scale=(0.3, 1.0))
    return random_blur(color_jitter(saturation_jitter(view, generator), generator), generator)


def random_resized_crop_flip(
    images: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.6, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random crop of each image, of `scale` of its area and with `ratio` as aspect, resized to the image's size.

    Half of the crops are mirrored. Crop, resize and flip are one affine map per image, sampled bilinearly.
    """
    batch = images.shape[0]
    area = _uniform(batch, scale, generator)
    aspect = _uniform(batch, (math.log(ratio[0]), math.log(ratio[1])), generator).exp()
    width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = width * (torch.randint(2, (batch,), generator=generator) * 2 - 1)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * _uniform(batch, (-1, 1), generator)
    theta[:, 1, 2] = (1 - height) * _uniform(batch, (-1, 1), generator)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def color_jitter(images: Tensor, generator: torch.Generator, brightness: float = 0.7, contrast: float = 0.7) -> Tensor:
    """Each image in [0, 1] multiplied by 1 +- `brightness`, its distance from its mean by 1 +- `contrast`."""
    shape = (images.shape[0], 1, 1, 1)
    images = images * _uniform(shape, (1 - brightness, 1 + brightness), generator)
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * _uniform(shape, (1 - contrast, 1 + contrast), generator) + mean).clamp_(0, 1)


def saturation_jitter(images: Tensor, generator: torch.Generator, saturation: float = 0.7, grey: float = 0.2) -> Tensor:
    """Each colour's distance from grey multiplied by 1 +- `saturation`, for a share `grey` of them by 0.

    Grey images are returned as they are, and draw nothing from the generator.
    """
    if images.shape[1] == 1:
        return images
    shape = (images.shape[0], 1, 1, 1)
    factor = _uniform(shape, (1 - saturation, 1 + saturation), generator)
    factor = factor.where(torch.rand(shape, generator=generator) >= grey, 0)
    mean = images.mean(1, keepdim=True)
    return ((images - mean) * factor + mean).clamp_(0, 1)


def random_blur(
    images: Tensor, generator: torch.Generator, sigma: tuple[float, float] = (0.1, 1.0), share: float = 0.5
) -> Tensor:
    """Each image convolved with a Gaussian of its own width in pixels; with probability `share`, else as it is."""
    batch, channels, height, width = images.shape
    chosen = torch.rand(batch, generator=generator) < share
    widths = torch.where(chosen, _uniform(batch, sigma, generator), 1e-3)
    distance = torch.arange(-2.0, 3.0)
    kernels = (-distance.square() / (2 * widths[:, None].square())).softmax(1).repeat_interleave(channels, 0)
    rows = F.pad(images.reshape(1, -1, height, width), (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(rows, kernels[:, None, :, None], groups=batch * channels)
    return F.conv2d(rows, kernels[:, None, None, :], groups=batch * channels).view_as(images)


def _uniform(shape: int | tuple[int, ...], between: tuple[float, float], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (between[1] - between[0]) + between[0]
