"""Twin runs: that they notice a wrong kernel and a full memory, and what the command leaves behind."""

import csv
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from benchmarks.ops import measure
from benchmarks.twins import __main__ as program
from benchmarks.twins import agreement, losses, memory
from benchmarks.twins.agreement import Agreement, Watched, step_errors
from benchmarks.twins.losses import CHUNKED, loss_costs
from benchmarks.twins.results import Timing, step_ratio
from fastssl.train import METHODS, Method, Run, Step, cli, create, fit, twins
from fastssl.train.data import captions as captions_module
from fastssl.train.data import images as images_module
from fastssl.train.data import pairs as pairs_module
from fastssl.train.data import speech as speech_module
from fastssl.train.data import subwords as subwords_module
from fastssl.train.data import text as text_module
from fastssl.train.data.captions import Captions
from fastssl.train.data.pairs import Pairs
from fastssl.train.data.speech import Prompt, Speech
from fastssl.train.data.subwords import Subwords
from fastssl.train.data.text import Sentences
from tests.train.runs import SMALL_SPEECH, spoken

QUIET = Console(quiet=True)
NAMES = program.TWINS
# Of similarities or correlations.
WITHOUT_MATRIX = "byol", "data2vec", "dino", "dinov2", "ibot", "jepa", "mae", "simsiam"
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only")


@pytest.fixture(autouse=True)
def small_data(monkeypatch, blobs, blob_places):
    """Blobs of four kinds, coloured blobs whose text is their kind and place, sentences of few words."""
    generator = torch.Generator().manual_seed(0)
    labels, rows, columns = blob_places
    coloured = F.pad(torch.cat([blobs.train, blobs.test]), (2, 2, 2, 2)).unsqueeze(1).repeat(1, 3, 1, 1)
    texts = torch.stack([labels + 1, *(x.flatten().long() + 10 for x in (rows, columns))], 1)
    train, test = (TensorDataset(coloured[part], texts[part]) for part in (slice(64), slice(64, 96)))
    pairs = Pairs("pairs", train, test, (), torch.full((32,), -1))
    sentences = Sentences("sentences", *torch.randint(1, 50, (96, 6), generator=generator).split((64, 32)))
    subwords = Subwords("subwords", sentences.train, sentences.test, "")
    monkeypatch.setattr(Subwords, "facts", {"vocabulary": 50})
    waveform, words = spoken(1)[0, :2000], (frozenset({"x"}), frozenset({"x", "y"}))
    prompts = [Prompt("a", words[i % 2], waveform, i % 4 > 1) for i in range(48)]
    speech = Speech("speech", spoken(64), prompts)
    monkeypatch.setattr(Speech, "facts", {**SMALL_SPEECH, "ahead": 3}, raising=False)
    captions = Captions("captions", train, test, (), torch.full((32,), -1), "")
    monkeypatch.setattr(Captions, "facts", {"size": 32, "colours": 3, "vocabulary": 50})
    texts = (text_module, sentences), (subwords_module, subwords), (captions_module, captions)
    datasets = (images_module, blobs), (pairs_module, pairs), (speech_module, speech), *texts
    for module, dataset in datasets:
        monkeypatch.setattr(module, "load", lambda source, size=None, dataset=dataset: dataset)
    monkeypatch.setattr(subwords_module, "load_sentences", subwords_module.load)


def new_twins(name: str, steps: int = 4) -> dict[str, Method]:
    torch.manual_seed(0)
    return twins(create(name, steps, METHODS[name].load(None)))


def views_of(name: str, method: Method) -> tuple[torch.Tensor, ...]:
    batch = METHODS[name].training_data(METHODS[name].load(None))[torch.arange(16)]
    return method.views(batch, torch.Generator().manual_seed(0))


def agree(errors: agreement.Errors) -> list[str]:
    return Agreement(errors, 0.0, 0.0).complaints


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_float64_but_for_rounding(name):
    method = new_twins(name)["fastssl"]
    before = {key: x.clone() for key, x in method.state_dict().items()}
    errors = step_errors(method, views_of(name, method))
    assert not agree(errors)
    # dropout draws the same mask, and no .float() rounds on the way
    assert all(errors[quantity]["naive"] < 1e-5 for quantity in ("loss", "gradients"))
    assert all(error["naive"] < 2e-2 for error in errors.values())
    assert all(torch.equal(x, before[key]) for key, x in method.state_dict().items())


def wrong_temperature(method, kernel):
    method.temperature = 1.001 * method.temperature


def wrong_gradient(method, kernel):
    loss = kernel(method, "loss")
    kernel(method, "loss", lambda *z: loss(*z) + 1e-3 * (z[0] - z[0].detach()).sum())


def wrong_teacher(method, kernel):
    method.teacher.momentum += 0.01


def wrong_token(method, kernel):
    """Its gradient is not what float64 has, though the loss of the same embeddings is."""
    forward = kernel(method, "forward")
    token = method.mask_token
    kernel(method, "forward", lambda *x: (forward(*x)[0] + (token - token.detach()).sum(), x[0], x[3]))


def no_queue(method, kernel):
    method.queue.update = lambda keys: None


@pytest.mark.parametrize(
    "name, quantity, spoil",
    [
        ("simclr", "loss", wrong_temperature),
        ("simcse", "loss", wrong_temperature),
        ("simclr", "gradients", wrong_gradient),
        ("mae", "step", wrong_token),
        ("vicreg", "gradients", wrong_gradient),
        ("moco_v1", "state", wrong_teacher),
        ("moco_v1", "state", no_queue),
    ],
)
def test_a_wrong_kernel_is_noticed(monkeypatch, name, quantity, spoil):
    """One that fastssl's twin alone has."""
    method, results = new_twins(name)["fastssl"], agreement._results
    views = views_of(name, method)
    if hasattr(method, "teacher"):
        with torch.no_grad():
            for p in method.encoder.parameters():
                p.add_(0.01)  # else the teacher, which begins as a copy, moves nowhere

    def kernel(method, attribute, replacement=None):
        if replacement is None:
            return getattr(method, attribute)
        object.__setattr__(method, attribute, replacement)

    def spoilt(method, *inputs):
        if method.impl == "fastssl":
            spoil(method, kernel)
        return results(method, *inputs)

    monkeypatch.setattr(agreement, "_results", spoilt)
    complaints = agree(step_errors(method, views))
    assert any(line.startswith(f"{quantity}: relative error") for line in complaints), complaints


def test_curves_that_part_are_noticed():
    def steps(*losses):
        return [Step(loss, 1.0, 0.5, 0.1, None, None) for loss in losses]

    found = [{"loss": {"naive": 1e-7, "fastssl": 2e-7}}]
    close = agreement.agreement(found, {"naive": steps(4.0, 2.0), "fastssl": steps(4.0, 2.1)})
    assert not close.complaints and close.drift == pytest.approx(0.1 / math.sqrt(10))
    apart = agreement.agreement(found, {"naive": steps(4.0, 2.0), "fastssl": steps(4.0, 2.2)})
    assert apart.complaints == ["the curves' running means differ by 6.3% of the loss, above 5%"]
    spike = agreement.agreement(found, {"naive": steps(*[1.0] * 40), "fastssl": steps(*[1.0] * 20, 1.1, *[1.0] * 19)})
    assert not spike.complaints and spike.largest == pytest.approx(0.1) and spike.drift == pytest.approx(0.1 / 4)
    assert agreement.agreement(found, {"naive": steps(4.0), "fastssl": steps(math.nan)}).complaints
    worse = [*found, {"loss": {"naive": 1e-7, "fastssl": 2e-6}}]
    assert agreement.agreement(worse, {"naive": steps(4.0), "fastssl": steps(4.0)}).complaints[0].startswith("loss: ")


def test_looking_changes_no_run():
    def losses(watch):
        both, data = new_twins("simcse", 6), METHODS["simcse"].load(None).train
        watched = Watched(data, both["fastssl"], 6) if watch else data
        history = fit(both, watched, Run(batch_size=16, steps=6), console=QUIET)
        assert not watch or len(watched.found) == agreement.LOOKS
        return [step.loss for step in history["fastssl"]]

    assert losses(True) == losses(False)


def test_memory_and_first_steps_are_not_timed():
    steps = [Step(1.0, second, second / 2, 0.0, peak, peak) for second, peak in ((9.0, None), (8.0, 5), (1.0, None))]
    assert Timing.of(steps) == Timing(1.0, 0.5, 0.0, 5, 5)
    half = [replace(step, seconds=step.seconds / 2 if step.peak_bytes is None else 1.0) for step in steps]
    assert step_ratio({"naive": steps, "fastssl": half}) == 2.0


@pytest.fixture
def quick(monkeypatch):
    """One repetition, no compiler, memory that is not measured."""
    monkeypatch.setattr(losses, "_REPEATS", 1)
    monkeypatch.setattr(measure.gc, "collect", lambda: None)
    monkeypatch.setattr(losses, "compiled", lambda loss: loss)
    monkeypatch.setattr(losses, "extra_memory", lambda step: 0.0)
    monkeypatch.setattr(program, "SWEEP_EXAMPLES", 64)


@pytest.mark.parametrize("name", NAMES)
def test_other_ways_to_compute_a_loss_are_right(name, quick, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 300 if name in ("barlow_twins", "vicreg") else 7)
    both = new_twins(name)
    embeddings = [z.detach().requires_grad_(z.requires_grad) for z in both["naive"](*views_of(name, both["naive"]))]
    costs = loss_costs(both["fastssl"], embeddings)
    assert all(not cost.note and cost.seconds > 0 for cost in costs.values()), costs
    assert ("chunked" in costs) == (name not in WITHOUT_MATRIX)


def test_a_wrong_way_to_compute_a_loss_is_not_timed(quick, monkeypatch):
    both = new_twins("simclr")
    embeddings = [z.detach().requires_grad_() for z in both["naive"](*views_of("simclr", both["naive"]))]
    monkeypatch.setitem(CHUNKED, "nt_xent", lambda z1, z2, temperature: (z1 * z2).sum() * temperature)

    def broken(loss):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(losses, "compiled", broken)
    costs = loss_costs(both["fastssl"], embeddings)
    assert costs["chunked"].note.startswith("wrong: error") and math.isnan(costs["chunked"].seconds)
    assert costs["compile"].note == "failed: RuntimeError: no compiler"
    assert costs["fastssl"].seconds > 0 and costs["naive"].seconds > 0


def test_the_chunked_loop_bounds_memory():
    """The forward pass leaves no similarities for the backward pass."""
    z1, z2 = (torch.randn(1024, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        CHUNKED["nt_xent"](z1, z2, temperature=0.2)
    assert kept and sum(kept) < 20 * 2048 * 8


@needs_linux
def test_a_batch_that_does_not_fit_is_noticed():
    """Naive NT-Xent of 4,096 rows takes at least three matrices of 64 MiB; fastssl's takes some 16 MiB, 8 of
    which it keeps between its passes."""
    both = new_twins("simclr")
    z = [torch.randn(64, 128, requires_grad=True) for _ in range(2)]
    budget, last = 64 * 2**20, {}
    for impl, method in both.items():
        found, limit = memory.largest_batch("simclr", method, z, budget, 2048)
        assert [m.batch_size for m in found] == [256, 512, 1024, 2048][: len(found)] and limit > budget
        assert all(m.bytes <= budget for m in found[:-1])
        last[impl] = found[-1]
    assert last["naive"].bytes > budget >= 3 * last["fastssl"].bytes and last["fastssl"].batch_size == 2048


@needs_linux
def test_memory_beyond_the_limit_is_refused_and_not_taken(monkeypatch):
    """In a process of its own, as all of them are."""
    assert memory._alone(_refused) == math.inf


def _refused() -> float:
    memory._SHARE = 0.01
    sample = [(torch.randn(64, 128), True)] * 2
    limit = memory._limit()
    memory._limit = lambda: limit
    rows = 256 * 2 ** math.ceil(math.log2(math.sqrt(limit / 16) / 256))
    return memory._grow("simclr", "naive", {}, sample, math.inf, rows)[0][-1].bytes


@pytest.fixture
def here(monkeypatch):
    """Memory is measured in this process, which has no limit."""
    monkeypatch.setattr(memory, "_alone", lambda task, *arguments: task(*arguments))
    monkeypatch.setattr(memory, "_limit", lambda: math.nan)


def command(monkeypatch, folder, *arguments):
    arguments = "--steps", 3, "--batch-size", 16, "--sweep", "16,32", "--largest-batch", 64, *arguments
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments), "--output", str(folder)])
    with pytest.raises(SystemExit) as caught:
        cli.run(program.main)
    with open(folder / "twins.csv") as file:
        lines = list(csv.DictReader(file))
    return caught.value.code, lines, (folder / "twins.html").read_text()


def test_command(monkeypatch, tmp_path, capsys, quick, here):
    code, lines, report = command(monkeypatch, tmp_path)
    assert code == 0
    assert set(lines[0]) == {"part", "method", "batch_size", "impl", "quantity", "value"}
    assert {line["method"] for line in lines} == set(NAMES)
    everything = {tuple(line.values())[:-1] for line in lines}
    assert len(everything) == len(lines)
    assert {part for part, *_ in everything} == {"run", "loss alone", "sweep", "by chunks"}
    assert {(part, size) for part, name, size, *_ in everything if name == "simclr"} == {
        ("run", "16"), ("loss alone", "16"), ("loss alone", "64"), ("sweep", "16"), ("sweep", "32"), ("by chunks", "64")
    }  # fmt: skip
    found = {tuple(line.values())[1:-1]: line["value"] for line in reversed(lines)}
    for name in NAMES:
        for impl in ("fastssl", "naive"):
            assert 0 < float(found[name, "16", impl, "share of step outside the encoder"]) < 1
            assert float(found[name, "16", impl, "peak bytes of a step"]) >= 0
            assert float(found[name, "16", impl, "step seconds"]) > float(found[name, "16", impl, "loss seconds"]) > 0
            assert float(found[name, "64", impl, "peak bytes in a process of its own"]) >= 0
        assert float(found[name, "16", "compile", "seconds"]) > 0
        assert found[name, "16", "", "agrees"] == "yes"
    for who in ("fastssl", "naive", "random", "supervised"):
        assert 0 <= float(found["mae", "16", who, "kNN accuracy"]) <= 1
    assert float(found["simclr", "64", "naive", "peak bytes of a step"]) >= 0

    assert not re.search(r"(src|href)=\"(?!data:)|<script|<link|@import|url\(", report)
    assert all(f"<td>{name}</td>" in report for name in NAMES)
    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in pictures] == [
        f"twins_{plot}.png" for plot in ("accuracy", "curves", "memory", "steps", "sweep")
    ]
    assert report.count('src="data:image/png;base64,') == len(pictures)
    assert "--impl naive" in report and "naive PyTorch" in report
    table = capsys.readouterr().out
    assert all(name in table for name in NAMES)


def test_one_method_that_fails_or_disagrees_does_not_stop_the_others(monkeypatch, tmp_path, quick, here):
    def broken(self, *z):
        raise ValueError("broken <b>")

    simclr = METHODS["simclr"]
    loss = simclr.loss

    def mutated(self, z1, z2):
        return loss(self, z1 * 1.0 if self.impl == "naive" else z1, z2) * (1 + 1e-4 * (self.impl == "fastssl"))

    monkeypatch.setattr(METHODS["vicreg"], "loss", broken)
    monkeypatch.setattr(simclr, "loss", mutated)
    code, lines, report = command(monkeypatch, tmp_path, "vicreg", "simclr", "simsiam")
    assert {line["method"] for line in lines} == {"simclr", "simsiam"}
    complaints = code.splitlines()
    assert complaints[0].startswith("simclr disagrees: loss: relative error 1.0e-04")
    assert complaints[-1] == "vicreg failed: ValueError: broken <b>"
    assert "<li class=bad>simclr disagrees: loss" in report and "broken &lt;b&gt;" in report
    assert ["no"] == [line["value"] for line in lines if line["quantity"] == "agrees" and line["method"] == "simclr"]


def test_unknown_methods_give_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "simclr", "word2vec"])
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 2 and "word2vec is none of barlow_twins, beit, bert" in capsys.readouterr().err
