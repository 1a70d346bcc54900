"""Runs that stop: exact resume, checkpoints that are never half written, Ctrl-C, NaN; and how runs are optimised."""

import errno
import functools
import operator
import os
import random
import re
import resource
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from fastssl.train import METHODS, Method, Run, checkpoint, create, fit, signals
from fastssl.train.checkpoint import load_encoder
from fastssl.train.optimizers import LARS, make_optimizer

QUIET = Console(quiet=True)
IMAGES = torch.randint(256, (48, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STEPS = 5


@pytest.fixture(autouse=True)
def control_c_interrupts():
    """As in a terminal, and not as in a shell's background, where it does nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    return create(name, STEPS, **options)


def data_of(method: Method):
    if type(method).__name__ in ("SupCon", "Supervised"):
        return torch.utils.data.TensorDataset(IMAGES, torch.arange(len(IMAGES)) % 3)
    tokens = torch.randint(1, 99, (len(IMAGES), 6), generator=torch.Generator().manual_seed(0))
    if method.load is METHODS["clip"].load:
        return torch.utils.data.TensorDataset(IMAGES.unsqueeze(1).expand(-1, 3, -1, -1), tokens)
    return tokens if method.load is METHODS["simcse"].load else IMAGES


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


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in METHODS), ("byol", {"chunk_size": 5}), ("simcse", {"chunk_size": 5})]
)
def test_resumed_run_is_the_uninterrupted_one_bit_by_bit(name, options, tmp_path):
    whole, path = new(name), tmp_path / "run.pt"
    losses = run(whole, **options)
    with pytest.raises(KeyboardInterrupt):
        run(new(name), checkpoint=path, writer=InterruptAfter(1), **options)
    assert len(checkpoint.load(path)["history"]["m"]) == 2
    torch.manual_seed(123)  # whatever happened before
    resumed = create(name, STEPS)
    assert run(resumed, checkpoint=path, resume=True, **options) == losses
    assert all(torch.equal(x, resumed.state_dict()[key]) for key, x in whole.state_dict().items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("options", [{"optimizer": "lars", "clip": 0.1}, {"amp": True}], ids=str)
def test_so_it_is_with_dropout_and_other_options_across_epochs(options, tmp_path):
    losses, path = run(tiny(), 8, **options), tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), 8, checkpoint=path, writer=InterruptAfter(4), **options)
    assert run(tiny(), 8, checkpoint=path, resume=True, **options) == losses
    assert run(tiny(), 8, checkpoint=path, resume=True, **options) == losses  # a finished run has nothing left to do
    assert len(set(losses)) == 8


def test_twins_resume_together(tmp_path):
    def both():
        return {"a": tiny(), "b": tiny(loss=lambda z: z.abs().mean())}

    def fit_both(writer=None, **options):
        history = fit(both(), IMAGES, Run(batch_size=16, steps=4, **options), writer=writer, console=QUIET)
        return {name: [step.loss for step in steps] for name, steps in history.items()}

    with pytest.raises(KeyboardInterrupt):
        fit_both(checkpoint=tmp_path / "run.pt", writer=InterruptAfter(2))
    assert fit_both(checkpoint=tmp_path / "run.pt", resume=True) == fit_both()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(tiny(), 2, checkpoint=path)
    before = path.read_bytes()
    for options, message in [
        ({"steps": 3}, "run with steps 2, got 3"),
        ({"seed": 1}, "run with seed 0, got 1"),
        ({"optimizer": "lars"}, "run with optimizer adamw, got lars"),
        ({"clip": 2.0}, "run with clip None, got 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tiny(), **{"steps": 2, **options}, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match=r"run with methods .*Tiny.*, got .*SimSiam"):
        run(new("simsiam"), 2, checkpoint=path, resume=True)
    wider = tiny()
    wider.encoder[2] = nn.Linear(784, 9)
    with pytest.raises(
        ValueError,
        match=r"run.pt does not fit m: weights: encoder.2.weight must be float32 \(9, 784\), and is float32 \(8",
    ) as error:
        run(wider, 2, checkpoint=path, resume=True)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        run(tiny(), 2, checkpoint=tmp_path / "elsewhere", resume=True)
    with pytest.raises(ValueError, match="resume needs a checkpoint, got None"):
        run(tiny(), 2, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name, option, value", [("byol", "momentum", 0.5), ("moco_v1", "queue", 64), ("mae", "norm_pix_loss", False)]
)
def test_a_checkpoint_of_other_options_is_refused(name, option, value, tmp_path):
    path = tmp_path / "run.pt"
    losses = run(new(name), 1, checkpoint=path)
    default = new(name).options[option]
    with pytest.raises(ValueError, match=rf"run with methods .*'{option}': {default}.*, got .*'{option}': {value}"):
        run(new(name, **{option: value}), 1, checkpoint=path, resume=True)
    assert run(new(name, **{option: default}), 1, checkpoint=path, resume=True) == losses


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The checkpoint of a run of one step."""
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    run(tiny(), 1, checkpoint=path)
    return path


def test_other_readers_take_a_checkpoint_as_any(finished):
    state = checkpoint.load(finished)
    for options in ({}, {"mmap": True}):
        weights = torch.load(finished, weights_only=True, **options)["weights"]["m"]
        assert all(torch.equal(x, weights[key]) for key, x in state["weights"]["m"].items())
    with zipfile.ZipFile(finished) as archive:
        assert archive.testzip() is None and archive.comment == finished.read_bytes()[-72:]


DAMAGES = {
    "flip": lambda content, place, draw: (
        content[:place] + bytes([content[place] ^ 1 << draw(8)]) + content[place + 1 :]
    ),
    "truncate": lambda content, place, draw: content[:place],
    "append": lambda content, place, draw: content + content[: 1 + place % 99],
    "insert": lambda content, place, draw: content[:place] + b"\0" + content[place:],
    "zero": lambda content, place, draw: content[:place] + b"\0" * 600 + content[place + 600 :],
}


@pytest.mark.parametrize("number", range(60))
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(number, finished, tmp_path):
    content, draw = finished.read_bytes(), random.Random(number).randrange
    damage = ("flip", *DAMAGES)[number % (1 + len(DAMAGES))]
    damaged = DAMAGES[damage](content, draw(len(content)), draw)
    assert damaged != content
    path = tmp_path / "run.pt"
    path.write_bytes(damaged)
    method = tiny()
    before = {key: x.clone() for key, x in method.state_dict().items()}
    for use in (lambda: run(method, 1, checkpoint=path, resume=True), lambda: load_encoder(method.encoder, path)):
        with pytest.raises(ValueError, match=r"run.pt is (no checkpoint, or )?damaged: "):
            use()
    assert path.read_bytes() == damaged and list(tmp_path.iterdir()) == [path]
    assert all(torch.equal(x, before[key]) for key, x in method.state_dict().items())


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "run.pt"
    checkpoint.save({"numbers": torch.arange(9)}, path)
    content, unnoticed = path.read_bytes(), []
    for place in range(len(content)):
        path.write_bytes(DAMAGES["flip"](content, place, lambda _, place=place: place % 8))
        try:
            checkpoint.load(path)
            unnoticed.append(place)
        except ValueError as error:
            assert "damaged" in str(error)
    assert not unnoticed


@pytest.mark.parametrize("content", [b"", b"text", b"SHA-256 " + b"0" * 64])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.pt is (no checkpoint, or )?damaged"):
        run(tiny(), checkpoint=path, resume=True)
    path.unlink()
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"run.pt is no checkpoint, or damaged: it must end with its SHA-256"):
        run(tiny(), checkpoint=path, resume=True)
    path.unlink()
    os.mkfifo(path)
    for use in (
        lambda: run(tiny(), checkpoint=path, resume=True),
        lambda: load_encoder(tiny().encoder, path),
    ):
        with pytest.raises(OSError, match="run.pt must be a regular file"):
            use()


ABSENT = object()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((), [1], "no checkpoint of a training run: it must be a dict of run, weights, .*, got list"),
        (("run",), 3, "no checkpoint of a training run: run must be a dict of methods, .*, got int"),
        (("run", "clip"), ABSENT, "no checkpoint of a training run: run must be a dict of .*clip"),
        (("run", "seed"), torch.ones(3), "is of a run with seed tensor.*, got 0"),
        (("run", "methods"), {"m": {"class": "SimCLR"}}, "is of a run with methods .*SimCLR.*, got .*Tiny"),
        (("weights",), {}, r"damaged: weights must be a dict of m, got \[\]"),
        (("weights",), None, "damaged: weights must be a dict of m, got NoneType"),
        (("weights", "m"), 1.5, "does not fit m: weights: it must be a dict of tensors, and is float"),
        (("weights", "m", 7), torch.ones(1), "does not fit m: weights: 7 must be absent, and is float32"),
        (("weights", "m", "encoder.2.bias"), ABSENT, r"encoder.2.bias must be float32 \(8,\), and is absent"),
        (("weights", "m", "encoder.2.bias"), "text", r"encoder.2.bias must be float32 \(8,\), and is str"),
        (("weights", "m", "encoder.2.bias"), torch.ones(8, dtype=torch.int64), r"and is int64 \(8,\)"),
        (("weights", "m", "encoder.2.bias"), torch.ones(8).to_sparse(), "and is float32 torch.sparse_coo"),
        (("weights", "m", "encoder.2.bias"), torch.ones(8, device="meta"), "and is float32 meta"),
        (("optimizers",), 4, "damaged: optimizers must be a dict of m, got int"),
        (("optimizers", "m"), {}, "does not fit m: optimizers must have states of the method's parameters"),
        (("optimizers", "m", 2), {}, "does not fit m: optimizers must have states of the method's parameters"),
        (("optimizers", "m", 0), [], "optimizers, parameter 0: it must be a dict of tensors, and is list"),
        (("optimizers", "m", 0, "exp_avg"), torch.ones(3), r"exp_avg must be float32 \(8, 784\), and is float32 \(3"),
        (("optimizers", "m", 0, "exp_avg_sq"), ABSENT, "exp_avg_sq must be .*, and is absent"),
        (("optimizers", "m", 0, "step"), 7, r"step must be float32 \(\), and is int"),
        (("history", "m"), [], "does not fit m: history must be a list of 1 to 1 steps"),
        (("history", "m"), [1, 2, 3], "does not fit m: history must be a list of 1 to 1 steps"),
        (("history", "m"), [1], "does not fit m: history, step 0 must be a dict of loss, .*, got int"),
        (("history", "m", 0, "health"), ABSENT, "history, step 0 must be a dict of .*health, got"),
        (("history", "m", 0, "health"), {"rank": 1.0}, "history, step 0, health must be a dict of rank, .*, got"),
        (("history", "m", 0, "health"), "good", "history, step 0, health must be a dict of rank, .*, got str"),
        (("history", "m", 0, "loss"), "small", "history, step 0, loss must be float, got 'small'"),
        (("history", "m", 0, "peak_bytes"), 1.5, "peak_bytes must be int .*, got 1.5"),
    ],
)
def test_every_field_of_a_checkpoint_is_looked_at(place, value, message, finished, tmp_path):
    state = path = tmp_path / "run.pt"
    state = {"whole": checkpoint.load(finished)}
    *way, last = ("whole", *place)
    part = functools.reduce(operator.getitem, way, state)
    if value is ABSENT:
        del part[last]
    else:
        part[last] = value
    checkpoint.save(state["whole"], path)
    method = tiny()
    before = {key: x.clone() for key, x in method.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*{message}") as caught:
        run(method, 1, checkpoint=path, resume=True)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(x, before[key]) for key, x in method.state_dict().items())
    if place[:1] in ((), ("weights",)):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} (is no checkpoint|has another encoder)"):
            load_encoder(nn.Sequential(nn.Linear(3, 2)), path)


def test_methods_of_one_checkpoint_have_done_as_many_steps(tmp_path):
    path = tmp_path / "run.pt"
    options = {"batch_size": 16, "steps": 2, "checkpoint": path}
    fit({"a": tiny(), "b": tiny()}, IMAGES, Run(**options), console=QUIET)
    state = checkpoint.load(path)
    state["history"]["b"].pop()
    checkpoint.save(state, path)
    with pytest.raises(ValueError, match="damaged: history must have as many steps of each method"):
        fit({"a": tiny(), "b": tiny()}, IMAGES, Run(resume=True, **options), console=QUIET)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_on_one_checkpoint(resume, tmp_path):
    path = tmp_path / "run.pt"
    if resume:
        run(tiny(), 1, checkpoint=path)
    ready, child = tmp_path / "ready", os.fork()
    if child == 0:
        with checkpoint.reserved(path, resume):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not ready.exists():
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match="run.pt is the checkpoint of another run"):
            run(tiny(), 1, checkpoint=path, resume=resume)
        run(tiny(), 1, checkpoint=tmp_path / "other.pt")  # beside it there is room
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / "run.pt.lock").exists()  # which a dead run leaves, and which keeps nobody out
    run(tiny(), 1, checkpoint=path, resume=resume)
    assert {file.name for file in tmp_path.iterdir()} == {"run.pt", "other.pt", "ready"}


def test_one_of_many_gets_a_checkpoint_at_a_time(tmp_path):
    """The lock's file comes and goes; whoever opens one that is about to go must not take it for the lock."""
    path, inside, most, refused = tmp_path / "run.pt", [], [], []

    def enter():
        for _ in range(200):
            try:
                with checkpoint.reserved(path, False):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except BlockingIOError:
                refused.append(1)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(enter) for _ in range(4)]:
            future.result()
    assert max(most) == 1 and len(most) + len(refused) == 800 and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    path = tmp_path / "run.pt"
    partial = path.with_name(f"run.pt.{'0' * 32}.partial")
    partial.touch()
    monkeypatch.setattr("fcntl.flock", flock)
    with checkpoint.reserved(path, False):
        run(tiny(), 1, checkpoint=path)
    assert set(tmp_path.iterdir()) == {path, partial}  # which may be of a run that is alive


def test_numpys_numbers_are_numbers_in_a_checkpoint_too(tmp_path):
    path, options = tmp_path / "run.pt", {"learning_rate": np.float32(0.25), "seed": np.int64(3), "clip": np.float64(1)}
    method = tiny()
    method.options = {"momentum": np.float32(0.5), "name": np.str_("byol"), "widths": (1, 2)}
    losses = run(method, np.int64(2), checkpoint=path, **options)
    again = tiny()
    again.options = {"momentum": 0.5, "name": "byol", "widths": (1, 2)}
    assert run(again, 2, checkpoint=path, resume=True, learning_rate=0.25, seed=3, clip=1.0) == losses


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "many"}, TypeError, "steps must be an integer, got str"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got float"),
        ({"save_every": 0}, ValueError, "save_every must be positive, got 0"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be positive, got -1"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got str"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite, got nan"),
        ({"weight_decay": -1}, ValueError, "weight_decay must not be negative, got -1"),
        ({"layer_decay": None}, TypeError, "layer_decay must be a number, got NoneType"),
        ({"layer_decay": 2}, ValueError, "layer_decay must be above 0 and at most 1, got 2"),
        ({"clip": "short"}, TypeError, "clip must be a number, got str"),
        ({"amp": "yes"}, TypeError, "amp must be True or False, got 'yes'"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
        ({"optimizer": 3}, ValueError, "optimizer must be one of 'adamw', 'lars', got 3"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path or None, got int"),
        ({"resume": True}, ValueError, "resume needs a checkpoint, got None"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Run(**{"batch_size": 8, "steps": 1, **options})


def test_two_savers_do_not_mix_their_tensors(tmp_path):
    path = tmp_path / "run.pt"

    def save(number):
        for _ in range(30):
            checkpoint.save({"number": torch.full((1 << 16,), float(number))}, path)
            found = checkpoint.load(path)["number"]
            assert (found == found[0]).all()

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(save, number) for number in range(3)]:
            future.result()
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_that_is_there_is_not_overwritten(finished):
    before = finished.read_bytes()
    with pytest.raises(FileExistsError, match="run.pt exists, and would be overwritten"):
        run(tiny(), 1, checkpoint=finished)
    assert finished.read_bytes() == before


@pytest.mark.parametrize("place", ["/proc/run.pt", "/dev/null/run.pt", "folder", "x" * 255])
def test_what_cannot_be_written_is_found_before_the_first_step(place, tmp_path):
    (tmp_path / "folder").mkdir()
    method = tiny(loss=lambda z: pytest.fail("a step"))
    with pytest.raises(OSError):
        run(method, checkpoint=tmp_path / place)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("step", [1, STEPS - 1])
def test_sigterm_saves_when_the_step_is_done(step, tmp_path):
    before, path = signal.getsignal(signal.SIGTERM), tmp_path / "run.pt"
    with pytest.raises(SystemExit) as caught:
        run(new("byol"), checkpoint=path, writer=InterruptAfter(step, signal.SIGTERM))
    assert caught.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert len(checkpoint.load(path)["history"]["m"]) == step + 1
    assert run(new("byol"), checkpoint=path, resume=True) == run(new("byol"))


def test_a_signal_that_comes_too_late_for_the_loop_is_not_lost():
    with pytest.raises(SystemExit):
        with signals.deferred() as received:
            assert received() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert received() == signal.SIGTERM


def test_killed_while_saving_loses_nothing(tmp_path):
    path, partly = tmp_path / "run.pt", 0
    checkpoint.save({"number": torch.zeros(1 << 20)}, path)
    for _ in range(6):
        child = os.fork()
        if child == 0:
            for number in range(1, 1000):
                checkpoint.save({"number": torch.full((1 << 20,), float(number))}, path)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        number = checkpoint.load(path)["number"]
        assert (number == number[0]).all()
        partly = max(partly, len(list(tmp_path.glob("run.pt.*.partial"))))
    assert partly > 0  # a kill did come in the middle of a save
    with checkpoint.reserved(path, True):
        assert {file.name for file in tmp_path.iterdir()} == {"run.pt", "run.pt.lock"}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    checkpoint.save({"number": torch.ones(1)}, path)

    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save({"number": torch.zeros(1)}, path)
    assert checkpoint.load(path)["number"] == 1


def test_a_full_disk_is_an_os_error(tmp_path):
    path = tmp_path / "run.pt"
    checkpoint.save({"number": torch.ones(1)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for numbers in (1 << 20, 3000):  # more and less than a buffer of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                checkpoint.save({"number": torch.zeros(numbers)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [file.name for file in tmp_path.iterdir()] == ["run.pt"] and path.read_bytes() == before


def test_control_c_without_checkpoint_interrupts_at_once():
    writer = InterruptAfter(1)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), 4, writer=writer)
    assert writer.pressed


def test_nan_stops_the_run_before_it_spoils_the_weights():
    def loss_of(bad):
        return lambda z: z.square().mean() if next(calls) < 2 else bad(z)

    for bad, message in [
        (lambda z: z.sum() * float("inf"), "m: in step 2 the loss is -?inf"),
        (lambda z: (z - z).abs().sqrt().sum(), "m: in step 2 the gradient of encoder.2.weight is NaN"),
    ]:
        calls = iter(range(9))
        method = tiny(loss=loss_of(bad))
        with pytest.raises(FloatingPointError, match=message):
            run(method)
        assert all(p.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}], ids=str)
def test_a_loss_may_leave_out_an_embedding(options):
    more = tiny(loss=lambda z, left_out: z.square().mean())
    forward = more.forward
    more.forward = lambda view: (*(z := forward(view)), 2 * z[0])
    assert run(more, 3, **options) == run(tiny(), 3, **options)


def test_gradients_are_clipped_to_a_norm(monkeypatch):
    norms = []

    def step(self):
        norms.append(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]]))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(tiny(loss=lambda z: 100 * z.square().mean()), 2, clip=0.5)
    run(tiny(loss=lambda z: 1e-6 * z.square().mean()), 2, clip=0.5)
    assert norms[:2] == pytest.approx([0.5, 0.5], rel=1e-4) and 0 < max(norms[2:]) < 1e-3


def test_amp_runs_networks_in_bfloat16_and_keeps_weights_in_float32():
    dtypes = []
    method = tiny(loss=lambda z: dtypes.append(z.dtype) or z.float().square().mean())
    run(method, 1, amp=True)
    run(method, 1)
    assert dtypes == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in method.parameters()} == {torch.float32}


def test_lars_scales_each_layers_step_to_its_weights():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    optimizer = make_optimizer("lars", layer, 0.5, 0.1)
    velocity = 0
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = torch.full((2, 3), 7.0), torch.full((2,), 7.0)
        optimizer.step()
        g = 7 + 0.1 * weight
        velocity = 0.9 * velocity + 1e-3 * weight.norm() / g.norm() * g
        weight = weight - 0.5 * velocity
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.bias.detach().double(), bias - 0.5 * 7 * (1 + 1.9), rtol=1e-6, atol=1e-6)
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], 1.0).step()
    torch.testing.assert_close(zero.detach(), -torch.ones(2, 2))


def test_biases_and_normalisation_do_not_decay():
    method = new("simclr")
    matrices, vectors = make_optimizer("adamw", method, 1e-3, 0.1).param_groups
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert all(p.dim() > 1 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(method.parameters()))
    with pytest.raises(ValueError, match="optimizer must be one of 'adamw', 'lars', got 'sgd'"):
        make_optimizer("sgd", method, 1e-3, 0.1)
