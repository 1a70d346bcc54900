"""The reference trainer: models of timm as image encoders."""

import io
import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from fastssl.train import Run, create, fit
from fastssl.train.evaluate import features
from fastssl.train.networks.models import Encoder, Timm

IMAGES = torch.randint(256, (16, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def new(name: str, backbone: str | None):
    torch.manual_seed(0)
    return create(name, 2, backbone=backbone)


def train(method, **options):
    history = fit({"a": method}, IMAGES, Run(batch_size=8, steps=2, **options), console=Console(file=io.StringIO()))
    return [step.loss for step in history["a"]]


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_a_model_of_timm_is_trained(timm, name, tmp_path):
    method = new(name, "resnet10t")
    assert isinstance(method.encoder, Timm) and method.options["backbone"] == "resnet10t"
    assert method.encoder.features == 512
    before = [p.clone() for p in method.encoder.parameters()]
    losses = train(method, checkpoint=tmp_path / "run.pt")
    assert all(not torch.equal(p, q) for p, q in zip(before, method.encoder.parameters(), strict=True))
    assert features(method.encoder, IMAGES).shape == (16, 512)
    assert train(new(name, "resnet10t"), checkpoint=tmp_path / "run.pt", resume=True) == losses
    with pytest.raises(ValueError, match="is of a run with methods"):
        train(new(name, None), checkpoint=tmp_path / "run.pt", resume=True)


def test_one_that_must_know_the_size_of_images(timm):
    assert Timm("vit_tiny_patch16_224", 32)(torch.rand(2, 1, 32, 32)).shape == (2, 192)


@pytest.mark.parametrize(
    "name, match",
    [
        ("vit_tiny_patch16_224", "have patches that divide images of size 28, got 'vit_tiny_patch16_224'"),
        ("inception_v3", "take images of size 28, got 'inception_v3': .*Kernel size"),
    ],
)
def test_one_that_cannot_take_the_images(timm, name, match):
    with pytest.raises(ValueError, match=f"backbone must {match}"):
        new("simclr", name)


def test_features_are_the_widths_of_outputs(timm):
    encoder = Timm("mobilenetv3_small_050", 32)
    assert encoder.training and all(module.training for module in encoder.modules())
    assert encoder.features == encoder(torch.rand(2, 1, 32, 32)).shape[1] == 1024


def test_a_method_made_afterwards_has_the_small_encoder(timm):
    new("simclr", "resnet10t")
    assert isinstance(new("simclr", None).encoder, Encoder)


@pytest.mark.parametrize("name", ["mae", "simcse"])
def test_a_method_with_an_encoder_of_its_own_takes_none(timm, name):
    with pytest.raises(ValueError, match="backbone must be None for a method that has an encoder of its own, got 'res"):
        new(name, "resnet10t")


def test_an_unknown_model(timm):
    with pytest.raises(ValueError, match="backbone must be the name of a model of timm, got 'nonsense'"):
        new("simclr", "nonsense")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"backbone needs timm \(pip install timm\)"):
        new("simclr", "resnet10t")
