"""A small Vision Transformer (arXiv:2010.11929) that can leave out patches and takes images of several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.nn import PatchEmbed


def patch_size_of(size: int) -> int:
    """That of images of this size: 16 for 224, and of 16, 8 and 4 the largest that makes at least 8 patches in a row; 4
    for the smallest images."""
    return next((patch for patch in (16, 8) if size % patch == 0 and size >= 8 * patch), 4)


class ViT(nn.Module):
    """(B, colours, H, W) images -> (B, L, features) tokens, one for each patch; with a class token, that one alone,
    (B, features).

    The places of patches are those of an image of `size`: of smaller and larger images, whose sides must be multiples
    of patch_size, they lie more or less densely in the same square, as interpolated position embeddings do.

    Args:
        size: of the images.
        patch_size: of the patches.
        colours: 1 where they are grey, or 3.
        features: of a token.
        depth: number of layers.
        heads: of their attention.
        class_token: whether there is one, which stands for the image.
        registers: number of tokens of no patch, in which the layers may keep what they like (arXiv:2309.16588).
        drop_path: how often the last layer leaves an example as it is, in training; the first never does, and the share
            rises from layer to layer (stochastic depth, arXiv:1603.09382).
        layer_scale: what each layer's contributions are multiplied with at first, feature by feature; it is learned
            (arXiv:2103.17239). 0: they are not multiplied.

    Raises:
        ValueError: if drop_path is not from 0 to less than 1.
    """

    def __init__(
        self,
        size: int,
        patch_size: int,
        colours: int,
        features: int = 128,
        depth: int = 4,
        heads: int = 4,
        *,
        class_token: bool = False,
        registers: int = 0,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size, self.side = patch_size, size // patch_size
        self.patch_embed = PatchEmbed(size, patch_size, colours, features, strict_img_size=False)
        self.register_buffer("pos_embed", position_embedding(self.side, features), persistent=False)
        self.layers = layers(depth, features, heads, drop_path, layer_scale)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, features)) if class_token else None
        self.registers = nn.Parameter(0.02 * torch.randn(registers, features)) if registers else None
        self.features = features

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """With ids_keep (B, L_keep), only those patches, in that order: (B, L_keep, features)."""
        first, patches = self.split(self.layers(self.embed(images, ids_keep)))
        return patches if first is None else first

    def embed(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """The layers' input: class token, registers, and the patches of ids_keep (default: all).

        Where mask (B, L) is not 0, the mask token (features,) takes the place of a patch.
        """
        tokens = self.patch_embed(images, ids_keep)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(2) != 0, mask_token.to(tokens.dtype), tokens)
        places = self._places(images)
        tokens = tokens + (places if ids_keep is None else places[ids_keep])
        others = [
            x.to(tokens.dtype).expand(len(tokens), -1, -1) for x in (self.class_token, self.registers) if x is not None
        ]
        return torch.cat([*others, tokens], 1)

    def split(self, tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        """What the layers return -> the class token (B, features), or None, and the patches' tokens."""
        ours = 0 if self.class_token is None else 1
        others = 0 if self.registers is None else len(self.registers)
        return tokens[:, 0] if ours else None, tokens[:, ours + others :]

    def adopt(self, weights: Mapping[str, Any]) -> None:
        """Gets the parts that the weights of another one are of, and this one has not: class token, registers, scales
        of layers. What is in them is to be loaded."""

        def parameter(x: Any) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros_like(x, device=self.pos_embed.device)) if isinstance(x, Tensor) else None

        for name in ("class_token", "registers"):
            if getattr(self, name) is None:
                setattr(self, name, parameter(weights.get(name)))
        for place, layer in enumerate(self.layers[:-1]):
            scales = [weights.get(f"layers.{place}.scales.{part}") for part in range(2)]
            if layer.scales is None and all(isinstance(x, Tensor) for x in scales):
                layer.scales = nn.ParameterList(parameter(x) for x in scales)

    def stages(self) -> list[nn.Module]:
        """Its stages, from input to output, without the last normalisation, which counts as the head's."""
        return [self.patch_embed, *self.layers[:-1]]

    def _places(self, images: Tensor) -> Tensor:
        rows, columns = (length // self.patch_size for length in images.shape[-2:])
        if rows == columns == self.side:
            return self.pos_embed
        device = self.pos_embed.device
        return position_embedding((rows, columns), self.features, self.side, device).to(self.pos_embed.dtype)


class Layer(nn.Module):
    """Attention, then two linear layers, of normalised tokens (B, L, features), each added to its input.

    Args:
        features: of a token.
        heads: of the attention.
        drop_path, layer_scale: see `ViT`.
    """

    def __init__(self, features: int, heads: int, drop_path: float = 0.0, layer_scale: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(features, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2))
        self.scales = None
        if layer_scale:
            self.scales = nn.ParameterList(torch.full((features,), float(layer_scale)) for _ in range(2))
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be from 0 to less than 1, got {drop_path}")
        self.drop_path = drop_path

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._contribution(0, self._attend(self.norms[0](tokens)))
        return tokens + self._contribution(1, self.mlp(self.norms[1](tokens)))

    def _attend(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    def _contribution(self, part: int, x: Tensor) -> Tensor:
        if self.scales is not None:
            x = x * self.scales[part]
        if not self.training or self.drop_path == 0:
            return x
        stays = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * (stays / (1 - self.drop_path)).to(x.dtype)


def layers(depth: int, features: int, heads: int, drop_path: float = 0.0, layer_scale: float = 0.0) -> nn.Sequential:
    """Pre-normalised transformer layers and a last normalisation."""
    shares = torch.linspace(0, drop_path, depth).tolist()
    return nn.Sequential(*(Layer(features, heads, share, layer_scale) for share in shares), nn.LayerNorm(features))


def position_embedding(
    side: int | tuple[int, int], features: int, reference: int | None = None, device: torch.device | None = None
) -> Tensor:
    """(rows x columns, features): sines and cosines of each patch's column, then of its row, at features / 4
    frequencies.

    Args:
        side: rows and columns, or the number of both.
        features: a multiple of 4.
        reference: the patches are spread over a square of that many rows and columns, one apart; None: they are one
            apart themselves.
        device: of the result.
    """
    frequency = 10000 ** -(torch.arange(features // 4, device=device) / (features // 4))

    def along(count: int) -> Tensor:
        steps = torch.arange(count, device=device)
        place = steps if reference is None else (steps + 0.5) * (reference / count) - 0.5
        angle = place[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)  # (count, features / 2)

    rows, columns = side if isinstance(side, tuple) else (side, side)
    return torch.cat([along(columns).repeat(rows, 1), along(rows).repeat_interleave(columns, 0)], 1)
