"""The reference trainer: the loop, what it measures, its twins on real images, the demo."""

import copy
import importlib
import io
import math
import os
import re
import shutil
import sys
import types

import pytest
import torch
import torch._dynamo
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

import fastssl.train
import fastssl.train.__main__ as command_line
from fastssl import _meter
from fastssl._meter import Meter, available_memory, format_bytes, format_seconds
from fastssl.train import METHODS, DataError, Images, Method, Run, cli, create, fit, load, twins
from fastssl.train.data import images as data
from fastssl.train.evaluate import accuracies
from fastssl.train.step import train_step

QUIET = Console(file=io.StringIO())
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only")


@pytest.fixture(scope="module")
def images() -> Images:
    try:
        everything = load()
    except DataError as error:
        pytest.skip(f"no images: {error}")
    return Images(
        everything.name,
        everything.train[:2000],
        everything.train_labels[:2000],
        everything.test[:500],
        everything.test_labels[:500],
    )


def new_twins(seed: int = 0, name: str = "simclr", steps: int = 12) -> dict[str, Method]:
    torch.manual_seed(seed)
    return twins(create(name, steps))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", ["simclr", "barlow_twins", "vicreg"])
def test_twins_agree_on_real_images_and_the_loss_falls(images, method):
    history = fit(new_twins(name=method), images.train, Run(batch_size=64, steps=12), console=QUIET)
    losses = {name: torch.tensor([step.loss for step in steps]) for name, steps in history.items()}
    # Before the first update they differ by rounding. Then training amplifies that, at some steps abruptly:
    # up to 0.01 was seen within a dozen steps of SimCLR, where the loss itself moves by 1.
    torch.testing.assert_close(losses["fastssl"][0], losses["naive"][0], rtol=3e-6, atol=0)
    torch.testing.assert_close(losses["fastssl"], losses["naive"], rtol=0.01, atol=0)
    assert losses["fastssl"][-3:].mean() < 0.98 * losses["fastssl"][:3].mean()


def test_a_run_is_reproducible_and_its_twin_does_not_change_it(images):
    def losses(methods, seed=0):
        history = fit(methods, images.train, Run(batch_size=64, steps=4, seed=seed), console=QUIET)
        return torch.tensor([step.loss for step in history["fastssl"]])

    both = losses(new_twins())
    torch.testing.assert_close(losses({"fastssl": new_twins()["fastssl"]}), both, rtol=0, atol=0.03)
    assert not torch.allclose(losses(new_twins(), seed=1), both, rtol=0, atol=0.1)


def test_cutting_the_graph_at_the_embeddings_changes_no_update(images):
    method = new_twins()["naive"]
    plain = copy.deepcopy(method)
    views = method.views(images.train[:32], generator())
    step = train_step(method, views, torch.optim.SGD(method.parameters(), 0.1), Run(batch_size=32, steps=1)).read()
    loss = plain.loss(*plain(*views))
    loss.backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    assert step.loss == pytest.approx(loss.item())
    torch.testing.assert_close(dict(method.named_parameters()), dict(plain.named_parameters()))
    assert all(parameter.grad is None for parameter in method.parameters())
    assert 0 < step.loss_seconds < step.seconds and step.peak_bytes is None
    assert 0 < step.after_seconds < step.seconds - step.loss_seconds


def test_fit_rejects_what_cannot_be_trained(images):
    with pytest.raises(ValueError, match=r"batch_size .*\(2000\), got 2001"):
        fit(new_twins(), images.train, Run(batch_size=2001, steps=1), console=QUIET)
    with pytest.raises(ValueError, match="steps .*got 0"):
        fit(new_twins(), images.train, Run(batch_size=8, steps=0), console=QUIET)
    for clip in (0, -1.0, math.nan):  # a negative one would turn the gradients round
        with pytest.raises(ValueError, match=f"clip must be positive, got {clip}"):
            fit(new_twins(), images.train, Run(batch_size=8, steps=1, clip=clip), console=QUIET)
    with pytest.raises(ValueError, match="methods must be one at least, got none"):
        fit({}, images.train, Run(batch_size=8, steps=1), console=QUIET)
    broken = new_twins()["fastssl"]
    nn.init.constant_(broken.projector[-1].weight, math.nan)
    with pytest.raises(FloatingPointError, match="mine: in step 0 the loss is nan"):
        fit({"mine": broken}, images.train, Run(batch_size=8, steps=2), console=QUIET)


def test_accuracies_of_known_features():
    """An encoder that hands out the label gets everything right; one that hands out noise, about a tenth."""
    labels = torch.arange(400) % 10
    pictures = labels.to(torch.uint8)[:, None, None].expand(400, 28, 28) * 20
    known = Images("known", pictures[:300], labels[:300], pictures[300:], labels[300:])

    class OneHot(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255 / 20).round().long(), 10).float()

    class Noise(nn.Module):
        def forward(self, x):
            return torch.randn(x.shape[0], 10)

    assert accuracies(OneHot(), known) == {"kNN accuracy": 1, "linear probe": 1}
    torch.manual_seed(0)
    assert max(accuracies(Noise(), known).values()) < 0.3


@needs_linux
def test_meter_sees_memory_that_is_gone_at_the_end():
    with Meter(memory=True) as meter:
        torch.ones(64 << 18)
    assert 63 << 20 <= meter.extra < 80 << 20
    assert meter.seconds > 0
    with Meter(memory=True) as meter:
        pass
    assert meter.extra < 1 << 20
    assert Meter().extra is None


@needs_linux
def test_available_memory_is_less_than_the_machine_has():
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0 < available_memory() < total


@needs_linux
@pytest.mark.parametrize(
    "folder, limit, used, cache",
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_available_memory_is_within_the_control_group(folder, limit, used, cache, tmp_path, monkeypatch):
    """What its processes have taken is gone, but for cached files."""
    monkeypatch.setattr(_meter, "_CGROUP", tmp_path)
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    for name, text in ((limit, "1000000\n"), (used, "700000\n"), ("memory.stat", f"anon 600000\n{cache} 100000\n")):
        (group / name).write_text(text)
    assert available_memory() == 400000
    (group / used).write_text("1200000\n")
    assert available_memory() == 0
    (group / limit).write_text("max\n" if folder == "." else f"{2**63 - 4096}\n")
    assert available_memory() > 1 << 20


@pytest.mark.parametrize(
    "seconds, text",
    [(2.5e-5, "0.025 ms"), (0.25, "250 ms"), (0.9999, "1.00 s"), (12.346, "12.35 s"), (4321, "4,321.00 s")],
)
def test_seconds_are_written_in_full(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("size, text", [(0, "0 MiB"), (1000 << 20, "1,000 MiB"), (13 << 34, "208.00 GiB")])
def test_bytes_are_written_in_binary_units(size, text):
    assert format_bytes(size) == text


def command(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["simclr", "--batch-size", "0"], "--batch-size: must be positive, got 0"),
        (["simclr", "--steps", "many"], r"--steps: must be a number \(int\), got 'many'"),
        (["simclr", "--impl", "fused"], "--impl: invalid choice: 'fused'"),
        (["simclr", "--steps", "1", "--epochs", "1"], "not allowed with"),
        (["simclr", "--temperature", "nan"], "--temperature: must be positive, got nan"),
        (["word2vec"], "invalid choice: 'word2vec'"),
        (["simclr", "--lambda-param", "1"], "unrecognized arguments: --lambda-param"),
        ([], "required: METHOD"),
        (["simsiam", "--temperature", "1"], "unrecognized arguments: --temperature"),
        (["simclr", "--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd'"),
        (["simclr", "--clip", "0"], "--clip: must be positive, got 0"),
        (["simclr", "--weight-decay", "-1"], "--weight-decay: must be positive, got -1"),
        (["moco_v1", "--queue", "2.5"], r"--queue: must be a number \(int\), got '2.5'"),
        (["byol", "--total-steps", "7"], "unrecognized arguments: --total-steps"),
        (["simclr", "--pictures", "file.png"], "unrecognized arguments: --pictures"),
        (["simclr", "--seed", "-1"], "--seed: must be from 0 to 18446744073709551615, got -1"),
        (["simclr", "--seed", 2**64], "--seed: must be from 0 to .*, got 18446744073709551616"),
        (["simclr", "--seed", "1.5"], r"--seed: must be a number \(int\), got '1.5'"),
        (["supervised", "--layer-decay", "2"], "--layer-decay: must be at most 1, got 2"),
        (["simclr", "--resume"], "--resume needs --checkpoint"),
        (["simclr", "--checkpoint", __file__], "test_train.py exists; --resume goes on from it"),
    ],
)
def test_bad_options_give_one_line(monkeypatch, capsys, arguments, message):
    assert command(monkeypatch, command_line.main, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else "found")
    with pytest.raises(ImportError, match=r'needs rich: in fastssl\'s folder, pip install "\.\[demo\]"'):
        importlib.reload(fastssl.train)


def test_bad_data_gives_one_line(monkeypatch, tmp_path):
    code = command(monkeypatch, command_line.main, "simclr", "--data", tmp_path)
    assert code.startswith("error: ") and "must have images to train on" in code and "\n" not in code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["simclr", "--checkpoint", "/dev/null/run.pt"], "'/dev/null'"),
        (["supervised", "--from", "nothing.pt"], "No such file or directory: 'nothing.pt'"),
        (["simclr", "--checkpoint", "nothing.pt", "--resume"], "No such file or directory: 'nothing.pt'"),
        (["vicreg", "--learning-rate", "1e30"], "vicreg: in step 1 the (loss|gradient) "),
    ],
)
def test_bad_values_give_one_line(monkeypatch, tmp_path, images, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda directory, size=None: images)
    monkeypatch.setattr(Method, "evaluate", lambda self, dataset: {})
    code = command(monkeypatch, command_line.main, arguments[0], "--steps", 2, "--batch-size", 32, *arguments[1:])
    assert code.startswith("error: ") and "\n" not in code and re.search(message, code)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["moco_v2", "--momentum", "1.5"], "momentum must be from 0 to 1, got 1.5"),
        (["moco_v1", "--queue", 10**12], "queue must fit into memory, got 1000000000000 keys of 512 bytes"),
        (["moco_v2", "--queue", 10**30], "queue must fit into memory, got 10*0 keys"),
        (["mae", "--mask-ratio", "1"], "mask_ratio must hide at least one of 49 patches, and not all, got 1.0"),
        (["mae", "--mask-ratio", "0.99"], "mask_ratio must hide .*, and not all, got 0.99"),
        (["mae", "--mask-ratio", "1e-17"], "mask_ratio must hide at least one .*, got 1e-17"),
        (["mae", "--mask-ratio", "2"], "mask_ratio must hide .*, got 2.0"),
        (["clip", "--temperature", "0.001"], "temperature must be at least 0.01, got 0.001"),
    ],
)
def test_bad_values_are_found_before_the_data_are_fetched(monkeypatch, arguments, message):
    monkeypatch.setattr(METHODS[arguments[0]], "load", lambda directory, size=None: pytest.fail("fetched"))
    code = command(monkeypatch, command_line.main, *arguments)
    assert code.startswith("error: ") and "\n" not in code and re.search(message, code)


def test_mae_hides_from_one_patch_to_all_but_one():
    for mask_ratio in (0.02, 0.97):
        method = create("mae", 1, mask_ratio=mask_ratio)
        done = fit({"mae": method}, torch.randint(256, (4, 28, 28), dtype=torch.uint8), Run(batch_size=4, steps=1))
        assert math.isfinite(done["mae"][0].loss)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mae", "--batch-size", "2001"], r"--batch-size must be at most .*\(2000\), got 2001"),
        (["mae", "--pictures", "/dev/null/mae.png"], "'/dev/null'"),
        (["mae", "--pictures", "."], "Is a directory"),
    ],
)
def test_bad_values_are_found_before_anything_is_measured(monkeypatch, tmp_path, images, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda directory, size=None: images)
    monkeypatch.setattr(Method, "evaluate", lambda self, dataset: pytest.fail("measured"))
    code = command(monkeypatch, command_line.main, *arguments)
    assert code.startswith("error: ") and "\n" not in code and re.search(message, code)


def test_progress_tells_the_method_its_loss_and_its_pace():
    batch, output = torch.randint(256, (32, 28, 28), dtype=torch.uint8), io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    fit({"barlow_twins": create("barlow_twins", 1)}, batch, Run(batch_size=32, steps=1), console=console)
    assert re.search(r"barlow_twins loss \d+\.\d{4} +[\d,]+ examples/s", output.getvalue())


@pytest.mark.parametrize(
    "arguments",
    [
        ["simclr", "--impl", "naive"],
        ["barlow_twins", "--lambda-param", 0.01, "--clip", 1],
        ["vicreg", "--mu-param", 5, "--optimizer", "lars"],
        ["moco_v2", "--queue", 100, "--amp"],
        ["mae", "--pictures", "new/mae.png", "--no-norm-pix-loss", "--weight-decay", 0],
    ],
)
def test_command_trains(monkeypatch, capsys, tmp_path, images, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda directory, size=None: images)
    assert command(monkeypatch, command_line.main, *arguments, "--steps", 2, "--batch-size", 64) == 0
    output = capsys.readouterr().out
    assert all(term in output for term in ("step 1: loss", "effective rank", "kNN accuracy", "linear probe"))
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".png"] * ("--pictures" in arguments)


def test_command_goes_on_where_it_stopped(monkeypatch, capsys, tmp_path, images):
    monkeypatch.setattr(data, "load", lambda directory, size=None: images)
    arguments = ["simclr", "--steps", 3, "--batch-size", 32, "--checkpoint", tmp_path / "new" / "run.pt"]
    outputs = []
    for more in ([], ["--resume"]):
        assert command(monkeypatch, command_line.main, *arguments, *more) == 0
        outputs.append(capsys.readouterr().out.splitlines()[-2:])
    assert outputs[0] == outputs[1] and "linear probe" in outputs[0][1]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a compiler")
def test_command_compiles(monkeypatch, capsys, tmp_path):
    story = tmp_path / "story.txt"
    story.write_text(" ".join(f"The {i}th of forty sentences ends here." for i in range(40)))
    torch._dynamo.utils.counters.clear()
    options = ["simcse", "--data", story, "--batch-size", 16, "--steps", 2, "--compile"]
    assert command(monkeypatch, command_line.main, *options) == 0
    assert "simcse step 1: loss" in capsys.readouterr().out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_tensorboard_gets_every_step_or_one_line_says_what_is_missing(monkeypatch, tmp_path, images):
    scalars = []

    class SummaryWriter:
        def __init__(self, directory):
            scalars.append(directory)

        def add_scalar(self, label, value, step):
            scalars.append((label, step))

        def close(self):
            scalars.append("closed")

    monkeypatch.setattr(data, "load", lambda directory, size=None: images)
    arguments = ["byol", "--steps", 2, "--batch-size", 32, "--tensorboard", "logs"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--tensorboard needs tensorboard: pip install" in command(monkeypatch, command_line.main, *arguments)
    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert command(monkeypatch, command_line.main, *arguments) == 0
    labels = ("loss", "seconds", "loss_seconds", "rank", "uniformity", "alignment")
    assert scalars == ["logs", *((f"byol/{label}", step) for step in (0, 1) for label in labels), "closed"]


def test_control_c_ends_cleanly(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    assert command(monkeypatch, main) == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.fixture
def demo():
    pytest.importorskip("matplotlib")
    from fastssl.train import demo

    return demo


def test_demo_from_training_to_figure(monkeypatch, capsys, tmp_path, images, demo):
    monkeypatch.setattr(demo, "load", lambda directory, size=None: images)
    figure = tmp_path / "new" / "figure.png"
    options = ["--steps", 3, "--batch-size", 64, "--rows", 1000, "--output", figure]
    assert command(monkeypatch, demo.main, *options) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    for term in ("step time", "loss time", "peak memory", "kNN accuracy", "random init", "1,000"):
        assert term in output


def test_demo_does_not_run_naive_where_it_would_not_fit(monkeypatch, demo):
    monkeypatch.setattr(demo, "available_memory", lambda: demo.naive_bytes(2048) * 2)
    console = Console(file=io.StringIO(), width=120)
    costs = demo.growing_batches(4096, console)
    assert [cost.rows for cost in costs["naive"]] == [2048]
    assert [cost.rows for cost in costs["fastssl"]] == [2048, 4096]
    assert "does not fit" in console.file.getvalue()


@needs_linux
def test_estimate_of_naive_memory_is_what_it_takes(demo):
    demo._cost(2048, ["naive"])  # what libraries allocate once
    cost = demo._cost(8192, ["naive"])["naive"]  # large beside what the allocator keeps
    assert cost.bytes == pytest.approx(demo.naive_bytes(8192), rel=0.2)
