"""ModelEmaV3 beside timm's."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import fastssl
from fastssl.integrations.timm import ModelEmaV3


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.register_buffer("mask", torch.ones(2), persistent=False)
    return model


@torch.no_grad()
def _train(model: nn.Module) -> None:
    for x in model.parameters():
        x.add_(torch.randn_like(x))
    model(torch.randn(8, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.7},
        {"decay": 0.9, "min_decay": 0.3, "update_after_step": 2, "use_warmup": True, "warmup_gamma": 2.0},
        {"decay": 0.7, "exclude_buffers": True},
        {"decay": 0.7, "foreach": False, "device": "cpu"},
        {"decay": 0.7, "dtype": torch.float64},
    ],
)
def test_model_ema_is_timms(options, timm):
    student = _model()
    mine, theirs = ModelEmaV3(student, **options), timm.utils.ModelEmaV3(student, **options)
    for step in (None, 0, 1, 2, 3, 4, 50, None):
        _train(student)
        assert mine.get_decay(step) == pytest.approx(theirs.get_decay(step), abs=1e-12)
        mine.update(student, step)
        theirs.update(student, step)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    x = torch.randn(5, 4, dtype=options.get("dtype"))
    torch.testing.assert_close(mine(x), theirs(x))
    _train(student)
    for ema in (mine, theirs):
        ema.set(student)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_state_goes_both_ways(timm):
    student, other = _model(), _model()
    for Source, Target in ((ModelEmaV3, timm.utils.ModelEmaV3), (timm.utils.ModelEmaV3, ModelEmaV3)):
        source, target = Source(student), Target(other)
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.state_dict(), source.state_dict())
    assert copy.deepcopy(target).decay == 0.9999


def test_16_bits_do_not_lose_steps():
    student = nn.Linear(4, 3).bfloat16()
    ema = ModelEmaV3(student, 0.9999)
    before = ema.module.weight.clone()
    with torch.no_grad():
        student.weight += 1
    for _ in range(10):
        ema.update(student)
    torch.testing.assert_close(ema.module.weight - before, torch.full((3, 4), 1 - 0.9999**10), rtol=1e-2, atol=1e-5)
    assert ema(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


def test_arguments_are_timms(timm):
    mine, theirs = (list(inspect.signature(c.__init__).parameters) for c in (ModelEmaV3, timm.utils.ModelEmaV3))
    assert set(theirs) <= set(mine)
    for options, match in (
        ({"decay": 2}, "decay"),
        ({"warmup_gamma": 0}, "gamma"),
        ({"update_after_step": -1}, "step"),
    ):
        with pytest.raises(ValueError, match=match):
            ModelEmaV3(_model(), **options)


def test_patched(timm):
    theirs = timm.utils.ModelEmaV3
    with fastssl.patch("timm"):
        assert timm.utils.ModelEmaV3 is timm.utils.model_ema.ModelEmaV3 is ModelEmaV3
    assert timm.utils.ModelEmaV3 is theirs
