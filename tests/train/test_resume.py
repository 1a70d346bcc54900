"""Runs that stop and go on: the same bits, after Ctrl-C and other signals; and what is no continuation."""

import os
import signal

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl.train import METHODS, Run, checkpoint, create, fit, signals
from tests.train.runs import IMAGES, QUIET, STEPS, InterruptAfter, new, run, small, tiny


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
    resumed = create(name, STEPS, **small(name))
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


@pytest.mark.parametrize("last", [False, True])
def test_channels_may_be_last_before_or_after(last, tmp_path):
    """What AdamW keeps of a convolution lies in memory as its weights do."""

    def method():
        method = tiny()
        method.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, stride=3), nn.Conv2d(4, 8, 3), nn.Flatten())
        return method

    torch.manual_seed(1)
    weights = method().state_dict()

    def run_it(**options):
        some = method()
        some.load_state_dict(weights)
        return run(some, 8, learning_rate=0.1, **options)

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run_it(checkpoint=path, channels_last=last, writer=InterruptAfter(3))
    resumed = run_it(checkpoint=path, channels_last=not last, resume=True)
    assert resumed == pytest.approx(run_it(), rel=1e-4)


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
    with pytest.raises(ValueError, match=r"run with example \[\(28, 28\)\], got \[\(14, 28\)\]"):
        smaller = Run(batch_size=16, steps=2, checkpoint=path, resume=True)
        fit({"m": tiny()}, IMAGES[:, :14], smaller, console=QUIET)
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


def test_methods_of_one_checkpoint_have_done_as_many_steps(tmp_path):
    path = tmp_path / "run.pt"
    options = {"batch_size": 16, "steps": 2, "checkpoint": path}
    fit({"a": tiny(), "b": tiny()}, IMAGES, Run(**options), console=QUIET)
    state = checkpoint.load(path)
    state["history"]["b"].pop()
    checkpoint.save(state, path)
    with pytest.raises(ValueError, match="damaged: history must have as many steps of each method"):
        fit({"a": tiny(), "b": tiny()}, IMAGES, Run(resume=True, **options), console=QUIET)


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


def test_control_c_without_checkpoint_interrupts_at_once():
    writer = InterruptAfter(1)
    with pytest.raises(KeyboardInterrupt):
        run(tiny(), 4, writer=writer)
    assert writer.pressed
