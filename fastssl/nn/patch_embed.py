"""The first layer of vision transformers, which can embed the visible patches alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import functional
from fastssl._checks import (
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_memory,
    check_pair_of_sizes,
    check_positive,
    check_rows,
)

_Sizes = int | tuple[int, int]


class PatchEmbed(nn.Module):
    """The embedding of patches. It takes the place of timm's class of this name: checkpoints load, and
    `timm.create_model("vit_base_patch16_224", embed_layer=PatchEmbed)` makes a model that has it.

    Masked autoencoders (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602) embed all patches and drop three of four.
    With `ids_keep` this module embeds only the visible ones:

        ids_keep, mask, ids_restore = random_masking_ids(len(images), patch_embed.num_patches, 0.75)
        tokens = patch_embed(images, ids_keep)

    Without `ids_keep` it calls `proj` as a module. With `ids_keep` it only uses the parameters of `proj`:
    its hooks do not run then, and FSDP must shard this module or one that holds it, not `proj` by itself.

    Args:
        img_size: height and width of images: a number, or two; None: unknown, and not checked.
        patch_size: height and width of a patch, which must divide img_size, unless strict_img_size is False or
            dynamic_img_pad is True.
        in_chans: C, the channels of images.
        embed_dim: D, the features of a token.
        norm_layer: called with D, returns the module that normalises the tokens; None: no normalisation.
        flatten: whether tokens come as a sequence, (B, L, D), or as a grid, (B, D, H / p, W / q).
        output_fmt: "NLC", "NCHW", "NHWC" or "NCL", whatever flatten is; None: what flatten says.
        bias: whether the embedding has one.
        strict_img_size: whether images must be of img_size. If not, their sizes must be multiples of patch_size, unless
            dynamic_img_pad is True.
        dynamic_img_pad: pad images with zeros, on the right and below, to multiples of patch_size.
        device, dtype: of the parameters.
        tubelet_size: the frames of a patch of a video; None: images.

    Attributes:
        proj: the convolution that holds `weight` (D, C, p, q) or (D, C, t, p, q), and `bias` (D,).
        norm: what norm_layer returned.
        grid_size: the numbers of whole patches along height and width; None where img_size is.
        num_patches: their product, L for an image; a video has that many for every tubelet_size frames.
        img_size, patch_size: as pairs.
        flatten, output_fmt, strict_img_size, dynamic_img_pad: as timm's.

    Raises:
        TypeError: if a size is no integer, a flag or dtype is none, or norm_layer no function.
        ValueError: if a size is not positive, or too large, device is none, img_size is no multiple of patch_size
            though it must be, or output_fmt is unknown, or not "NLC" for videos.
    """

    def __init__(
        self,
        img_size: _Sizes | None = 224,
        patch_size: _Sizes = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tubelet_size: int | None = None,
    ) -> None:
        super().__init__()
        in_chans, embed_dim = check_positive("in_chans", in_chans), check_positive("embed_dim", embed_dim)
        if tubelet_size is not None:
            tubelet_size = check_positive("tubelet_size", tubelet_size)
        check_choice("output_fmt", output_fmt, (None, "NCHW", "NHWC", "NCL", "NLC"))
        self.tubelet_size = tubelet_size
        self.flatten = check_flag("flatten", flatten) and output_fmt is None
        self.output_fmt = "NCHW" if output_fmt is None else output_fmt
        self.strict_img_size = check_flag("strict_img_size", strict_img_size)
        self.dynamic_img_pad = check_flag("dynamic_img_pad", dynamic_img_pad)
        if tubelet_size is not None and self._format() != "NLC":
            raise ValueError(f"output_fmt must be None or 'NLC' for videos, got {self._format()!r}")
        self.patch_size = check_pair_of_sizes("patch_size", patch_size)
        self._set_img_size(img_size)
        check_memory("in_chans x embed_dim x a patch", (embed_dim, in_chans, tubelet_size or 1, *self.patch_size), 8)
        check_dtype("dtype", dtype)
        place = {"device": check_device(device), "dtype": dtype}
        place = {name: value for name, value in place.items() if value is not None}
        self.proj = self._convolution(in_chans, embed_dim, check_flag("bias", bias), place)
        if norm_layer is not None and not callable(norm_layer):
            raise TypeError(f"norm_layer must be a function of embed_dim or None, got {norm_layer!r}")
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim, **place)
        if not isinstance(self.norm, nn.Module):
            raise TypeError(f"norm_layer must return a Module, got {type(self.norm).__name__}")

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """The tokens.

        Args:
            images: (B, C, H, W), or videos (B, C, T, H, W).
            ids_keep: (B, K), the patches to embed, as `fastssl.functional.patch_embed` takes them; None: all.

        Returns:
            (B, L, D), or as output_fmt says. With ids_keep (B, K, D), in every format that has the features last.

        Raises:
            TypeError, ValueError, IndexError: if the sizes of images do not fit, ids_keep is given where features do
                not come last or proj is sharded by itself, or as `fastssl.functional.patch_embed`.
        """
        if self.tubelet_size is None:
            check_rows("images", images, "(B, C, H, W)", 4)
        else:
            check_rows("images", images, "(B, C, T, H, W)", 5)
        images = self._checked(images)
        if ids_keep is not None:
            if not self._format().endswith("C"):
                raise ValueError(f"ids_keep must be None where output_fmt is {self._format()!r}, got a tensor")
            if hasattr(self.proj.weight, "placements"):  # a DTensor's
                raise ValueError("proj must not be sharded by itself where ids_keep is given: shard what holds it")
            return self.norm(functional.patch_embed(images, self.proj.weight, self.proj.bias, ids_keep))
        tokens = self.proj(images)
        if self._format() == "NHWC":
            tokens = tokens.permute(0, 2, 3, 1)
        elif self._format() == "NCL":
            tokens = tokens.flatten(2)
        elif self._format() == "NLC":
            tokens = tokens.flatten(2).transpose(1, 2)
        return self.norm(tokens)

    @torch.no_grad()
    def set_input_size(self, img_size: _Sizes | None = None, patch_size: _Sizes | None = None) -> None:
        """Change the sizes. For another patch size the weight is resampled, so that a resized image gets about the same
        tokens (FlexiViT, arXiv:2212.08013).

        Args:
            img_size: the new one; None: unchanged.
            patch_size: the new one; None: unchanged.

        Raises:
            TypeError, ValueError: as the class.
        """
        before = self.patch_size, self.img_size
        self.patch_size = self.patch_size if patch_size is None else check_pair_of_sizes("patch_size", patch_size)
        try:
            self._set_img_size(self.img_size if img_size is None else img_size)
        except (TypeError, ValueError):
            self.patch_size = before[0]
            raise
        if self.patch_size != before[0]:
            old = self.proj
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            self.proj = self._convolution(old.in_channels, old.out_channels, old.bias is not None, place)
            self.proj.weight.copy_(_resampled(old.weight, self.patch_size))
            if old.bias is not None:
                self.proj.bias.copy_(old.bias)
            for (_, new), parameter in zip(self.proj.named_parameters(), old.parameters(), strict=True):
                new.requires_grad_(parameter.requires_grad)
            self.proj.train(old.training)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """The height and width of a patch, or the larger of them."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The numbers of tokens along height and width of images of that size."""
        p, q = self.patch_size
        if self.dynamic_img_pad:
            return math.ceil(img_size[0] / p), math.ceil(img_size[1] / q)
        return img_size[0] // p, img_size[1] // q

    def _format(self) -> str:
        return "NLC" if self.flatten else self.output_fmt

    def _set_img_size(self, img_size: _Sizes | None) -> None:
        if img_size is None:
            self.img_size = self.grid_size = self.num_patches = None
            return
        (height, width), (p, q) = check_pair_of_sizes("img_size", img_size), self.patch_size
        if self.strict_img_size and not self.dynamic_img_pad and (height % p or width % q):
            raise ValueError(f"img_size must be a multiple of patch_size {self.patch_size}, got {(height, width)}")
        self.img_size = height, width
        self.grid_size = height // p, width // q
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _checked(self, images: Tensor) -> Tensor:
        """Images whose sizes fit, padded if they may be."""
        (height, width), (p, q) = images.shape[-2:], self.patch_size
        if self.img_size is not None and self.strict_img_size and (height, width) != self.img_size:
            raise ValueError(f"images must have sizes {self.img_size}, got {(height, width)}")
        if self.dynamic_img_pad:
            return F.pad(images, (0, -width % q, 0, -height % p))
        if height % p or width % q:
            raise ValueError(f"images must have sizes that are multiples of {self.patch_size}, got {(height, width)}")
        return images

    def _convolution(self, in_chans: int, embed_dim: int, bias: bool, place: dict) -> nn.Conv2d | nn.Conv3d:
        if self.tubelet_size is None:
            return nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **place)
        patch = (self.tubelet_size, *self.patch_size)
        return nn.Conv3d(in_chans, embed_dim, patch, patch, bias=bias, **place)


def _resampled(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The weight of patches of that size whose products with resized patches come nearest those before.

    With R the matrix that resizes a patch, w'^T R x = w^T x for all patches x: w' = pinv(R)^T w.
    """
    old = tuple(weight.shape[-2:])
    pixels = torch.eye(math.prod(old), device=weight.device).view(-1, 1, *old)
    resize = F.interpolate(pixels, size=patch_size, mode="bicubic", antialias=True).flatten(1)  # R^T
    return (weight.float().flatten(-2) @ torch.linalg.pinv(resize.T)).unflatten(-1, patch_size).to(weight.dtype)
