"""Methods with a teacher's distributions or features: that they are what their papers say, and how they collapse."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from fastssl.functional import sinkhorn_center
from fastssl.train import Method, Run, create, fit, two_views
from fastssl.train.methods import dino
from fastssl.train.methods.dino import DINO
from fastssl.train.methods.simsiam import SimSiam
from fastssl.train.networks.models import mlp
from fastssl.train.schedules import Schedule

QUIET = Console(quiet=True)


def new(name: str, **options) -> Method:
    torch.manual_seed(0)
    return create(name, 4, **options)


def inputs_of(method: Method, images, rows: int = 6) -> tuple[torch.Tensor, ...]:
    return method.views(images.train[:rows], torch.Generator().manual_seed(0))


def cross_entropy(student, teacher, center, student_temperature=0.1, teacher_temperature=0.04):
    target = ((teacher - center) / teacher_temperature).softmax(-1)
    return -(target * (student / student_temperature).log_softmax(-1)).sum(-1).mean()


def test_multi_crop_has_two_large_views_and_small_ones(blobs):
    views = inputs_of(new("dino", local_views=3, local_size=8), blobs)
    assert [tuple(view.shape) for view in views] == [(6, 1, 28, 28)] * 2 + [(6, 1, 8, 8)] * 3
    assert len(torch.unique(torch.stack(views[2:]).flatten(1), dim=0)) == 3
    scales = [(view.min_scale, view.max_scale) for view in new("dino", local_scale=0.3).augmentations]
    assert scales == [(0.3, 1)] * 2 + [(0.05, 0.3)] * 4
    strengths = [(view.blur, view.solarise) for view in new("dino", local_views=1).augmentations]
    assert strengths == [(1, 0), (0.1, 0.2), (0.5, 0)]  # the paper's
    with pytest.raises(ValueError, match="local_scale must be from 0.05 to 1, got 0.01"):
        new("dino", local_scale=0.01)
    with pytest.raises(ValueError, match="local_size must be positive, got 0"):
        new("dino", local_size=0)
    with pytest.raises(ValueError, match="local_size must be a multiple of 4, got 6"):
        new("ibot", local_size=6)
    assert len(inputs_of(new("dino", local_views=0), blobs)) == 2


def logits_of(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    bottleneck = F.normalize(head.mlp(x.flatten(0, -2)), dim=1).unflatten(0, x.shape[:-1])
    return bottleneck @ F.normalize(head.last_layer.parametrizations.weight.original1, dim=1).T


@pytest.mark.parametrize("sinkhorn", [False, True])
def test_dino_is_the_papers_pseudocode(blobs, sinkhorn):
    method = new("dino", local_views=1, sinkhorn=sinkhorn)
    nn.init.normal_(method.center, std=0.1)
    with torch.no_grad():
        method.heads[0].last_layer.parametrizations.weight.original1.mul_(3)  # whose lengths do not count
    views = inputs_of(method, blobs)
    student = logits_of(
        method.heads[0], torch.cat([method.encoder(torch.cat(views[:2])), method.encoder(views[2])])
    ).chunk(3)
    encoder, head = method.teacher.module
    teacher = logits_of(head, encoder(torch.cat(views[:2]))).chunk(2)
    before = method.center.clone()
    center = sinkhorn_center(teacher) if sinkhorn else before
    pairs = [(s, t) for s in range(3) for t in range(2) if s != t]
    expected = sum(cross_entropy(student[s], teacher[t], center) for s, t in pairs) / len(pairs)
    logits = method(*views)
    assert [z.requires_grad for z in logits] == [True] * 3 + [False] * 2
    torch.testing.assert_close(method.loss(*logits), expected)
    assignments = ((teacher[0] - center) / 0.04).softmax(1)
    torch.testing.assert_close(method.assignments(*logits), assignments, rtol=1e-4, atol=0)
    torch.testing.assert_close(method.monitored(*logits), tuple(t - center for t in teacher))
    method.after_step(*(z.detach() for z in logits))
    expected = before if sinkhorn else 0.9 * before + 0.1 * torch.cat(teacher).mean(0)
    torch.testing.assert_close(method.center, expected)


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2", "data2vec", "jepa"])
def test_teachers_follow_their_students_weights_slowly(blobs, name):
    """Those of heads with batch normalisation have statistics of their own."""
    method = new(name)
    embeddings = [z.detach() for z in method(*inputs_of(method, blobs))]
    teacher, student = method.teacher.module, getattr(method, "student", method.encoder)
    weights, statistics = ([x.clone() for x in xs()] for xs in (teacher.parameters, teacher.buffers))
    assert name in ("data2vec", "jepa") or all(layer.training for layer in teacher.modules())
    with torch.no_grad():
        for x in student.parameters():
            x.add_(1)
        for x in student.buffers():
            x.add_(1)
    method.after_step(*embeddings)
    steps = torch.cat([(x - y).flatten() for x, y in zip(teacher.parameters(), weights, strict=True)])
    assert 1e-3 < steps.min() and steps.max() < 0.03
    if name not in ("data2vec", "jepa"):
        assert all(map(torch.equal, teacher.buffers(), statistics))


def test_teacher_temperature_warms_up(blobs):
    method = new("dino", teacher_temperature=0.07, first_teacher_temperature=0.03)
    logits = [z.detach() for z in method(*inputs_of(method, blobs))]
    for progress, temperature in ((0.0, 0.03), (0.05, 0.05), (0.1, 0.07), (0.9, 0.07)):
        method.progress = progress
        assert method.temperatures["teacher_temperature"] == pytest.approx(temperature)
        expected = ((logits[-2] - method.center) / temperature).softmax(1)
        torch.testing.assert_close(method.assignments(*logits), expected)


@pytest.mark.parametrize("name, sinkhorn", [("ibot", False), ("ibot", True), ("dinov2", False), ("dinov2", True)])
def test_ibot_hides_patches_of_one_view_and_is_judged_there(blobs, name, sinkhorn):
    method = new(name, local_views=1, sinkhorn=sinkhorn)
    view1, view2, local, mask, ids, first = inputs = inputs_of(method, blobs)
    assert mask.shape == (6, 49) and ids.shape == (6, 15) and mask.sum(1).eq(15).all() and mask.gather(1, ids).all()
    assert first.any() and not first.all()
    *tokens, student, teacher, image1, image2, image3, whole1, whole2 = method(*inputs)
    images = image1, image2, image3, whole1, whole2
    assert student.requires_grad and not teacher.requires_grad and student.shape == teacher.shape == (6, 15, 64)
    nn.init.normal_(method.center, std=0.1), nn.init.normal_(method.patch_center, std=0.1)
    pixels = mask.view(6, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3) * first.view(-1, 1, 1, 1)
    hidden = torch.where(pixels == 1, torch.rand_like(view1), view1)
    found = method(hidden, *inputs[1:])[len(tokens) :]
    torch.testing.assert_close(found[0], student)  # the student does not see them, the teacher does
    torch.testing.assert_close(found[2], image1)
    assert not torch.allclose(found[1][first], teacher[first])
    encoder, *heads = method.teacher.module
    whole = [encoder.split(encoder.layers(encoder.embed(view)))[1] for view in (view1, view2)]
    chosen = [whole[1 - int(first[i])][i, ids[i]] for i in range(6)]
    targets = logits_of(heads[-1], torch.stack(chosen))
    torch.testing.assert_close(teacher @ heads[-1].prototypes.T, targets)
    before = method.patch_center.clone()
    center = sinkhorn_center(targets.flatten(0, 1)) if sinkhorn else before
    patches = cross_entropy(student @ method.heads[-1].prototypes.T, targets, center)
    expected = DINO.loss(method, *images) + patches
    if name == "dinov2":  # whose patches have a head of their own, and whose class tokens keep apart
        assert len(heads) == 2 and not torch.equal(heads[0].prototypes, heads[1].prototypes)
        seen = torch.cat([mask * first[:, None], mask * ~first[:, None]])
        seen = encoder.embed(torch.cat([view1, view2]), mask=seen, mask_token=method.mask_token)
        torch.testing.assert_close(torch.cat(tokens), method.encoder.layers(seen)[:, 0])
        for token in tokens:
            unit = F.normalize(token, dim=1)
            distances = torch.cdist(unit, unit).fill_diagonal_(math.inf)
            expected = expected - 0.1 * distances.amin(1).log().mean()
    embeddings = *tokens, student, teacher, *images
    torch.testing.assert_close(method.loss(*embeddings), expected)
    torch.testing.assert_close(method.assignments(*embeddings), DINO.assignments(method, *images))
    method.after_step(*(z.detach() for z in embeddings))
    expected = before if sinkhorn else 0.9 * before + 0.1 * targets.mean((0, 1))
    torch.testing.assert_close(method.patch_center, expected)


def test_the_students_layers_are_dropped_and_the_teachers_are_not(blobs):
    method = new("ibot", drop_path=0.5, registers=2, layer_scale=0.1)
    assert method.encoder.registers.shape == (2, 128) and method.encoder.layers[0].scales is not None
    inputs = inputs_of(method, blobs)
    logits, again = method(*inputs), method(*inputs)
    assert not torch.equal(logits[0], again[0]) and not torch.equal(logits[2], again[2])
    assert all(torch.equal(logits[i], again[i]) for i in (1, -1, -2))
    with pytest.raises(ValueError, match="drop_path must be from 0 to less than 1, got 1"):
        new("ibot", drop_path=1.0)


def test_data2vec_predicts_the_mean_of_the_teachers_last_layers_where_patches_are_hidden(blobs):
    method = new("data2vec", top_layers=2, beta=0.5)
    images, mask = inputs_of(method, blobs)
    assert mask.sum(1).eq(30).all()
    prediction, target, _ = method(images, mask)
    pixels = mask.view(6, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    hidden = method(torch.where(pixels == 1, torch.rand_like(images), images), mask)
    torch.testing.assert_close(hidden[0], prediction)
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in method.teacher.module.layers
    ]
    method.teacher(images)
    last = [(z - z.mean(2, keepdim=True)) / (z.var(2, keepdim=True, correction=0) + 1e-5).sqrt() for z in outputs[2:4]]
    torch.testing.assert_close(target, (last[0] + last[1]) / 2)
    assert len(hooks) == len(outputs) == 5
    expected = F.smooth_l1_loss(prediction[mask == 1], target[mask == 1], beta=0.5)
    torch.testing.assert_close(method.loss(prediction, target, mask), expected)


def test_jepa_predicts_the_teachers_features_from_the_rest_of_the_image(blobs):
    method = new("jepa")
    images, ids_keep, ids_restore, mask = inputs_of(method, blobs)
    assert ids_keep.shape == (6, 14) and mask.sum(1).eq(35).all() and not mask.gather(1, ids_keep).any()
    prediction, target, _ = method(images, ids_keep, ids_restore, mask)
    pixels = mask.view(6, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    hidden = method(torch.where(pixels == 1, torch.rand_like(images), images), ids_keep, ids_restore, mask)
    torch.testing.assert_close(hidden[0], prediction)
    assert not torch.allclose(hidden[1], target)
    torch.testing.assert_close(target, F.layer_norm(method.teacher(images), (128,)))
    expected = F.smooth_l1_loss(prediction[mask == 1], target[mask == 1])
    torch.testing.assert_close(method.loss(prediction, target, mask), expected)


@pytest.mark.parametrize("name, ratio", [("data2vec", 0), ("data2vec", 1.5), ("jepa", 1), ("jepa", 0), ("ibot", 0)])
def test_masks_hide_something(name, ratio):
    with pytest.raises(ValueError, match=f"mask_ratio must hide at least one of 49 patches.*, got {ratio}"):
        new(name, mask_ratio=ratio)


def test_layers_to_predict_are_there():
    for top_layers in (0, 5):
        with pytest.raises(ValueError, match=f"top_layers must be from 1 to 4, got {top_layers}"):
            new("data2vec", top_layers=top_layers)


def test_schedules():
    schedule = Schedule(1.0, 3.0, 0.5, warmup=0.2)
    assert [schedule(x) for x in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([1, 2, 3, 1.75, 0.5])
    assert Schedule(2.0, 4.0, 6.0)(0) == 4 and Schedule(2.0, 4.0, 6.0)(0.25) == pytest.approx(5 - math.sqrt(0.5))
    assert Schedule(0.0, 1.0, 1.0, warmup=1.0)(1.0) == 1


def test_learning_rate_and_weight_decay_follow_their_schedules(blobs, monkeypatch):
    seen = []

    def look(self):
        seen.append([(group["lr"], group["weight_decay"], group["params"][0].dim()) for group in self.param_groups])

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    fit(
        {"m": new("simclr")},
        blobs.train,
        Run(batch_size=8, steps=8, weight_decay=0.1, final_weight_decay=0.3),
        console=QUIET,
    )
    for step, groups in enumerate(seen):
        progress = (step + 0.5) / 8
        for rate, decay, dim in groups:
            assert decay == pytest.approx((0.2 - 0.1 * math.cos(math.pi * progress)) * (dim > 1))
            assert rate == pytest.approx(2e-3 * Schedule(0, 1, 0, 0.1)(progress))
    seen.clear()
    fit({"m": new("jepa")}, blobs.train, Run(batch_size=8, steps=2, weight_decay=0.1), console=QUIET)
    assert {decay for groups in seen for _, decay, dim in groups if dim > 1} == {
        0.1
    }  # which takes the last one's place


class SmallEncoder(nn.Sequential):
    """Of views of any size."""

    features = 32

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49, 64), nn.GELU(), nn.Linear(64, 32))


@pytest.fixture
def small(monkeypatch):
    """Small encoders for DINO and SimSiam."""
    for module in (dino, two_views):
        monkeypatch.setattr(module, "image_encoder", SmallEncoder)


class Uncentered(DINO):
    def after_step(self, *logits):
        super().after_step(*logits)
        self.center.zero_()


def run(method: Method, images, steps: int, **options):
    history = fit({"m": method}, images.train, Run(batch_size=32, steps=steps, **options), console=QUIET)
    return history["m"][-1].health


@pytest.mark.parametrize(
    "kind, steps, options, prototypes",
    [
        (DINO, 50, {}, None),
        (DINO, 50, {"sinkhorn": True}, None),
        (Uncentered, 150, {}, 1),
        (DINO, 50, {"teacher_temperature": 1.0}, 64),
    ],
    ids=["DINO", "Sinkhorn", "without centering", "without sharpening"],
)
def test_dino_collapses_without_centering_or_sharpening_and_the_alarm_says_so(
    blobs, small, kind, steps, options, prototypes
):
    torch.manual_seed(0)
    method = kind(total_steps=steps, prototypes=64, local_views=2, momentum=0.9, **options)
    health = run(method, blobs, steps, learning_rate=3e-3)
    if prototypes is None:
        assert health.collapse is None and health.used > 1.3 * health.each, health
    else:
        assert health.collapse.startswith("all inputs have nearly the same distribution, over"), health
        assert health.used == pytest.approx(prototypes, rel=0.1)


class WithoutStopGradient(SimSiam):
    def forward(self, view1, view2):
        projections = self.student(torch.cat([view1, view2]))
        return *self.predictor(projections).chunk(2), *projections.chunk(2)


@pytest.mark.parametrize("kind, collapses", [(SimSiam, False), (WithoutStopGradient, True)])
def test_simsiam_collapses_without_its_stop_gradient_and_the_alarm_says_so(blobs, small, kind, collapses):
    """With a projector whose last layer has no batch normalisation: that keeps a batch from having one direction."""
    torch.manual_seed(0)
    method = kind()
    method.projector = mlp(32, 128, 128, 512)
    health = run(method, blobs, 120, learning_rate=1e-2)
    assert (health.collapse is not None) is collapses, health
