"""Small runs that the tests of the trainer share."""

import os
import signal

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from fastssl.train import METHODS, Method, Run, create, fit
from fastssl.train.data.speech import MARGIN, samples

QUIET = Console(quiet=True)
IMAGES = torch.randint(256, (48, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STEPS = 5
SMALL_SPEECH = {"features": 16}  # options of methods for speech


class Tiny(Method):
    """One linear layer with dropout that is to forget its inputs."""

    def __init__(self, loss=lambda z: z.square().mean()):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 8))
        self.loss = loss

    @staticmethod
    def views(batch, generator):
        return (batch.unsqueeze(1) / 255 + 0.1 * torch.rand(len(batch), 1, 28, 28, generator=generator),)

    def forward(self, view):
        return (self.encoder(view),)


def tiny(**options) -> Tiny:
    torch.manual_seed(0)
    return Tiny(**options)


def new(name: str, **options) -> Method:
    torch.manual_seed(0)
    return create(name, STEPS, **small(name), **options)


def small(name: str) -> dict[str, int]:
    """Options with which a step of it takes no long time."""
    return SMALL_SPEECH if METHODS[name].load is METHODS["cpc"].load else {}


def spoken(windows: int) -> torch.Tensor:
    """Windows of noise of which examples of 16 frames are taken."""
    shape = windows, samples(MARGIN + 16)
    return torch.randint(-999, 999, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(0))


def data_of(method: Method):
    if type(method).__name__ in ("SupCon", "Supervised"):
        return torch.utils.data.TensorDataset(IMAGES, torch.arange(len(IMAGES)) % 3)
    if method.load is METHODS["cpc"].load:
        return spoken(len(IMAGES))
    tokens = torch.randint(1, 99, (len(IMAGES), 6), generator=torch.Generator().manual_seed(0))
    if method.load in (METHODS["clip"].load, METHODS["coca"].load):
        return torch.utils.data.TensorDataset(IMAGES.unsqueeze(1).expand(-1, 3, -1, -1), tokens)
    return tokens if method.load in [METHODS[name].load for name in ("simcse", "simcse_bert", "bert")] else IMAGES


class InterruptAfter:
    """A writer that presses Ctrl-C, or sends another signal, while step `step` is being done."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number, self.pressed = step, number, False

    def add_scalar(self, label, value, step):
        if step == self.step and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), self.number)


def run(method: Method, steps: int = STEPS, writer=None, **options):
    history = fit(
        {"m": method}, data_of(method), Run(batch_size=16, steps=steps, **options), writer=writer, console=QUIET
    )
    return [step.loss for step in history["m"]]
