"""A small Transformer for texts (arXiv:1706.03762), normalised before each part (arXiv:2002.04745)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """(B, L) int64 tokens -> (B, L, features), from which the table of embeddings, `words.weight`, makes logits.

    Args:
        vocabulary: number of tokens.
        length: the largest L.
        features: of a token, a multiple of `heads`.
        depth: number of layers.
        heads: of their attention.
        causal: whether a token sees only those before it, and itself.
    """

    def __init__(
        self, vocabulary: int, length: int, features: int = 128, depth: int = 4, heads: int = 4, causal: bool = False
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, features)
        self.places = nn.Parameter(0.02 * torch.randn(length, features))
        self.layers = nn.ModuleList(_Layer(features, heads, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(features)
        self.features = features
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, features: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.queries_keys_values, self.joined = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        x = x + self.joined(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))
