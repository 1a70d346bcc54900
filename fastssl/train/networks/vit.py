"""A small Vision Transformer (arXiv:2010.11929) that can leave out patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.nn import PatchEmbed


class ViT(nn.Module):
    """(B, colours, size, size) images -> (B, L, features) tokens, one for each patch. There is no class token.

    Args:
        size: of the images.
        patch_size: of the patches.
        colours: 1 where they are grey, or 3.
        features: of a token.
        depth: number of layers.
        heads: of their attention.
    """

    def __init__(
        self, size: int, patch_size: int, colours: int, features: int = 128, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(size, patch_size, colours, features)
        self.register_buffer("pos_embed", position_embedding(size // patch_size, features), persistent=False)
        self.layers = layers(depth, features, heads)
        self.features = features

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """With ids_keep (B, L_keep), only those patches, in that order: (B, L_keep, features)."""
        places = self.pos_embed if ids_keep is None else self.pos_embed[ids_keep]
        return self.layers(self.patch_embed(images, ids_keep) + places)

    def stages(self) -> list[nn.Module]:
        """Its stages, from input to output, without the last normalisation, which counts as the head's."""
        return [self.patch_embed, *self.layers[:-1]]


def layers(depth: int, features: int, heads: int) -> nn.Sequential:
    """Pre-normalised transformer layers and a last normalisation."""

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(
            features, heads, 4 * features, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )

    return nn.Sequential(*(layer() for _ in range(depth)), nn.LayerNorm(features))


def position_embedding(side: int, features: int) -> Tensor:
    """(side^2, features): sines and cosines of each patch's column, then of its row, at features / 4 frequencies."""
    frequency = 10000 ** -(torch.arange(features // 4) / (features // 4))
    angle = torch.arange(side)[:, None] * frequency
    place = torch.cat([angle.sin(), angle.cos()], 1)  # (side, features / 2)
    column, row = place.repeat(side, 1), place.repeat_interleave(side, 0)
    return torch.cat([column, row], 1)
