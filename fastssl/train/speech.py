"""What methods for speech have in common: windows of speech, an encoder, and what its features say of the words."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from fastssl.functional import span_masking_ids
from fastssl.train.data import speech
from fastssl.train.data.draw import Draw
from fastssl.train.data.mel import log_mel
from fastssl.train.data.speech import FRAMES, HOP, MARGIN, RATE, Prompt, Speech
from fastssl.train.device import move
from fastssl.train.evaluate import health
from fastssl.train.method import Method
from fastssl.train.networks.speech import SpeechEncoder

_SECONDS = 4  # of a prompt whose words are to be found, at most
_UNIT = RATE // 4  # samples, of which a prompt gets a multiple, so that there are batches
_LEARNT, _TESTED = 10, 3  # prompts of a speaker that have a word, at least


class SpeechModel(Method):
    """An encoder of speech.

    Args:
        features: of a frame, a multiple of 8.
        depth: layers of the Transformer.

    Raises:
        ValueError: if features is no multiple of 8.
    """

    batch_size = 16
    learning_rate = 1e-3
    weight_decay = 0.01

    def __init__(self, *, features: int = 128, depth: int = 3) -> None:
        super().__init__()
        if features % 8:
            raise ValueError(f"features must be a multiple of 8, got {features}")
        self.encoder = SpeechEncoder(features, depth)

    @staticmethod
    def load(directory: str | os.PathLike[str] | None) -> Speech:
        return speech.load(directory)

    def cropped(self, windows: Tensor, draw: Draw) -> Tensor:
        """(B, samples) int16 windows -> waveforms of MARGIN frames less, each of which begins where it likes."""
        starts = draw.own(torch.randint(MARGIN + 1, (draw.examples, 1), generator=draw.generator))
        places = HOP * starts + torch.arange(windows.shape[1] - HOP * MARGIN, device=windows.device)
        return speech.to_float(windows.gather(1, places))

    @staticmethod
    def steps(negatives: Tensor) -> Tensor:
        """What `sample_negatives` drew (B, T, K), numbered within each recording, wherever that comes to be."""
        batch, length, _ = negatives.shape
        return (negatives - length * torch.arange(batch).view(-1, 1, 1)).clamp_min(-1)

    @staticmethod
    def ids(steps: Tensor, length: int) -> Tensor:
        """Steps (B, M, K) of recordings of that length -> ids (B M, K) of `info_nce`."""
        first = length * torch.arange(len(steps), device=steps.device).view(-1, 1, 1)
        return (first + steps).where(steps >= 0, -1).flatten(0, 1)

    def evaluate(self, dataset: Speech) -> dict[str, float]:
        """How well a linear classifier of a prompt's mean features finds the words that its speaker often says; where
        there are none, the effective rank of these features, as a share of their dimensions."""
        prompts = [p for p in dataset.prompts if len(p.waveform) <= _SECONDS * RATE]
        if not prompts:
            return {}
        training = self.training
        self.eval()
        learnt = of_prompts(prompts, lambda waveforms: self.encoder(move(waveforms, self.device)).mean(1).cpu())
        self.train(training)
        if not any(words for *_, words in _often_said(prompts)):
            return {f"effective rank, of {learnt.shape[1]} dimensions": health([learnt]).rank / learnt.shape[1]}
        statistics = of_prompts(prompts, lambda waveforms: torch.cat(torch.std_mean(log_mel(waveforms), 1), 1))
        (precision, chance, words), (of_statistics, *_) = (words_found(prompts, x) for x in (learnt, statistics))
        test = f"mean average precision of {words} words in held-out prompts"
        return {f"{test} (log-mel statistics {of_statistics:.1%}, chance {chance:.1%})": precision}


class MaskedSpeechModel(SpeechModel):
    """An encoder of speech some of whose frames are hidden from the Transformer, in spans.

    Args:
        mask_ratio: the share of frames that is hidden: at least one is.
        span: frames of a span, of 20 ms each.
    """

    def __init__(self, *, mask_ratio: float = 0.5, span: int = 10, features: int = 128, depth: int = 3) -> None:
        super().__init__(features=features, depth=depth)
        if mask_ratio > 1 or not int(FRAMES * (1 - mask_ratio)) < FRAMES:
            raise ValueError(f"mask_ratio must hide at least one of {FRAMES} frames, got {mask_ratio}")
        if not 1 <= span <= FRAMES:
            raise ValueError(f"span must be from 1 to {FRAMES}, got {span}")
        self.mask_ratio, self.span = mask_ratio, span
        self.mask_token = nn.Parameter(0.02 * torch.randn(features))

    def mask(self, waveforms: Tensor, draw: Draw) -> Tensor:
        """Of the whole batch (B, T), on the CPU: 1 where a frame of the waveforms (rows, samples) is to be hidden."""
        length = speech.frames(waveforms)
        span = min(self.span, length)
        return span_masking_ids(draw.examples, length, self.mask_ratio, span, generator=draw.generator)[1]


@torch.no_grad()
def of_prompts(prompts: Sequence[Prompt], function: Callable[[Tensor], Tensor], batch_size: int = 64) -> Tensor:
    """(N, D), what it makes of waveforms (B, samples). Zeros fill up each to the next quarter of a second."""
    lengths = torch.tensor([math.ceil(len(p.waveform) / _UNIT) for p in prompts])
    order, rows = lengths.argsort(stable=True), []
    for length, count in zip(*lengths.unique(return_counts=True), strict=True):
        first = sum(map(len, rows))
        for batch in order[first : first + count].split(batch_size):
            waveforms = (speech.to_float(prompts[i].waveform) for i in batch.tolist())
            rows.append(function(torch.stack([F.pad(x, (0, length * _UNIT - len(x))) for x in waveforms])))
    return torch.cat(rows)[order.argsort()]


def words_found(prompts: Sequence[Prompt], features: Tensor) -> tuple[float, float, int]:
    """For each word that a speaker often says, a logistic regression on the standardised features (N, D) of the prompts
    that are not held out ranks those that are, of this speaker: the mean average precision, that of ranking them by
    chance, and the number of words."""
    precisions, chances = [], []
    for train, test, words in _often_said(prompts):
        mean, std = features[train].mean(0), features[train].std(0).clamp_min(1e-6)
        x, x_test = (((features[part] - mean) / std).numpy() for part in (train, test))
        for word in words:
            y, y_test = ([word in prompts[i].words for i in part] for part in (train, test))
            classifier = LogisticRegression(tol=1e-3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are meant to be the limit
                classifier.fit(x, y)
            precisions.append(average_precision_score(y_test, classifier.decision_function(x_test)))
            chances.append(sum(y_test) / len(y_test))
    return sum(precisions) / len(precisions), sum(chances) / len(chances), len(precisions)


def _often_said(prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], list[int], list[str]]]:
    """Of each speaker, the positions of prompts to learn from and of those held out, and words that both often have."""
    for speaker in sorted({prompt.speaker for prompt in prompts}):
        places = [i for i, prompt in enumerate(prompts) if prompt.speaker == speaker]
        train, test = ([i for i in places if prompts[i].tested == tested] for tested in (False, True))
        learnt, tested = (Counter(word for i in part for word in prompts[i].words) for part in (train, test))
        yield train, test, sorted(w for w in learnt if _LEARNT <= learnt[w] < len(train) and tested[w] >= _TESTED)
