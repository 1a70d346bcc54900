"""Random views of a batch of images: tensors in, tensors out, on the images' device, all examples at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._checks import check_number, check_share
from fastssl.train.data.draw import Draw
from fastssl.train.device import move

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision and PIL have it
_DRAWS = 14  # random numbers that a view takes


def to_float(images: Tensor) -> Tensor:
    """(B, H, W) grey or (B, 3, H, W) uint8 images -> (B, 1 or 3, H, W) float32 in [0, 1]."""
    return (images.unsqueeze(1) if images.dim() == 3 else images).float().div_(255)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A random view of each image, by SimCLR's steps (arXiv:2002.05709) and BYOL's solarisation (arXiv:2006.07733), in
    this order. The defaults are SimCLR's for ImageNet.

    Every example has random numbers of its own, a row of a table, so that the views of some rows of a batch are those
    that they have in the whole batch, on whatever device. The steps of the colour jitter have one order, not a random
    one. Grey images (of one channel) have no saturation and no hue to be changed.

    Args:
        min_scale: the smallest crop's area, as a share of the image's; areas are uniform
        max_scale: the largest crop's area
        max_aspect: the widest crop's width over its height, the narrowest has the inverse; uniform in its logarithm
        flip: probability that the crop is mirrored
        jitter: probability that the colours are changed in the four ways that follow
        brightness: largest share by which values become larger or smaller
        contrast: the same, of their distance from the image's mean grey
        saturation: the same, of their distance from the pixel's grey
        hue: largest turn of the colour circle, as a share of it, at most 0.5
        grey: probability that the view has no colour
        blur: probability of a Gaussian blur, whose kernel is a tenth of the view
        max_sigma: its largest standard deviation in pixels, the smallest is 0.1
        solarise: probability that values above 1/2 become dark

    Raises:
        TypeError: if one of them is no number.
        ValueError: if one of them is out of range.
    """

    min_scale: float = 0.08
    max_scale: float = 1.0
    max_aspect: float = 4 / 3
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grey: float = 0.2
    blur: float = 0.5
    max_sigma: float = 2.0
    solarise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_scale", "max_scale", "flip", "jitter", "grey", "blur", "solarise"):
            object.__setattr__(self, name, check_share(name, getattr(self, name)))
        for name in ("max_aspect", "brightness", "contrast", "saturation", "hue", "max_sigma"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(f"min_scale must be above 0 and at most max_scale, {self.max_scale}, got {self.min_scale}")
        if not 1 <= self.max_aspect < math.inf:
            raise ValueError(f"max_aspect must be at least 1, got {self.max_aspect}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be from 0 to 0.5, got {self.hue}")
        if not 0.1 <= self.max_sigma < math.inf:
            raise ValueError(f"max_sigma must be at least 0.1, got {self.max_sigma}")

    def __call__(self, images: Tensor, draw: Draw | torch.Generator, size: int | None = None) -> Tensor:
        """uint8 images, see `to_float` -> (B, 1 or 3, size, size) float32 views in [0, 1]; size None: the images'."""
        return self.apply(images, Draw.of(draw, images).uniform(_DRAWS), size)

    def apply(self, images: Tensor, draws: Tensor, size: int | None = None) -> Tensor:
        """The views of images that have these rows of 14 uniform numbers. Nothing else is random."""
        area, aspect, x, y, flip, jitter, *factors, hue, grey, blur, sigma, solarise = draws.to(images.device).T
        height, width = images.shape[-2:] if size is None else (size, size)
        view = self._crop(to_float(images), area, aspect, x, y, flip < self.flip, (height, width))
        if self.jitter > 0:
            view = self._jitter(view, jitter < self.jitter, factors, hue)
        if self.grey > 0 and view.shape[1] == 3:
            view = torch.where(_each(grey < self.grey), _luma(view), view)
        if self.blur > 0:
            widths = torch.where(blur < self.blur, _between(sigma, 0.1, self.max_sigma), 1e-3)
            view = gaussian_blur(view, widths, max(1, round(min(height, width) / 20)))
        if self.solarise > 0:
            view = torch.where(_each(solarise < self.solarise) & (view >= 0.5), 1 - view, view)
        return view

    def _crop(
        self, images: Tensor, area: Tensor, aspect: Tensor, x: Tensor, y: Tensor, flip: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Crop, resize and flip are one affine map per image, sampled bilinearly."""
        area = _between(area, self.min_scale, self.max_scale)
        aspect = _between(aspect, -math.log(self.max_aspect), math.log(self.max_aspect)).exp()
        width, height = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
        theta = torch.zeros(len(images), 2, 3, device=images.device)
        theta[:, 0, 0] = torch.where(flip, -width, width)
        theta[:, 1, 1] = height
        theta[:, 0, 2] = (1 - width) * _between(x, -1, 1)
        theta[:, 1, 2] = (1 - height) * _between(y, -1, 1)
        grid = F.affine_grid(theta, [*images.shape[:2], *size], align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    def _jitter(self, view: Tensor, chosen: Tensor, factors: list[Tensor], hue: Tensor) -> Tensor:
        brightness, contrast, saturation = (
            _each(torch.where(chosen, _between(factor, 1 - strength, 1 + strength).clamp_min(0), 1))
            for factor, strength in zip(factors, (self.brightness, self.contrast, self.saturation), strict=True)
        )
        view = (view * brightness).clamp_(0, 1)
        view = torch.lerp(_luma(view).mean((2, 3), keepdim=True), view, contrast).clamp_(0, 1)
        if view.shape[1] == 1:
            return view
        view = torch.lerp(_luma(view), view, saturation).clamp_(0, 1)
        return turn_hue(view, torch.where(chosen, _between(hue, -self.hue, self.hue), 0)) if self.hue > 0 else view


# Milder than the papers' for ImageNet: small pictures of one thing, and short runs, lose more by a small crop.
CROPPED = Augmentation(min_scale=0.6, jitter=0, grey=0, blur=0)
MILD = Augmentation(min_scale=0.6, jitter=1, brightness=0.7, contrast=0.7, saturation=0.7, hue=0, blur=0)
STRONG = Augmentation(
    min_scale=0.3, jitter=1, brightness=0.7, contrast=0.7, saturation=0.7, hue=0.1, blur=0.5, max_sigma=1.0
)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """(B, 3, H, W) images in [0, 1] with their hues (of HSV) turned, (B,) shares of the colour circle."""
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    red, green, blue = images.unbind(1)
    sixth = torch.where(  # of the circle, from -1 to 5
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    ) / chroma.where(chroma > 0, 1)
    hue = sixth + 6 * turns.view(-1, 1, 1)
    place = torch.stack([hue + sixths for sixths in (5, 3, 1)], 1).remainder_(6)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(place, 4 - place).clamp_(0, 1)


def gaussian_blur(images: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """Each image convolved with a Gaussian of its own standard deviation in pixels, over 2 radius + 1 of them."""
    batch, channels, height, width = images.shape
    distance = torch.arange(-radius, radius + 1, device=images.device)
    kernels = (-distance.square() / (2 * sigmas[:, None].square())).softmax(1).repeat_interleave(channels, 0)
    rows = F.pad(images, (radius,) * 4, mode="replicate").view(1, -1, height + 2 * radius, width + 2 * radius)
    rows = F.conv2d(rows, kernels[:, None, :, None], groups=batch * channels)
    return F.conv2d(rows, kernels[:, None, None, :], groups=batch * channels).view_as(images)


def _luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), the grey of each pixel; grey images as they are."""
    if images.shape[1] == 1:
        return images
    return torch.tensordot(images, move(torch.tensor(_LUMA), images.device), ([1], [0])).unsqueeze(1)


def _each(numbers: Tensor) -> Tensor:
    """(B,), to be broadcast over images."""
    return numbers.view(-1, 1, 1, 1)


def _between(draws: Tensor, low: float, high: float) -> Tensor:
    return draws * (high - low) + low
