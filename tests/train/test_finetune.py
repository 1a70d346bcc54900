"""The supervised baseline, fine-tuning what other methods have learned, learning rates that fall towards the input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

import fastssl.train.__main__ as command_line
from fastssl.train import Images, Method, Run, checkpoint, cli, create, fit
from fastssl.train.data import images as data
from fastssl.train.evaluate import health
from fastssl.train.optimizers import make_optimizer

QUIET = Console(quiet=True)
STEPS = 6


@pytest.fixture(scope="module")
def images() -> Images:
    """Bright or dark, above or below: classes that an encoder does not tell apart without learning."""
    labels = torch.arange(200) % 4
    pictures = torch.randint(90, (200, 28, 28), generator=torch.Generator().manual_seed(0))
    for picture, label in zip(pictures, labels, strict=True):
        picture[14 * (label // 2) :][:14] += 60 + 100 * (label % 2)
    pictures = pictures.to(torch.uint8)
    return Images("halves", pictures[:160], labels[:160], pictures[160:], labels[160:])


def supervised(images: Images, seed: int = 0, **options) -> Method:
    torch.manual_seed(seed)
    return create("supervised", STEPS, images, **options)


def train(method: Method, images: Images, **options) -> list[float]:
    run = Run(**{"batch_size": 32, "steps": STEPS, **options})
    return [step.loss for step in fit({"m": method}, method.training_data(images), run, console=QUIET)["m"]]


@pytest.mark.parametrize("vit", [False, True])
def test_supervised_is_cross_entropy_and_learns(images, vit):
    method = supervised(images, vit=vit)
    assert method.head.weight.shape == (4, 128 if vit else 256)
    inputs = method.views(method.training_data(images)[torch.arange(16)], torch.Generator().manual_seed(0))
    view, labels = inputs
    assert view.shape == (16, 1, 28, 28) and torch.equal(labels, images.train_labels[:16])
    features = method.encoder(view).mean(1) if vit else method.encoder(view)
    expected = -method.head(features).log_softmax(1).gather(1, labels[:, None]).mean()
    torch.testing.assert_close(method.loss(*method(*inputs)), expected)
    method.loss(*method(*inputs)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    before = method.evaluate(images)
    losses = train(method, images, steps=25)
    after = method.evaluate(images)
    assert list(after) == ["kNN accuracy", "linear probe", "accuracy"]
    assert after["accuracy"] > max(0.6, before["accuracy"] + 0.2) and losses[-1] < 0.8 * losses[0]


def test_a_collapse_is_one_of_features(images):
    """Logits of two classes lie on a line, as they should."""
    method = supervised(images._replace(train_labels=images.train_labels % 2))
    with torch.no_grad():
        method.head.weight[1] = -method.head.weight[0]
        method.head.bias.zero_()
    labelled = method.training_data(images)[torch.arange(64)]
    embeddings = method(*method.views(labelled, torch.Generator().manual_seed(0)))
    assert not health(method.monitored(*embeddings)).collapse


def test_accuracy_of_a_known_head(images):
    method = supervised(images)
    right = F.one_hot(images.test_labels, 4).float()
    method.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 4))
    method.head = nn.Identity()
    seen = []
    method.encoder.forward = lambda pictures: (
        seen.append(len(pictures)) or (right if len(pictures) == 40 else torch.zeros(len(pictures), 4))
    )
    assert method.evaluate(images)["accuracy"] == 1
    assert seen == [len(images.train), 40]  # each once
    right = right.roll(1, 1)
    assert method.evaluate(images)["accuracy"] == 0


def test_learning_rates_fall_towards_the_input(images):
    for vit, stages in ((True, 5), (False, 4)):
        method = supervised(images, vit=vit)
        names = {p: name for name, p in method.named_parameters()}
        optimizer = make_optimizer("adamw", method, 0.1, 0.05, layer_decay=0.5)
        rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates.keys() == set(names.values())
        assert sorted(set(rates.values())) == pytest.approx([0.1 * 0.5**n for n in range(stages, -1, -1)])
        if vit:
            expected = {"patch_embed": 5, "layers.0": 4, "layers.1": 3, "layers.2": 2, "layers.3": 1, "layers.4": 0}
            expected = {f"encoder.{stage}": 0.1 * 0.5**n for stage, n in expected.items()} | {"head": 0.1}
        else:
            expected = {f"encoder.{place}.": 0.1 * 0.5 ** (4 - place // 3) for place in (0, 1, 3, 4, 6, 7, 9, 10)}
            expected |= {"head": 0.1}
        for name, rate in rates.items():
            (wanted,) = (rate for stage, rate in expected.items() if name.startswith(stage))
            assert rate == pytest.approx(wanted), name
        for group in optimizer.param_groups:
            assert len({p.dim() > 1 for p in group["params"]}) == 1
            assert group["weight_decay"] == (0.05 if group["params"][0].dim() > 1 else 0)


def test_the_schedule_keeps_the_ratios(images, monkeypatch):
    rates = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: rates.append({group["lr"] for group in self.param_groups})
    )
    train(supervised(images, vit=True), images, learning_rate=0.01, layer_decay=0.5)
    assert len(rates) == STEPS and len({max(step) for step in rates}) > 3
    for step in rates:
        assert sorted(step) == pytest.approx([max(step) * 0.5**n for n in range(5, -1, -1)])
    assert 0.009 < max(map(max, rates)) <= 0.01


def test_what_is_next_to_the_input_moves_less(images):
    moved = []
    for decay in (1.0, 0.3):
        method = supervised(images, vit=True)
        before = [p.detach().clone() for p in method.encoder.patch_embed.parameters()]
        head = method.head.weight.detach().clone()
        train(method, images, layer_decay=decay)
        now = method.encoder.patch_embed.parameters()
        moved.append(torch.stack([(p - q).abs().mean() for p, q in zip(now, before, strict=True)]))
        assert not torch.equal(method.head.weight, head)
    torch.testing.assert_close(moved[1] / moved[0], torch.full((2,), 0.3**5), rtol=0.5, atol=0)  # AdamW's steps


def test_layer_decay_needs_stages_and_is_a_share(images):
    for decay in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"layer_decay must be above 0 and at most 1, got {decay}"):
            train(supervised(images), images, layer_decay=decay)
    with pytest.raises(ValueError, match=r"layer_decay must be 1 with an encoder that has no stages\(\), got 0.5"):
        make_optimizer("adamw", create("simcse", 1), 1e-3, 0.0, layer_decay=0.5)


@pytest.mark.parametrize("vit", [False, True])
def test_resumed_fine_tuning_is_the_uninterrupted_one_bit_by_bit(images, vit, tmp_path, monkeypatch):
    options = {"layer_decay": 0.5, "checkpoint": tmp_path / "run.pt", "save_every": 2}
    whole = supervised(images, vit=vit)
    losses = train(whole, images, layer_decay=0.5)
    saves = []

    def stop(*_):
        saves.append(None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        save = checkpoint.save
        patch.setattr(checkpoint, "save", lambda *arguments: (save(*arguments), stop()))
        with pytest.raises(KeyboardInterrupt):
            train(supervised(images, vit=vit), images, **options)
    assert len(saves) == 1
    resumed = supervised(images, seed=1, vit=vit)
    assert train(resumed, images, resume=True, **options) == losses
    assert all(torch.equal(x, resumed.state_dict()[key]) for key, x in whole.state_dict().items())
    with pytest.raises(ValueError, match="run with layer_decay 0.5, got 0.6"):
        train(supervised(images, vit=vit), images, resume=True, **{**options, "layer_decay": 0.6})


@pytest.mark.parametrize(("pretrained", "vit"), [("mae", True), ("simclr", False), ("moco_v3", False)])
def test_fine_tuning_begins_with_the_encoder_of_a_checkpoint(images, pretrained, vit, tmp_path):
    torch.manual_seed(0)
    teacher = create(pretrained, 2, images)
    fit({pretrained: teacher}, images.train, Run(batch_size=32, steps=2, checkpoint=tmp_path / "run.pt"), console=QUIET)
    method = supervised(images, seed=1, vit=vit)
    checkpoint.load_encoder(method.encoder, tmp_path / "run.pt")
    torch.testing.assert_close(method.encoder.state_dict(), teacher.encoder.state_dict(), rtol=0, atol=0)
    assert len(train(method, images, layer_decay=0.75)) == STEPS


@pytest.mark.parametrize(
    ("name", "options"),
    [("dino", {"vit": True}), ("dinov2", {"registers": 3, "layer_scale": 0.1})],
    ids=["class token", "registers and scales"],
)
def test_fine_tuning_adopts_what_the_encoder_has_more(name, options, images, tmp_path):
    torch.manual_seed(0)
    pretrained = create(name, 1, images, **options)
    fit({"m": pretrained}, images.train, Run(batch_size=8, steps=1, checkpoint=tmp_path / "run.pt"), console=QUIET)
    method = supervised(images, vit=True)
    checkpoint.load_encoder(method.encoder, tmp_path / "run.pt")
    pretrained.eval(), method.eval()
    view = images.test.unsqueeze(1) / 255
    assert torch.equal(method.encoder(view), pretrained.encoder(view)) and method.encoder(view).shape == (40, 128)
    weights = dict(pretrained.encoder.state_dict())
    train(method, images, steps=2)
    for key, moved in method.encoder.state_dict().items():
        assert not torch.equal(moved, weights[key]), key


def test_another_encoder_is_refused(images, tmp_path):
    path = tmp_path / "run.pt"
    mae = create("mae", 1, size=32)
    data_of_mae = torch.zeros(8, 32, 32, dtype=torch.uint8)
    fit({"mae": mae}, data_of_mae, Run(batch_size=8, steps=1, checkpoint=path), console=QUIET)
    method = supervised(images)
    before = {key: w.clone() for key, w in method.encoder.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"run.pt has another encoder: 0.weight must be float32 \(32, 3, 3, 3\), and is absent"
    ):
        checkpoint.load_encoder(method.encoder, path)
    torch.testing.assert_close(dict(method.encoder.state_dict()), before)
    colour = create("supervised", 1, vit=True, colours=3)
    expected = r"patch_embed.proj.weight must be float32 \(128, 3, 4, 4\), and is float32 \(128, 1, 4, 4\)"
    with pytest.raises(ValueError, match=expected):
        checkpoint.load_encoder(colour.encoder, path)
    checkpoint.save({"weights": {"a": {}, "b": {}}}, path)
    with pytest.raises(ValueError, match="no checkpoint of a run with one method"):
        checkpoint.load_encoder(colour.encoder, path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_encoder(colour.encoder, tmp_path / "none.pt")


def test_an_encoder_for_grey_images_and_for_colours():
    torch.manual_seed(0)
    encoder = create("simclr", 1).encoder.eval()
    grey = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(encoder(grey), encoder(grey.repeat(1, 3, 1, 1)))
    assert encoder(torch.rand(2, 3, 32, 40)).shape == (2, 256)


def test_the_command_fine_tunes(images, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(data, "load", lambda directory, size=None: images)

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments), "--steps", "2", "--batch-size", "32"])
        with pytest.raises(SystemExit) as caught:
            cli.run(command_line.main)
        return caught.value.code, capsys.readouterr().out

    path = tmp_path / "mae.pt"
    assert command("mae", "--checkpoint", path)[0] == 0
    code, output = command("supervised", "--vit", "--from", path, "--layer-decay", 0.75)
    assert code == 0 and all(f"{test} " in output for test in ("kNN accuracy", "linear probe", "accuracy"))
    code, _ = command("supervised", "--from", path)
    assert code.startswith(f"error: {path} has another encoder: 0.weight")
    assert command("supervised", "--from", tmp_path / "none.pt")[0].startswith("error: ")


def test_the_data_decide_what_a_constructor_has_to_know():
    labels = torch.tensor([0, 6, 1])
    colour = Images("c", torch.zeros(3, 3, 32, 32, dtype=torch.uint8), labels, torch.zeros(0, 3, 32, 32), labels[:0])
    assert colour.facts == {"size": 32, "colours": 3, "classes": 7}
    assert create("supervised", 1, colour).head.out_features == 7
    assert create("mae", 1, colour).encoder.patch_embed.proj.weight.shape == (128, 3, 4, 4)
    assert create("simclr", 1, colour).options == {"temperature": 0.2}
    assert create("simcse", 1, TensorDataset(labels)).options == {"temperature": 0.05, "dropout": 0.5}
