"""Small networks that a CPU can train in minutes."""

from __future__ import annotations

from torch import Tensor, nn


class Encoder(nn.Sequential):
    """Four strided convolutions and average pooling: (B, 3, H, W) images, or grey (B, 1, H, W) -> (B, `features`)."""

    def __init__(self, features: int = 256) -> None:
        channels = (3, 32, 64, 128, features)
        layers = []
        for inputs, outputs in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.expand(-1, 3, -1, -1))

    def stages(self) -> list[nn.Module]:
        """What holds its weights, from input to output: a convolution and what follows it."""
        return [nn.Sequential(*list(self)[place : place + 3]) for place in (0, 3, 6, 9)]


class BagOfWords(nn.Module):
    """(B, L) int64 tokens, 0 for padding -> (B, `features`), the mean of the words' vectors, after dropout."""

    def __init__(self, vocabulary: int, features: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, features, padding_idx=0)
        nn.init.normal_(self.words.weight[1:], std=0.05)
        self.dropout = nn.Dropout(dropout)
        self.features = features

    def forward(self, tokens: Tensor) -> Tensor:
        words = (tokens != 0).sum(1, keepdim=True)
        return self.dropout(self.words(tokens)).sum(1) / words.clamp_min(1)


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers from each width to the next, batch normalisation and ReLU between them: the methods' heads.

    Args:
        widths: of the input, the hidden layers and the output.
        last_norm: normalise the output too, without a scale and a shift of its own.
    """
    *hidden, outputs = widths
    layers = []
    for inputs, width in zip(hidden[:-1], hidden[1:], strict=True):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(hidden[-1], outputs, bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(outputs, affine=False))
    return nn.Sequential(*layers)
