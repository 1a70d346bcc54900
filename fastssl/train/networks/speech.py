"""Encoders of speech: convolutions over the waveform, and over their frames a Transformer (wav2vec 2.0,
arXiv:2006.11477) or a recurrent network (CPC, arXiv:1807.03748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.train.networks.vit import layers

_KERNELS, _STRIDES = (20, 8, 4, 4), (10, 4, 2, 2)
_PLACES = 31  # frames of which a frame learns its place, those around it


class SpeechEncoder(nn.Module):
    """(B, samples) waveforms -> (B, T, features), a frame for every 160 samples, of 450 samples each.

    Args:
        features: of a frame, a multiple of 8.
        depth: layers of the Transformer; 0: a gated recurrent unit in its place, for which a frame has only those
            before it.
    """

    def __init__(self, features: int = 128, depth: int = 3) -> None:
        super().__init__()
        channels, convolutions = (1, features // 2, *(features for _ in _KERNELS[1:])), []
        for inputs, outputs, kernel, stride in zip(channels[:-1], channels[1:], _KERNELS, _STRIDES, strict=True):
            convolutions += [nn.Conv1d(inputs, outputs, kernel, stride), _Norm(outputs), nn.GELU()]
        self.convolutions = nn.Sequential(*convolutions)
        self.features = features
        if depth:
            self.places = nn.Conv1d(features, features, _PLACES, padding="same", groups=8)
            self.layers = layers(depth, features, heads=4)
        else:
            self.recurrent = nn.GRU(features, features, batch_first=True)

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.context(self.frames(waveforms))

    def frames(self, waveforms: Tensor) -> Tensor:
        """(B, samples) -> (B, T, features), what the convolutions have of each frame by itself."""
        return self.convolutions(waveforms.unsqueeze(1)).transpose(1, 2)

    def context(self, frames: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, T, features) -> what they are beside one another. Where mask (B, T) is not 0, the mask token (features,)
        takes the place of a frame."""
        if mask is not None:
            frames = torch.where(mask.unsqueeze(2) != 0, mask_token.to(frames.dtype), frames)
        if hasattr(self, "recurrent"):
            return self.recurrent(frames)[0]
        return self.layers(frames + F.gelu(self.places(frames.transpose(1, 2))).transpose(1, 2))


class _Norm(nn.LayerNorm):
    """Of the channels (B, channels, T) of each frame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)
