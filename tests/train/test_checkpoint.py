"""Runs that stop: exact resume, checkpoints that are never half written, Ctrl-C, NaN; and how runs are optimised."""

import os
import resource
import signal
import time

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from fastssl.train import METHODS, Method, Run, checkpoint, create, fit
from fastssl.train.optimizers import LARS, make_optimizer

QUIET = Console(quiet=True)
IMAGES = torch.randint(256, (48, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
STEPS = 5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
    """A writer that presses Ctrl-C while step `step` is being done."""

    def __init__(self, step: int) -> None:
        self.step, self.pressed = step, False

    def add_scalar(self, label, value, step):
        if step == self.step and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)


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
    with pytest.raises(ValueError, match=r"run.pt does not fit m: .* size mismatch for encoder.2.weight") as error:
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


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "run.pt"
    checkpoint.save({"weights": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(ValueError, match=r"run.pt is no checkpoint, or damaged"):
        run(tiny(), checkpoint=path, resume=True)
    checkpoint.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"run.pt is no checkpoint of a training run"):
        run(tiny(), checkpoint=path, resume=True)


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
        partly += path.with_name("run.pt.partial").exists()
    assert partly > 0  # a kill did come in the middle of a save
    checkpoint.save({"number": torch.ones(1)}, path)
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
