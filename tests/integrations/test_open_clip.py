"""open_clip's losses, where it makes them itself. That they are the same is tested in tests/nn."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest

import fastssl

ARGS = {
    "distill": False,
    "model": "ViT-B-32",
    "siglip": False,
    "local_loss": True,
    "gather_with_grad": True,
    "rank": 0,
    "world_size": 1,
    "horovod": False,
    "coca_caption_loss_weight": 2.0,
    "coca_contrastive_loss_weight": 1.0,
    "loss_dist_impl": "bidir",
}
CASES = {
    "ClipLoss": {},
    "SigLipLoss": {"siglip": True},
    "CoCaLoss": {"model": "coca_ViT-B-32"},
    "DistillClipLoss": {"distill": True},
}


@pytest.mark.parametrize("name", CASES)
def test_create_loss(name, open_clip_transformer):
    open_clip = importlib.import_module("open_clip")
    with fastssl.patch("open_clip"):
        loss = open_clip.create_loss(SimpleNamespace(**{**ARGS, **CASES[name]}))
        assert type(loss) is getattr(fastssl.nn, name)
    theirs = open_clip.create_loss(SimpleNamespace(**{**ARGS, **CASES[name]}))
    assert type(theirs).__module__ == "open_clip.loss" and type(theirs).__name__ == name
    for attribute, value in vars(theirs).items():
        if attribute in vars(loss) and not attribute.startswith("_") and attribute != "caption_loss":
            assert getattr(loss, attribute) == value
