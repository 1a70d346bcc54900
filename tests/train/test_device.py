"""Runs on a GPU, without one: PyTorch's device "meta" stands in for it, whose tensors have no numbers to be read.

What would make the host wait for a GPU raises there, or is seen by `Waits`: numbers that are read, and numbers that are
sent without non_blocking.
"""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl._meter import meter
from fastssl.distributed import processes, sigmoid
from fastssl.nn import EMA
from fastssl.train import METHODS, Images, Run, checkpoint, evaluate, fit, learner, parallel
from fastssl.train.device import Reading, choose
from tests.devices import DEVICES, device_param
from tests.train.runs import IMAGES, QUIET, InterruptAfter, data_of, new, run, tiny

META = torch.device("meta")


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, by the name of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        if name in ("tensor", "as_tensor"):
            source = args[0] if isinstance(args[0], Tensor) else torch.empty(0)
        else:
            source = args[1] if name == "copy_" else args[0] if args else None
        sends = name in ("to", "tensor", "as_tensor", "copy_", "type_as") and isinstance(result, Tensor)
        if sends and result.is_meta and not source.is_meta and not kwargs.get("non_blocking", False):
            self.found.append(f"{name}: {_caller()}")
        if name in ("__getitem__", "__setitem__") and args[0].is_meta:
            places = args[1] if isinstance(args[1], tuple) else args[1:2]
            if any(isinstance(x, (list, Tensor)) and not getattr(x, "is_meta", False) for x in places):
                self.found.append(f"{name}: {_caller()}")
        return result


def _caller() -> str:
    """The line of fastssl that is being run."""
    return next(f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_stack()) if "/fastssl/" in f.filename)


@pytest.fixture
def numbers(monkeypatch) -> list[Tensor]:
    """What is read late, whose numbers are then all 1."""
    read: list[Tensor] = []

    class Ones:
        def __init__(self, x: Tensor) -> None:
            assert x.is_meta
            self.x = x

        def numbers(self) -> list[float]:
            read.append(self.x)
            return [1.0] * self.x.numel()

    monkeypatch.setattr("fastssl.train.step.Reading", Ones)
    monkeypatch.setattr("fastssl.train.evaluate.Reading", Ones)
    return read


KINDS = [*((name, None) for name in METHODS), ("dino", 4), ("moco_v2", 4), ("simclr", 4)]


def steps_that_wait(name: str, chunk_size: int | None) -> list[str]:
    """What the host would wait for in the steps of a method."""
    method = new(name).to(META)
    run = Run(batch_size=8, steps=2, device="meta", chunk_size=chunk_size, clip=1.0, channels_last=True)
    for teacher in method.modules():
        if isinstance(teacher, EMA):
            teacher._known = teacher.step, teacher.step._version, 0  # it is read in the first step after a move
    with Waits() as waits:
        history = fit({"m": method}, data_of(method), run, console=QUIET)
    assert len(history["m"]) == 2 and all(p.is_meta for p in method.parameters())
    return waits.found


@pytest.mark.parametrize(("name", "chunk_size"), KINDS)
def test_the_host_waits_for_nothing_in_a_step(name, chunk_size, numbers):
    assert steps_that_wait(name, chunk_size) == []


@pytest.fixture
def four_processes(monkeypatch):
    """This is the first of them; the others, which are not there, have what it has."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)

    def gather(output: Tensor, x: Tensor, group: Any) -> None:
        output.view(4, *x.shape).copy_(x.expand(4, *x.shape))

    for module in (processes, sigmoid):
        monkeypatch.setattr(module, "all_gather", gather)
    for name in ("all_reduce", "batch_isend_irecv", "reduce_scatter_single", "reduce_scatter_tensor"):  # of numbers
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: [], raising=False)
    monkeypatch.setattr(parallel, "start_alike", parallel.synchronize)  # else numbers are sent to the others
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "chunk_size"), KINDS)
def test_the_host_of_each_process_waits_for_nothing_in_a_step(name, chunk_size, numbers, four_processes):
    if name in ("siglip", "sup_con"):  # docs/families/distributed.md says why
        with pytest.raises(NotImplementedError, match="meta tensor|_unique2"):
            steps_that_wait(name, chunk_size)
    else:
        assert steps_that_wait(name, chunk_size) == []


on_a_gpu = pytest.mark.parametrize("device", [device_param(device) for device in DEVICES if device != "cpu"])


@on_a_gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_has_the_losses_of_the_cpu(name, device):
    torch.manual_seed(0)
    losses = [run(new(name), 2, device=where) for where in ("cpu", device)]
    rtol = 0.05 if name in ("electra", "simcse", "simcse_bert") else 1e-3  # whose draws and dropout differ
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=rtol, atol=1e-3)
    assert all(abs(loss) < float("inf") for loss in losses[1])


@on_a_gpu
def test_a_gpu_takes_every_kind_of_step(device):
    kinds = {"amp": "bfloat16"}, {"amp": "float16"}, {"chunk_size": 4}, {"channels_last": True, "clip": 1.0}
    for options in (*kinds, {"optimizer": "lars"}):
        losses = run(new("moco_v2"), 3, device=device, **options)
        assert all(abs(loss) < float("inf") for loss in losses), options


@on_a_gpu
def test_a_gpu_goes_on_with_what_the_cpu_began_and_back(device, tmp_path):
    losses = run(new("byol"))
    for i, (first, then) in enumerate((("cpu", device), (device, "cpu"))):
        path = tmp_path / f"{i}.pt"
        with pytest.raises(KeyboardInterrupt):
            run(new("byol"), writer=InterruptAfter(1), checkpoint=path, device=first)
        resumed = run(new("byol"), checkpoint=path, resume=True, device=then)
        torch.testing.assert_close(resumed, losses, rtol=0.02, atol=1e-3)


@on_a_gpu
def test_features_are_probed_where_they_are(device):
    labels = torch.arange(len(IMAGES)) % 3
    images = Images("noise", IMAGES, labels, IMAGES, labels)
    found = evaluate.accuracies(new("simclr").to(device).encoder, images)
    assert found == pytest.approx(evaluate.accuracies(new("simclr").encoder, images), abs=0.1)


@pytest.fixture
def late(monkeypatch) -> int:
    """On a CPU, too, steps are read as late as on a GPU."""
    monkeypatch.setattr(
        learner.Learner, "_late", property(lambda self: learner._LATE, lambda self, late: None), raising=False
    )
    return learner._LATE


def test_what_is_read_late_is_the_same(late):
    method, told = tiny(), []

    class Writer:
        def add_scalar(self, label: str, value: float, step: int) -> None:
            if label == "m/loss":
                told.append((step, value))

    losses = run(method, late + 3, writer=Writer())
    assert [step for step, _ in told] == list(range(late + 3)) and [value for _, value in told] == losses


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_nan_is_found_late_and_leaves_the_weights_as_they_were(optimizer, late):
    seen = []

    def loss(z: Tensor) -> Tensor:
        seen.append({name: p.clone() for name, p in method.named_parameters()})
        return z.square().mean() if len(seen) != 3 else (z - z).abs().sqrt().sum()

    method = tiny(loss=loss)
    with pytest.raises(FloatingPointError, match="m: in step 2 the gradient of encoder.2.weight is NaN"):
        run(method, 40, optimizer=optimizer)
    assert len(seen) == 3 + late
    for name, weight in seen[2].items():
        assert torch.equal(seen[3][name], weight) and not torch.equal(seen[4][name], weight)
        assert method.state_dict()[name].isfinite().all()


def test_a_checkpoint_has_all_steps_and_none_that_is_nan(late, tmp_path):
    calls = iter(range(9))
    method = tiny(loss=lambda z: z.square().mean() * (float("nan") if next(calls) == 1 else 1))
    with pytest.raises(FloatingPointError, match="m: in step 1 the loss is nan"):
        run(method, 3, checkpoint=tmp_path / "run.pt", save_every=2)
    assert not (tmp_path / "run.pt").exists()
    run(tiny(), 7, checkpoint=tmp_path / "run.pt", save_every=2)
    assert len(checkpoint.load(tmp_path / "run.pt")["history"]["m"]) == 7


def test_float16_scales_the_loss_and_leaves_out_steps_that_overflow(tmp_path):
    """Half precision ends at 65,504. The scale, at first 2^16, is halved as often as a gradient overflows."""
    weights = []

    def loss(z: Tensor) -> Tensor:
        assert z.dtype == torch.float16
        weights.append(method.encoder[2].weight.clone())
        return z.float().sum() * 1.5

    method = tiny(loss=loss)
    losses = run(method, 9, amp="float16", checkpoint=tmp_path / "run.pt")
    moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    left_out = moved.index(True)
    assert left_out >= 1 and all(moved[left_out:]) and all(loss == loss for loss in losses)
    assert checkpoint.load(tmp_path / "run.pt")["scalers"]["m"]["scale"] == 2.0 ** (16 - left_out)


def test_float16_names_a_gradient_that_no_scale_mends():
    method = tiny(loss=lambda z: (z - z).abs().sqrt().sum())
    with pytest.raises(FloatingPointError, match="m: in step 17 the gradient of encoder.2.weight is NaN"):
        run(method, 30, amp="float16")


def test_float16_resumes_with_its_scale(tmp_path):
    def method():
        return tiny(loss=lambda z: z.float().sum() * 1.5)

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(method(), writer=InterruptAfter(1), amp="float16", checkpoint=path)
    assert run(method(), amp="float16", checkpoint=path, resume=True) == run(method(), amp="float16")


def test_a_gpu_is_waited_for_when_its_numbers_are_read(monkeypatch):
    """Its events are recorded on its own stream, behind its work; here the GPU is the second of two that are not there,
    and a fake tensor is on it."""
    log = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.timed = enable_timing

        def record(self, stream: str) -> None:
            log.append(stream)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert self.timed and end.timed
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    for name, value in {"reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 170}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value if device.index == 1 else -1)
    with meter(True, torch.device("cuda", 1)) as measured:
        log.append("work")
    assert log == ["stream of cuda:1", "work", "stream of cuda:1"]
    assert (measured.before, measured.peak, measured.extra) == (100, 170, 70)
    assert measured.seconds == 0.25 and log.pop() == "wait"
    log.clear()
    with FakeTensorMode():
        reading = Reading(torch.empty(2, device="cuda:1"))
    assert log == ["stream of cuda:1"] and reading._host.device.type == "cpu"
    reading._host = torch.ones(2)
    assert reading.numbers() == [1.0, 1.0] and log == ["stream of cuda:1", "wait"]


def test_devices_are_chosen_and_refused():
    assert choose("cpu") == torch.device("cpu") and choose(torch.device("meta")) == META
    if not torch.cuda.is_available():
        assert choose("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="device must be one that PyTorch has here, which has 0 GPUs, got cuda:3"):
            choose("cuda:3")
    with pytest.raises(ValueError, match="device must be 'auto', or the name of a device such as 'cuda:0', got 'gpu'"):
        choose("gpu")
    for absent in ("fpga", "hpu"):
        with pytest.raises(ValueError, match=f"device must be one that is there, got device.*{absent}'") as caught:
            choose(absent)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(TypeError, match="device must be a name or a torch.device, got int"):
        choose(0)


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    assert [str(choose(name)) for name in ("auto", "cuda", "cuda:2", "cpu")] == ["cuda:1", "cuda:1", "cuda:2", "cpu"]
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert choose("cuda") == torch.device("cuda", 3)
    with pytest.raises(ValueError, match="device must be 'cuda' in several processes.*got 'cuda:0'"):
        choose("cuda:0")
