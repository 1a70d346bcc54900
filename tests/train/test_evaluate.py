"""What features are worth: neighbours, linear probe, and the alarm that goes off when they collapse."""

import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fastssl.train import Method, Run, Step, fit
from fastssl.train.evaluate import Health, features, health, knn_accuracy, probe_accuracy
from fastssl.train.loop import _report

IMAGES = torch.randint(256, (64, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def clusters(rows: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(7, (rows,))
    return centres[labels] + spread * torch.randn(rows, 12), labels


def test_knn_accuracy_is_scikit_learns():
    (train, train_labels), (test, test_labels) = clusters(300, 1.5), clusters(120, 1.5)
    classifier = KNeighborsClassifier(5, metric="cosine").fit(train, train_labels)
    expected = classifier.score(test, test_labels)
    assert 0.3 < expected < 0.9
    assert knn_accuracy(train, test, train_labels, test_labels, k=5) == pytest.approx(expected, abs=0.02)  # ties
    assert knn_accuracy(train, test, train_labels, test_labels, k=1) == pytest.approx(
        KNeighborsClassifier(1, metric="cosine").fit(train, train_labels).score(test, test_labels)
    )


def test_probe_finds_a_direction_that_neighbours_do_not():
    x, y = torch.randn(400, 30), torch.randint(2, (400,))
    x[:, 0] = 0.05 * (2 * y - 1) + 0.01 * torch.randn(400)
    parts = x[:300], x[300:], y[:300], y[300:]
    assert probe_accuracy(*parts) > 0.97 > 0.7 > knn_accuracy(*parts)
    x[:, 1] = 3  # a constant feature is no trouble
    assert probe_accuracy(*parts) > 0.97


def test_the_probe_is_scikit_learns():
    (train, train_labels), (test, test_labels) = clusters(300, 1.5), clusters(2000, 1.5)
    mean, std = train.mean(0), train.std(0)
    classifier = LogisticRegression(tol=1e-6).fit((train - mean) / std, train_labels)
    expected = classifier.score((test - mean) / std, test_labels)
    assert 0.3 < expected < 0.9
    with torch.no_grad():  # as `evaluate` calls it
        assert probe_accuracy(train, test, train_labels, test_labels) == pytest.approx(expected, abs=0.005)


def test_features_are_those_of_evaluation_mode_and_means_of_tokens():
    class Tokens(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1), 3 * x.flatten(1)], 1)

    encoder, seen = nn.Sequential(nn.Dropout(0.5), Tokens()), []
    encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    pixels = IMAGES[0].numel()
    for at_a_time, images in ((17 * pixels, 17), (pixels // 2, 1)):
        found = features(encoder, IMAGES, at_a_time)
        torch.testing.assert_close(found, IMAGES.flatten(1) / 127.5)
        assert encoder.training and max(seen) == images
        seen.clear()


def test_effective_rank_uniformity_and_alignment_of_known_embeddings():
    orthonormal, _ = torch.linalg.qr(torch.randn(64, 16))
    assert health([orthonormal]).rank == pytest.approx(16, rel=1e-3)
    assert health([orthonormal[:, :3] @ torch.eye(3, 16)]).rank == pytest.approx(3, rel=1e-3)
    circle = torch.arange(4096) * (2 * math.pi / 4096)
    measured = health([torch.stack([circle.cos(), circle.sin()], 1), torch.stack([-circle.sin(), circle.cos()], 1)])
    assert measured.alignment == pytest.approx(2, rel=1e-3)  # a right angle
    assert measured.uniformity == pytest.approx(math.log(torch.special.i0e(torch.tensor(4.0))), rel=1e-2)
    assert health([orthonormal]).alignment is None


@pytest.mark.parametrize(
    "embeddings, collapsed",
    [
        (torch.ones(64, 16), True),
        (torch.ones(64, 16) + 1e-3 * torch.randn(64, 16), True),
        (torch.ones(64, 16) * torch.tensor([1.0, -1.0]).repeat(32)[:, None], True),
        (torch.zeros(64, 16), True),
        (torch.full((64, 16), math.nan), True),
        (torch.ones(64, 16) + 0.1 * torch.randn(64, 16), False),
        (torch.randn(64, 16), False),
        (torch.randn(64, 2), False),
    ],
    ids=["one", "nearly one", "one or its opposite", "zeros", "nan", "a cone", "all over", "a plane"],
)
def test_collapse_is_told_from_its_like(embeddings, collapsed):
    assert (health([embeddings]).collapse is not None) is collapsed


class Attract(Method):
    """Two views of an image attract each other, and nothing keeps all images from becoming one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 8))
        nn.init.constant_(self.encoder[1].bias, 3)

    @staticmethod
    def views(batch, generator):
        return tuple(batch.unsqueeze(1) / 255 + torch.rand(len(batch), 1, 28, 28, generator=generator) for _ in "ab")

    def forward(self, view1, view2):
        return self.encoder(view1), self.encoder(view2)

    def loss(self, z1, z2):
        return (z1 - z2).square().mean()


class Repel(Attract):
    def loss(self, z1, z2):
        return super().loss(z1, z2) + z1.std(0).sub(1).square().mean()


@pytest.mark.parametrize("method, collapses", [(Attract, True), (Repel, False)])
def test_a_collapsed_run_says_so(method, collapses):
    console = Console(file=io.StringIO(), width=200)
    history = fit({"mine": method()}, IMAGES, Run(batch_size=32, steps=200, learning_rate=3e-3), console=console)
    reports = console.file.getvalue().split("mine step")[1:]
    assert len(reports) == 11 and reports[-1].startswith(" 199: loss") and "effective rank" in reports[-1]
    assert ("COLLAPSED" in reports[-1]) is collapses and "COLLAPSED" not in reports[0]
    assert (history["mine"][-1].health.collapse is not None) is collapses
    assert sum(step.health is not None for step in history["mine"]) == 11


def test_reports_fit_a_terminal_of_80_columns():
    console = Console(file=io.StringIO(), width=80)
    done = Step(12345.6789, 1.0, 1.0, 1.0, None, None, Health(2048.1, -3.999, 3.999))
    _report(console, "barlow_twins", 1_000_000, done)
    assert console.file.getvalue() == (
        "barlow_twins step 1000000: loss 12345.6789\n  effective rank 2048.1, uniformity -3.999, alignment 3.999\n"
    )
    _report(console, "byol", 1, replace(done, health=Health(1.0, -0.0, 0.0)))
    assert console.file.getvalue().splitlines()[-1] == "  COLLAPSED: all inputs have nearly the same embedding"


@pytest.mark.parametrize(
    "distributions, used, each, collapse",
    [
        (torch.eye(64), 64, 1, None),
        (torch.eye(4).repeat(16, 1), 4, 1, None),
        (torch.full((64, 32), 1 / 32), 32, 32, "the same distribution, over 32 prototypes"),
        (torch.eye(32)[:1].expand(64, 32), 1, 1, "the same distribution, over 1 prototypes"),
        (torch.tensor([0.5, 0.5, 0, 0]).expand(64, 4), 2, 2, "the same distribution, over 2 prototypes"),
        ((0.5 * torch.eye(2) + 0.25).repeat(32, 1), 2, math.exp(0.5623351), None),
        (torch.full((64, 4), math.nan), math.nan, math.nan, "the same distribution, over nan prototypes"),
    ],
    ids=["all", "few", "uniform", "one", "two alike", "soft", "nan"],
)
def test_a_teacher_that_says_nothing_of_the_input_has_collapsed(distributions, used, each, collapse):
    """Though its logits may be as different as they like."""
    found = health([torch.randn(64, 16)], distributions)
    assert [found.used, found.each] == pytest.approx([used, each], rel=1e-3, nan_ok=True)
    assert found.collapse is None if collapse is None else found.collapse.endswith(collapse)
    assert str(found).splitlines()[1] == f"  {found.used:.1f} prototypes in use, {found.each:.1f} by a single input"
