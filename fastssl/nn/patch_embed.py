"""The first layer of vision transformers, which can embed the visible patches alone."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl import functional
from fastssl._checks import check_pair_of_sizes, check_positive


class PatchEmbed(nn.Module):
    """The embedding of patches, with timm's `PatchEmbed`'s first arguments and its parameters: checkpoints load.

    Masked autoencoders (MAE, arXiv:2111.06377; VideoMAE, arXiv:2203.12602) embed all patches and drop three of four.
    With `ids_keep` this module embeds only the visible ones:

        ids_keep, mask, ids_restore = random_masking_ids(len(images), patch_embed.num_patches, 0.75)
        tokens = patch_embed(images, ids_keep)

    Args:
        img_size: height and width of images: a number, or two.
        patch_size: height and width of a patch, which must divide img_size.
        in_chans: C, the channels of images.
        embed_dim: D, the features of a token.
        tubelet_size: the frames of a patch of a video; None: images.
        bias: whether the embedding has one.

    Attributes:
        proj: the convolution that holds `weight` (D, C, p, q) or (D, C, t, p, q), and `bias` (D,).
        grid_size: the numbers of patches along height and width.
        num_patches: their product, L for an image; a video has that many for every tubelet_size frames.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive, or img_size no multiple of patch_size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        tubelet_size: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = check_pair_of_sizes("img_size", img_size)
        self.patch_size = check_pair_of_sizes("patch_size", patch_size)
        for name, size in (
            ("in_chans", in_chans),
            ("embed_dim", embed_dim),
            ("tubelet_size", 1 if tubelet_size is None else tubelet_size),
        ):
            check_positive(name, size)
        if self.img_size[0] % self.patch_size[0] or self.img_size[1] % self.patch_size[1]:
            raise ValueError(f"img_size must be a multiple of patch_size {self.patch_size}, got {self.img_size}")
        self.tubelet_size = tubelet_size
        self.grid_size = self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if tubelet_size is None:
            self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)
        else:
            patch = (tubelet_size, *self.patch_size)
            self.proj = nn.Conv3d(in_chans, embed_dim, patch, patch, bias=bias)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """(B, K, D): the patches `ids_keep` (B, K) of images (B, C, H, W) or videos (B, C, T, H, W); None: all.

        Raises:
            ValueError: if images are not of img_size, or as `fastssl.functional.patch_embed`.
        """
        if images.shape[-2:] != self.img_size:
            raise ValueError(f"images must have sizes {self.img_size}, got {tuple(images.shape[-2:])}")
        return functional.patch_embed(images, self.proj.weight, self.proj.bias, ids_keep)
