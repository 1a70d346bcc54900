"""Random views of images: each step does what it says, to the examples that it is drawn for, and to no others."""

import colorsys
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl.train import create
from fastssl.train.data.augment import Augmentation, gaussian_blur, to_float, turn_hue
from fastssl.train.data.draw import Draw

NOTHING = Augmentation(min_scale=1, max_aspect=1, flip=0, jitter=0, grey=0, blur=0)
ALL = Augmentation(solarise=0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator())


@pytest.mark.parametrize("shape", [(28, 28), (3, 32, 32), (3, 20, 30)])
def test_views_are_reproducible_and_differ_within_a_batch(shape):
    batch = pictures(1, *shape).expand(16, *shape)
    view = ALL(batch, generator())
    assert view.shape == (16, 3 if len(shape) == 3 else 1, *shape[-2:]) and view.dtype == torch.float32
    assert 0 <= view.min() and view.max() <= 1
    assert torch.equal(view, ALL(batch, generator()))
    assert not torch.equal(view, ALL(batch, generator(1)))
    assert torch.unique(view, dim=0).shape[0] == 16
    assert ALL(batch, generator(), 12).shape[-2:] == (12, 12)


@pytest.mark.parametrize("shape", [(28, 28), (3, 32, 32)])
def test_views_of_some_examples_are_those_that_they_have_in_the_whole_batch(shape):
    batch, rows = pictures(12, *shape), torch.tensor([7, 2, 11])
    draw = Draw(generator(), 12, rows)
    torch.testing.assert_close(ALL(batch[rows], draw), ALL(batch, generator())[rows])


def test_nothing_changes_nothing():
    for batch in (pictures(4, 28, 28), pictures(4, 3, 20, 30)):
        torch.testing.assert_close(NOTHING(batch, generator()), to_float(batch), atol=1e-5, rtol=0)
        weak = replace(NOTHING, jitter=1, brightness=0, contrast=0, saturation=0, hue=0)
        torch.testing.assert_close(weak(batch, generator()), to_float(batch), atol=1e-5, rtol=0)


def test_crop_covers_the_area_asked_for_and_stays_inside():
    columns = torch.linspace(0, 255, 256).to(torch.uint8).expand(64, 256, 256)  # values tell columns
    crop = replace(NOTHING, min_scale=0.25, max_scale=0.25)
    for size in (None, 64):
        view = crop(columns, generator(), size)
        left, right = view.amin((1, 2, 3)), view.amax((1, 2, 3))
        torch.testing.assert_close(right - left, torch.full((64,), 0.5), atol=0.02, rtol=0)
        assert left.min() < 0.1 and right.max() > 0.9
    wide = replace(crop, min_scale=0.2, max_scale=0.2, max_aspect=2.0)(columns, generator())
    widths = wide.amax((1, 2, 3)) - wide.amin((1, 2, 3))
    assert math.sqrt(0.1) - 0.02 < widths.min() < 0.36 and 0.57 < widths.max() < math.sqrt(0.4) + 0.02
    areas = (replace(NOTHING, min_scale=0.25)(columns, generator())[:, 0, 0, [0, -1]].diff(dim=1)).square()
    assert areas.min() < 0.35 and areas.max() > 0.9 and 0.55 < areas.mean() < 0.7


def test_flip_mirrors_its_share():
    batch = pictures(200, 3, 8, 8)
    view = replace(NOTHING, flip=0.3)(batch, generator())
    same = (view - to_float(batch)).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (view - to_float(batch).flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (same ^ mirrored).all() and 40 <= mirrored.sum() <= 80


def test_hue_is_turned_as_hsv_has_it():
    images = torch.rand(6, 3, 4, 5, generator=generator())
    images[0], images[1, :, 0] = 0.5, torch.tensor([1.0, 0, 0])[:, None]  # grey, and pure red
    turns = torch.tensor([0.3, 1 / 3, -0.5, 0.5, 0.0, -0.07])
    found = turn_hue(images, turns)
    for image, turned, turn in zip(images, found, turns.tolist(), strict=True):
        for pixel, seen in zip(image.flatten(1).T.tolist(), turned.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            assert seen == pytest.approx(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), abs=1e-5)


@pytest.mark.parametrize("step", ["brightness", "contrast", "saturation", "hue"])
def test_each_way_of_the_jitter_changes_its_share_and_no_more_than_its_strength(step):
    batch = (pictures(300, 3, 6, 6) // 4 + 80).to(torch.uint8)  # far from 0 and 1, where values are cut
    only = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0) | {step: 0.3}
    view, plain = replace(NOTHING, jitter=0.8, **only)(batch, generator()), to_float(batch)
    changed = (view - plain).abs().amax((1, 2, 3)) > 1e-4
    assert 220 <= changed.sum() <= 260
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey, seen = ((luma * x).sum(1, keepdim=True) for x in (plain, view))
    if step == "hue":
        chroma = [x.amax(1) - x.amin(1) for x in (plain, view)]
        torch.testing.assert_close(*chroma, atol=1e-5, rtol=0)
        return
    whole, moved = plain, view
    if step == "contrast":
        centre = grey.mean((2, 3), keepdim=True)
        whole, moved = plain - centre, view - centre
    if step == "saturation":
        whole, moved = plain - grey, view - grey
        torch.testing.assert_close(grey, seen, atol=1e-4, rtol=0)
    factor = (whole * moved).sum((1, 2, 3)) / whole.square().sum((1, 2, 3))
    torch.testing.assert_close(moved, whole * factor.view(-1, 1, 1, 1), atol=1e-4, rtol=0)
    assert 0.7 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.3001


def test_grey_blur_and_solarisation_take_their_shares():
    batch = pictures(300, 3, 20, 20)
    plain = to_float(batch)

    def differ(**strength):
        view = replace(NOTHING, **strength)(batch, generator())
        return view, (view - plain).abs().amax((1, 2, 3)) > 1e-3

    view, changed = differ(grey=0.2)
    assert 40 <= changed.sum() <= 80 and (view[changed] - view[changed][:, :1]).abs().max() < 1e-6
    view, changed = differ(blur=0.5)
    assert 115 <= changed.sum() <= 185 and (view[changed].std((2, 3)) < plain[changed].std((2, 3))).all()
    view, changed = differ(solarise=0.2)
    assert 40 <= changed.sum() <= 80
    torch.testing.assert_close(view[changed], torch.minimum(plain, 1 - plain)[changed], atol=2e-5, rtol=0)


def test_blur_is_a_convolution_with_a_gaussian_of_a_tenth_of_the_image():
    image = pictures(1, 40, 40)
    x = torch.arange(-2.0, 3.0)
    kernel = torch.exp(-x.square() / (2 * 0.7**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    expected = F.conv2d(F.pad(to_float(image), (2, 2, 2, 2), mode="replicate"), kernel[None, None])
    torch.testing.assert_close(gaussian_blur(to_float(image), torch.tensor([0.7]), 2), expected)
    point = torch.zeros(1, 60, 60, dtype=torch.uint8)
    point[:, 30, 30] = 255
    view = replace(NOTHING, blur=1, max_sigma=50)(point, generator())
    assert (view > 1e-4).sum() == 7 * 7


@pytest.mark.parametrize(
    "strength, message",
    [
        ({"min_scale": 0}, "min_scale must be above 0 and at most max_scale, 1.0, got 0"),
        ({"max_scale": 0.05}, "min_scale must be above 0 and at most max_scale, 0.05, got 0.08"),
        ({"max_aspect": 0.5}, "max_aspect must be at least 1, got 0.5"),
        ({"hue": 0.6}, "hue must be from 0 to 0.5, got 0.6"),
        ({"contrast": -1}, "contrast must not be negative, got -1"),
        ({"max_sigma": 0}, "max_sigma must be at least 0.1, got 0"),
        ({"grey": math.nan}, "grey must be from 0 to 1, got nan"),
        ({"solarise": 2}, "solarise must be from 0 to 1, got 2"),
        ({"brightness": math.inf}, "brightness must be finite, got inf"),
    ],
)
def test_bad_strengths(strength, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**strength)
    with pytest.raises(TypeError, match="must be a number, got str"):
        Augmentation(**dict.fromkeys(strength, "much"))


def test_a_method_takes_strengths_for_all_of_its_views():
    method = create("byol", 2, augment={"solarise": 0.25, "min_scale": 0.5})
    assert [(view.solarise, view.min_scale, view.blur) for view in method.augmentations] == [(0.25, 0.5, 0.5)] * 2
    assert method.options["augment"] == {"solarise": 0.25, "min_scale": 0.5}
    assert "augment" not in create("byol", 2).options
    with pytest.raises(ValueError, match="augment must be empty for a method that has no views of images, got"):
        create("simcse", 2, augment={"hue": 0.1})


def test_the_command_has_an_option_for_each_strength(monkeypatch):
    from fastssl.train.__main__ import _parser

    options = [f"--{field.name.replace('_', '-')}=0.125" for field in fields(Augmentation)]
    parsed = _parser().parse_args(["moco_v1", *options])
    assert all(getattr(parsed, field.name) == 0.125 for field in fields(Augmentation))
    assert _parser().parse_args(["moco_v1", "--hue", "0"]).hue == 0
    assert all(getattr(_parser().parse_args(["moco_v1"]), field.name) is None for field in fields(Augmentation))
