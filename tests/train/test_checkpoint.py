"""Checkpoints: never half written, never of two runs, and looked at before they are believed."""

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

from fastssl.train import checkpoint
from fastssl.train.checkpoint import load_encoder
from tests.train.runs import run, tiny


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


ABSENT, WEIGHT = object(), "encoder.2.weight"


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
        (("optimizers", "m", "other"), {}, "does not fit m: optimizers must have states of the method's parameters"),
        (("optimizers", "m", WEIGHT), [], f"optimizers, {WEIGHT}: it must be a dict of tensors, and is list"),
        (("optimizers", "m", WEIGHT, "exp_avg"), torch.ones(3), r"exp_avg must be float32 \(8, 784\), and is float32"),
        (("optimizers", "m", WEIGHT, "exp_avg_sq"), ABSENT, "exp_avg_sq must be .*, and is absent"),
        (("optimizers", "m", WEIGHT, "step"), 7, r"step must be float32 \(\), and is int"),
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
