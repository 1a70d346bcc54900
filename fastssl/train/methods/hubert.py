"""HuBERT: self-supervised speech representation learning by masked prediction of hidden units (arXiv:2106.07447)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import linear_cross_entropy
from fastssl.train import clusters
from fastssl.train.data.draw import Draw
from fastssl.train.data.mel import MFCCS, mfcc
from fastssl.train.data.speech import Speech, to_float
from fastssl.train.speech import MaskedSpeechModel

_WINDOWS = 256  # whose frames units are learned from


class HuBERT(MaskedSpeechModel):
    """Spans of frames are hidden. Tell the hidden unit of each: which of the centroids of MFCCs its own are nearest to.
    They are found by k-means before the first step.

    Args:
        units: their number.
        temperature: of the softmax over cosine similarities with the units' embeddings.
    """

    def __init__(
        self,
        *,
        units: int = 100,
        temperature: float = 0.1,
        mask_ratio: float = 0.5,
        span: int = 10,
        features: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__(mask_ratio=mask_ratio, span=span, features=features, depth=depth)
        self.temperature = temperature
        self.project = nn.Linear(features, features)
        self.units = nn.Parameter(torch.randn(units, features))
        self.register_buffer("centroids", torch.randn(units, MFCCS))

    @torch.no_grad()
    def prepare(self, dataset: Speech) -> None:
        generator = torch.Generator().manual_seed(0)
        windows = dataset.train[torch.randperm(len(dataset.train), generator=generator)[:_WINDOWS]]
        coefficients = torch.cat([mfcc(to_float(batch)) for batch in windows.split(64)]).flatten(0, 1)
        self.centroids.copy_(clusters.kmeans(coefficients, len(self.centroids), generator))

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, samples) int16 windows -> waveforms; mask (B, T); units (B, T) of hidden frames, -100 elsewhere."""
        draw = Draw.of(draw, batch)
        waveforms = self.cropped(batch, draw)
        mask = draw.own(self.mask(waveforms, draw))
        coefficients = mfcc(waveforms).flatten(0, 1).to(self.centroids)
        units = clusters.assign(coefficients, self.centroids).view(mask.shape)
        return waveforms, mask, units.masked_fill(mask == 0, -100)

    def forward(self, waveforms: Tensor, mask: Tensor, units: Tensor) -> tuple[Tensor, ...]:
        """Features (B, T, features), and the units."""
        seen = self.encoder.frames(waveforms)
        return self.project(self.encoder.context(seen, mask, self.mask_token)), units

    def loss(self, features: Tensor, units: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return linear_cross_entropy(features, self.units, units, temperature=self.temperature, normalize=True)

    def monitored(self, features: Tensor, units: Tensor) -> tuple[Tensor, ...]:
        return (features.flatten(0, 1),)
