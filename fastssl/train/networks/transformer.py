"""Small Transformers for texts (arXiv:1706.03762), normalised before each part (arXiv:2002.04745)."""

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
        dropout: the share of embeddings, and of what each layer adds to them, that is dropped in training.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        features: int = 128,
        depth: int = 4,
        heads: int = 4,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, features)
        self.places = nn.Parameter(0.02 * torch.randn(length, features))
        self.dropout = nn.Dropout(dropout)
        self.layers = Layers(depth, features, heads, causal, dropout)
        self.features = features
        nn.init.normal_(self.words.weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, features), the layers' input."""
        return self.dropout(self.words(tokens) + self.places[: tokens.shape[1]])

    def forward(self, tokens: Tensor, known: Tensor | None = None) -> Tensor:
        """With known (B, L) bool, the others, such as padding, are not seen."""
        return self.layers(self.embed(tokens), known)


class Decoder(nn.Module):
    """(B, L, features) embedded tokens, and (B, M, features) that they read -> (B, L, features). A token sees those
    before it, and itself, and all that is read.

    Args:
        features: of a token, a multiple of `heads`.
        depth: number of layers.
        heads: of their attention.
    """

    def __init__(self, features: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(features, heads, causal=True, reads=True) for _ in range(depth))
        self.norm = nn.LayerNorm(features)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, read)
        return self.norm(x)


class Layers(nn.Sequential):
    """Layers that read nothing, and a last normalisation: (B, L, features) -> (B, L, features)."""

    def __init__(self, depth: int, features: int, heads: int = 4, causal: bool = False, dropout: float = 0.0) -> None:
        layers = (Layer(features, heads, causal, dropout=dropout) for _ in range(depth))
        super().__init__(*layers, nn.LayerNorm(features))

    def forward(self, x: Tensor, known: Tensor | None = None) -> Tensor:
        *layers, norm = self
        for layer in layers:
            x = layer(x, known=known)
        return norm(x)


class Layer(nn.Module):
    """Attention, then two linear layers, each added to its input. If it `reads`, it attends to other features (B, M,
    features) between the two."""

    def __init__(
        self, features: int, heads: int, causal: bool = False, reads: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = Attention(features, heads, causal)
        self.reading = Attention(features, heads) if reads else None
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(3 if reads else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, read: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        own = self.norms[0](x)
        x = x + self.dropout(self.attention(own, own, known))
        if self.reading is not None:
            x = x + self.dropout(self.reading(self.norms[2](x), read))
        return x + self.dropout(self.mlp(self.norms[1](x)))


class Attention(nn.Module):
    """(B, L, features) look at (B, M, features), or with `causal` at those that are no further on. With known (B, M)
    bool, others are not looked at."""

    def __init__(self, features: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.queries, self.keys_values = nn.Linear(features, features), nn.Linear(features, 2 * features)
        self.joined = nn.Linear(features, features)

    def forward(self, x: Tensor, seen: Tensor, known: Tensor | None = None) -> Tensor:
        queries = self.queries(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        keys, values = self.keys_values(seen).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if known is None else known[:, None, None]
        found = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=self.causal)
        return self.joined(found.transpose(1, 2).flatten(2))
