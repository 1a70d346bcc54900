"""CPC: representation learning with contrastive predictive coding (arXiv:1807.03748), of speech."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import info_nce, sample_negatives
from fastssl.train.data.draw import Draw
from fastssl.train.data.speech import FRAMES, frames
from fastssl.train.speech import SpeechModel


class CPC(SpeechModel):
    """From what was heard so far, tell which frame comes next, which second, and so on, among others of the same
    recording.

    Args:
        ahead: how far it is to see, in frames of 20 ms.
        negatives: the number of other frames, or as many as there are.
    """

    def __init__(self, *, ahead: int = 12, negatives: int = 16, features: int = 128) -> None:
        super().__init__(features=features, depth=0)
        if ahead >= FRAMES:
            raise ValueError(f"ahead must be below {FRAMES}, got {ahead}")
        self.ahead, self.negatives = ahead, negatives
        self.predictors = nn.Linear(features, ahead * features, bias=False)

    def views(self, batch: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """(B, samples) int16 windows -> waveforms, and each frame's negatives, frames of its recording (B, T, K)."""
        draw = Draw.of(draw, batch)
        waveforms = self.cropped(batch, draw)
        negatives = sample_negatives(draw.examples, frames(waveforms), self.negatives, generator=draw.generator)
        return waveforms, draw.own(self.steps(negatives))

    def forward(self, waveforms: Tensor, negatives: Tensor) -> tuple[Tensor, ...]:
        """Predictions (B, T, ahead, features), frames (B, T, features), their negatives."""
        heard = self.encoder.frames(waveforms)
        return self.predictors(self.encoder.context(heard)).unflatten(2, (self.ahead, -1)), heard, negatives

    def loss(self, predictions: Tensor, heard: Tensor, negatives: Tensor, group: ProcessGroup | None = None) -> Tensor:
        losses = [
            info_nce(
                predicted[:, :-step].flatten(0, 1),
                heard[:, step:].flatten(0, 1),
                heard.flatten(0, 1),
                negative_ids=self.ids(negatives[:, step:], heard.shape[1]),
                temperature=1.0,
                normalize=False,
            )
            for step, predicted in enumerate(predictions.unbind(2), 1)  # whose gradients are stacked, not summed
        ]
        return torch.stack(losses).mean()

    def monitored(self, predictions: Tensor, heard: Tensor, negatives: Tensor) -> tuple[Tensor, ...]:
        return (heard.flatten(0, 1),)
