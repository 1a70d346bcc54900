"""What people hear of a frame of speech: log-mel energies, and MFCCs (Davis and Mermelstein 1980)."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.train.data.speech import HOP, LENGTH, RATE
from fastssl.train.device import move

BANDS = 40
_COEFFICIENTS = 13
MFCCS = 3 * _COEFFICIENTS
_WINDOW, _POINTS = 256, 512  # samples in the middle of a frame, 32 ms; points of the Fourier transform
_FLOOR = 1e-2  # of energies: some 40 dB below the mean of waveforms of variance 1


def log_mel(waveforms: Tensor) -> Tensor:
    """(..., samples) of variance 1 -> (..., frames, BANDS), of the frames that `SpeechEncoder` has."""
    before = (LENGTH - _WINDOW) // 2
    windows = waveforms.unfold(-1, LENGTH, HOP)[..., before : before + _WINDOW] * torch.hann_window(
        _WINDOW, device=waveforms.device
    )
    energies = torch.fft.rfft(windows, _POINTS).abs().square()
    return (energies @ move(_bank(), waveforms.device) + _FLOOR).log()


def mfcc(waveforms: Tensor) -> Tensor:
    """(..., samples) -> (..., frames, MFCCS): the first coefficients of the cosine transform of `log_mel`, and their
    differences from frame to frame, once and twice; each of mean 0 and variance 1 over the frames, so that they do not
    tell voices and telephone lines."""
    band, number = (torch.arange(count, device=waveforms.device) for count in (BANDS, _COEFFICIENTS))
    coefficients = log_mel(waveforms) @ torch.cos((band[:, None] + 0.5) * (math.pi / BANDS) * number)
    first = _differences(coefficients)
    x = torch.cat([coefficients, first, _differences(first)], -1)
    return F.layer_norm(x.transpose(-1, -2), x.shape[-2:-1]).transpose(-1, -2)


def _differences(x: Tensor) -> Tensor:
    """(..., frames, D): half of the next frame minus the one before, at either end of the frame itself."""
    around = torch.cat([x[..., :1, :], x, x[..., -1:, :]], -2)
    return (around[..., 2:, :] - around[..., :-2, :]) / 2


@functools.cache
def _bank() -> Tensor:
    """(_POINTS / 2 + 1, BANDS): triangles, equally far from one another on the mel scale."""
    highest = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest, BANDS + 2) / 2595) - 1)
    frequency = torch.linspace(0, RATE / 2, _POINTS // 2 + 1)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0)
