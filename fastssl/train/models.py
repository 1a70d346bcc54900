"""Small networks that a CPU can train in minutes."""

from __future__ import annotations

from torch import nn


class Encoder(nn.Sequential):
    """Four strided convolutions and average pooling: (B, 1, 28, 28) images -> (B, `features`)."""

    def __init__(self, features: int = 256) -> None:
        channels = (1, 32, 64, 128, features)
        layers = []
        for inputs, outputs in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = features


class Projector(nn.Sequential):
    """SimCLR's head (arXiv:2002.05709, section 4.2): (B, features) -> (B, outputs) by two layers.

    The hidden layer is batch-normalised, as in the authors' code. It is not used after training.
    """

    def __init__(self, features: int, outputs: int = 128) -> None:
        hidden = nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU(inplace=True)
        super().__init__(*hidden, nn.Linear(features, outputs))


class Expander(nn.Sequential):
    """The head of Barlow Twins and VICReg: (B, features) -> (B, outputs), three layers as wide as the output."""

    def __init__(self, features: int, outputs: int = 1024) -> None:
        layers = []
        for inputs in (features, outputs):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(outputs, outputs, bias=False))
