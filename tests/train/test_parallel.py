"""Data parallel runs: two processes have the losses of one, one and the same weights, and the same errors."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import TensorDataset

from tests.distributed.processes import run_processes

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image
from rich.console import Console

import fastssl.train.__main__ as command_line
from fastssl.distributed import gather_rows, rank, world_size
from fastssl.train import METHODS, Method, Run, Step, checkpoint, create, fit, fsdp, learner, parallel
from fastssl.train.data.images import Images
from fastssl.train.networks.batch_norm import BatchNorm, synchronize
from fastssl.train.networks.models import BagOfWords
from tests.train.runs import small, spoken

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")
STEPS, BATCH, PROCESSES = 5, 12, 2
QUIET = Console(quiet=True)
SHARDED = {"fsdp": True, "clip": 0.5}
KINDS = {
    "whole": {},
    "chunks": {"chunk_size": 4, "steps": 2},
    "naive": {},
    "amp": {"amp": True},
    "next_sentence": {},
    "fsdp": SHARDED,
    "fsdp by chunks with LARS": {**SHARDED, "chunk_size": 4, "steps": 2, "optimizer": "lars"},
}
CASES = [
    *((name, kind) for name in METHODS for kind in ("whole", "chunks")),
    *(("moco_v2", "naive"), ("simclr", "amp"), ("bert", "next_sentence")),
    *(("ibot", "fsdp"), ("gpt", "fsdp"), ("hubert", "fsdp by chunks with LARS")),
]


def new(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Method:
    """Without dropout, whose masks differ; and in double precision, whose rounding training amplifies to nothing."""
    torch.manual_seed(rank())  # the first process's weights are to be everybody's
    method = create(name, STEPS, **small(name), **options)
    for module in method.modules():
        if isinstance(module, BagOfWords):
            module.words = nn.Embedding(200, module.features, padding_idx=0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "electra":
        method.temperature = 1e-12  # its draws differ, too
    method.to(dtype)
    views = method.views

    @functools.wraps(views)  # whose arguments say whether this process's share is enough
    def converted(*args: Any) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in views(*args))

    method.views = converted
    return method


def data_of(method: Method) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 28, 28), dtype=torch.uint8, generator=generator)
    if method.load is METHODS["cpc"].load:
        return spoken(40)
    tokens = torch.randint(1, 200, (40, 8), generator=generator)
    if method.load in (METHODS["clip"].load, METHODS["coca"].load):
        tokens[::3, 5:] = 0  # padding, of which processes have unlike numbers
        return TensorDataset(images.unsqueeze(1).expand(-1, 3, -1, -1), tokens)
    if method.load in [METHODS[name].load for name in ("simcse", "simcse_bert", "bert")]:
        return tokens
    labelled = isinstance(method, (METHODS["sup_con"], METHODS["supervised"]))
    return TensorDataset(images, torch.arange(len(images)) % 3) if labelled else images


def steps_of(method: Method, writer: Any = None, console: Console | None = QUIET, **options: Any) -> list[Step]:
    run = Run(**{"batch_size": BATCH, "steps": STEPS, **options})
    return fit({"m": method}, data_of(method), run, writer=writer, console=console)["m"]


def run(method: Method, **options: Any) -> list[float]:
    return [step.loss for step in steps_of(method, **options)]


def trained(name: str, kind: str, alone: bool = False) -> dict[str, Any]:
    options = {kind: True} if kind == "next_sentence" else {}
    method = new(name, torch.float32 if kind == "amp" else torch.float64, **options)
    method.impl = "naive" if kind == "naive" else "fastssl"
    history = steps_of(method, **{**KINDS[kind], **({"fsdp": False} if alone else {})})
    return {
        "losses": [step.loss for step in history],
        "health": [(h.rank, h.uniformity, h.alignment or 0.0) for h in (step.health for step in history)],
        "state": fsdp.whole(dict(method.state_dict())),
    }


class InterruptIn:
    """Sends a signal to one process, twice if there are several, while the views of that step are being drawn."""

    def __init__(self, method: Method, process: int, step: int, number: int) -> None:
        self.views, self.process, self.left, self.number = method.views, process, step, number
        method.views = self

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        if self.left == 0 and rank() == self.process:
            for _ in range(world_size()):  # from the terminal, and from torchrun
                os.kill(os.getpid(), self.number)
        self.left -= 1
        return self.views(*args)


def interrupt(process: int, path: Path | None, number: int = signal.SIGINT) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    method = new("byol")
    InterruptIn(method, process, 1, number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        run(method, checkpoint=path)
    signal.signal(signal.SIGINT, before)


def _check_control_c_in_one_process_ends_and_saves_all(folder: Path) -> None:
    interrupt(1, folder / "two.pt")
    assert len(checkpoint.load(folder / "two.pt")["history"]["m"]) == 2
    if rank() == 0:
        (folder / "copy.pt").write_bytes((folder / "two.pt").read_bytes())
    dist.barrier()
    assert run(new("byol"), checkpoint=folder / "copy.pt", resume=True) == run(new("byol"))
    interrupt(0, None)


def _check_sigterm_in_one_process_ends_and_saves_all(folder: Path) -> None:
    interrupt(1, folder / "terminated.pt", signal.SIGTERM)
    assert run(new("byol"), checkpoint=folder / "terminated.pt", resume=True) == run(new("byol"))


def _check_checkpoints_move_between_shards_and_whole_weights(folder: Path) -> None:
    """And between the passes of a step, a process has one half of each layer, the student's and the teacher's."""

    def measured(kept: list[float]) -> Method:
        method = new("jepa")
        loss, layers = method.loss, [network.layers[:-1] for network in (method.encoder, method.teacher.module)]
        bytes_of = [sum(p.nbytes for p in some.parameters()) for some in layers]

        def measuring(*embeddings: Tensor, group: dist.ProcessGroup) -> Tensor:
            for some, whole in zip(layers, bytes_of, strict=True):
                kept.append(sum(fsdp.local(p).nbytes for p in some.parameters()) / whole)
            return loss(*embeddings, group=group)

        method.loss = measuring
        return method

    losses = run(new("jepa"), steps=3)
    for sharded in (True, False):
        path, before, after = folder / f"sharded {sharded}.pt", [], []
        method = measured(before)
        InterruptIn(method, 0, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(method, steps=3, fsdp=sharded, checkpoint=path)
        if rank() == 0 and sharded:
            (folder / "of two shares.pt").write_bytes(path.read_bytes())
        resumed = run(measured(after), steps=3, fsdp=not sharded, checkpoint=path, resume=True)
        assert resumed == pytest.approx(losses, rel=1e-9)
        halves, wholes = (before, after) if sharded else (after, before)
        assert set(halves) == {0.5} and set(wholes) == {1.0}


def _check_the_command_line_evaluates_what_was_shared_out(folder: Path) -> None:
    images = data_of(new("jepa"))
    METHODS["jepa"].load = staticmethod(lambda directory, size=None: Images("noise", images, None, images, None))
    options = ["--steps", "2", "--batch-size", "4", "--device", "cpu", "--checkpoint", str(folder / "command.pt")]
    tried, evaluate = [], METHODS["jepa"].evaluate
    METHODS["jepa"].evaluate = lambda self, data: tried.append(dict(self.state_dict())) or evaluate(self, data)
    command_line._train(command_line._parser().parse_args(["jepa", "--fsdp", *options]), torch.device("cpu"))
    saved = checkpoint.load(folder / "command.pt")["weights"]["jepa"]
    assert len(tried) == (2 if rank() == 0 else 0)
    assert all(torch.equal(x, saved[key]) for state in tried[1:] for key, x in state.items())


def _check_what_cannot_be_sharded_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="fsdp needs a method that has Transformer layers, got m"):
        run(new("simclr"), fsdp=True)
    with pytest.raises(ValueError, match="fsdp needs bfloat16 or no amp, got 'float16'"):
        run(new("jepa"), fsdp=True, amp="float16")


def _check_the_checkpoint_of_another_run_is_nobodys(folder: Path) -> None:
    with parallel.held_by_first_process(checkpoint.reserved(folder / "taken.pt", False)):
        with pytest.raises(BlockingIOError, match="taken.pt is the checkpoint of another run"):
            run(new("simclr"), checkpoint=folder / "taken.pt")
        dist.barrier()


def _check_the_checkpoint_of_one_process(folder: Path) -> None:
    torch.save(run(new("byol"), checkpoint=folder / "one.pt", resume=True), folder / f"resumed {rank()}")


def _check_nan_in_one_process_stops_all(folder: Path) -> None:
    method = new("simclr")
    forward = method.forward
    method.forward = lambda *views: tuple(z * (math.nan if rank() == 1 else 1) for z in forward(*views))
    with pytest.raises(FloatingPointError, match="m: in step 0 the loss is nan"):
        run(method)
    method = new("simclr")
    if rank() == 1:
        method.encoder[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="m: in step 0 the gradient of encoder.0.weight is NaN"):
        run(method)


def _check_nan_that_is_found_late_leaves_shares_as_they_were(folder: Path) -> None:
    """As on a GPU, where the optimiser leaves out such a step."""
    learner.Learner._late = property(lambda self: 1, lambda self, late: None)
    for optimizer in ("adamw", "lars"):
        method, kept = new("jepa"), []

        def loss(*embeddings: Tensor, group: dist.ProcessGroup, method=method, kept=kept) -> Tensor:
            kept.append([fsdp.local(p).clone() for p in method.encoder.parameters()])
            return type(method).loss(method, *embeddings, group=group) * (math.nan if len(kept) == 2 else 1)

        method.loss = loss
        with pytest.raises(FloatingPointError, match="m: in step 1 the loss is nan"):
            run(method, fsdp=True, optimizer=optimizer)
        assert len(kept) == 3 and all(map(torch.equal, kept[1], kept[2])) and not all(map(torch.equal, *kept[:2]))
    del learner.Learner._late


def _check_what_cannot_be_shared_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of the number of processes \(2\), got 13"):
        run(new("simclr"), batch_size=13)
    for chunk_size in (3, 8):
        with pytest.raises(ValueError, match=rf"chunk_size .*processes \(2\) .*batch_size \(12\), got {chunk_size}"):
            run(new("simclr"), chunk_size=chunk_size)

    class Other(nn.BatchNorm2d):
        """What it adds is nobody's business."""

    method = new("simclr")
    method.encoder[1] = Other(32)
    with pytest.raises(ValueError, match=r"encoder.1 must be torch.nn.BatchNorm1d, 2d or 3d, got Other"):
        run(method)


def _check_errors_of_files_are_everybodys(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        run(new("simclr"), checkpoint=folder / "elsewhere", resume=True)
    folder.joinpath("directory").mkdir(exist_ok=True)
    with pytest.raises(OSError, match="is a directory"):
        run(new("simclr"), checkpoint=folder / "directory", save_every=2)


def _check_only_the_first_process_writes(folder: Path) -> None:
    class Writer:
        def add_scalar(self, *args: Any) -> None:
            assert rank() == 0

    console = Console(record=True, quiet=rank() == 0)
    run(new("simclr"), writer=Writer(), console=console, steps=1)
    assert console.export_text() == ""


def _check_dropout_is_each_processs_own(folder: Path) -> None:
    method, masks = create("simcse", STEPS), []
    method.encoder.dropout.register_forward_hook(lambda module, args, output: masks.append(output != 0))
    run(method, steps=1)
    everyone = gather_rows(masks[0].float()).chunk(world_size())
    assert not torch.equal(*everyone)


def _check_batch_norm(folder: Path) -> None:
    """Against torch's, of the whole batch in double precision: at most twice the error that it has itself."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 5), (2, 5), (4, 5, 3), (4, 5, 3, 2), (2, 1, 3, 2, 2)):
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
        for options in ({}, {"affine": False}, {"momentum": None, "eps": 0.1}, {"track_running_stats": False}):
            # Channels of all kinds: with a mean far from 0, or that differs between the processes; constant.
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            channel = [1, shape[1], *[1] * (len(shape) - 2)]
            x += torch.tensor([0.0, 30.0, 0.0, 0.0, -3.0])[: shape[1]].view(channel)
            x[: len(x) // 2, :1] += 5
            x[:, 2:3] = 1.5
            g = torch.randn(shape, generator=generator, dtype=torch.float64)
            exact, eager = (_normalized(kind, options, x, g, dtype) for dtype in (torch.float64, torch.float32))
            for dtype in (torch.float64, torch.float32):
                ours = _normalized(kind, options, x, g, dtype, parallel=True)
                for name, value in ours.items():
                    scale = exact[name].abs().max()
                    error, allowed = (value - exact[name]).abs().max(), (eager[name] - exact[name]).abs().max()
                    allowed = 2 * allowed + 1e-6 * scale if dtype == torch.float32 else 1e-12 * scale + 1e-12
                    assert error <= allowed, (shape, options, dtype, name, error, allowed)


def _normalized(
    kind: type, options: dict[str, Any], x: Tensor, g: Tensor, dtype: torch.dtype, parallel: bool = False
) -> dict[str, Tensor]:
    """Outputs, gradients and statistics after two steps of a layer, on the whole batch or on this process's share."""
    layer = kind(x.shape[1], **options).to(dtype)
    for i, p in enumerate(layer.parameters()):
        nn.init.uniform_(p, generator=torch.Generator().manual_seed(i))
    rows = slice(None)
    if parallel:
        before = dict(layer.named_parameters())
        synchronize(layer)
        assert type(layer) is BatchNorm and all(p is before[name] for name, p in layer.named_parameters())
        rows = slice(rank() * len(x) // world_size(), (rank() + 1) * len(x) // world_size())
    for i in range(2):
        layer.zero_grad()
        part = (x[rows] * (1 + i)).to(dtype).requires_grad_()
        y = layer(part)
        y.backward(g[rows].to(dtype))
    gathered = {"y": y.detach(), "x": part.grad}
    summed = {f"{name} gradient": p.grad for name, p in layer.named_parameters()}
    if parallel:
        gathered = {name: gather_rows(z) for name, z in gathered.items()}
        for z in summed.values():
            dist.all_reduce(z)
        if rank() == 1 and layer.track_running_stats:  # alone: evaluation takes no exchange
            assert layer.eval()(part).shape == part.shape
    found = {**gathered, **summed, **dict(layer.named_buffers())}
    return {name: z.double() for name, z in found.items()}


def _check_batch_norm_of_half_precision(folder: Path) -> None:
    x = torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(0)) + 3
    layer, whole = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    synchronize(layer)
    part = x[4 * rank() :][:4].bfloat16().requires_grad_()
    y = layer(part)
    y.backward(torch.ones_like(y) * part)
    assert y.dtype == part.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(gather_rows(y).float(), whole(x.bfloat16().float()), rtol=1e-2, atol=1e-2)


def _everything(folder: Path) -> None:
    for case in CASES:
        torch.save(trained(*case), folder / f"{' '.join(case)} {rank()}")
    for check in [check for name, check in globals().items() if name.startswith("_check")]:
        check(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What became of everything above in two processes, which are started once."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    interrupt(0, folder / "one.pt")
    run_processes(functools.partial(_everything, folder), PROCESSES, folder)
    return folder


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_processes_train_as_one(name, kind, folder):
    first, second = (torch.load(folder / f"{name} {kind} {r}") for r in range(PROCESSES))
    assert first["losses"] == second["losses"] and first["health"] == second["health"]
    assert all(torch.equal(x, second["state"][key]) for key, x in first["state"].items())
    one = trained(name, kind, alone=True)
    if kind == "amp":  # activations are rounded to three digits
        torch.testing.assert_close(first["losses"], one["losses"], rtol=0.02, atol=0)
        return
    torch.testing.assert_close(first["losses"], one["losses"], rtol=1e-9, atol=0)
    torch.testing.assert_close(first["health"], one["health"], rtol=1e-5, atol=1e-5)  # measured in single precision
    torch.testing.assert_close(first["state"], one["state"], rtol=1e-6, atol=1e-6)  # Adam divides by small gradients


def test_a_process_has_its_gpu_before_its_group_which_is_patient(monkeypatch):
    calls = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, timeout: calls.append((*args, timeout.days)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("end"))
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        with parallel.process_group(device):
            calls.append("run")
    assert calls == [("gloo", 1), "run", "end", device, ("cpu:gloo,cuda:nccl", 1), "run", "end"]


def test_a_group_of_gpus_alone_is_refused():
    """Its processes could not agree without waiting for GPUs; here it is one of the backend "fake"."""
    dist.init_process_group("cuda:fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="default group must take tensors of CPUs too, .* got one of cuda:fake"):
            run(new("simclr"))
    finally:
        dist.destroy_process_group()


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(ValueError, match="fsdp needs several processes, such as torchrun starts, got 1"):
        run(new("jepa"), fsdp=True)


def test_errors_interrupts_and_batch_norm(folder):
    """All `_check`s have passed, else there was no folder."""


def test_checkpoints_go_from_one_process_to_two_and_back(folder):
    losses = run(new("byol"))
    for r in range(PROCESSES):
        assert torch.load(folder / f"resumed {r}") == pytest.approx(losses, rel=1e-9)
    assert run(new("byol"), checkpoint=folder / "two.pt", resume=True) == pytest.approx(losses, rel=1e-9)
    of_shares = run(new("jepa"), steps=3, checkpoint=folder / "of two shares.pt", resume=True)
    assert of_shares == pytest.approx(run(new("jepa"), steps=3), rel=1e-9)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def command(tmp_path) -> Callable[..., subprocess.Popen]:
    """`python ARGUMENTS` in a folder that has pictures.csv."""
    table = ["image,caption"]
    pictures = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
        table.append(f"{i}.png,number{i}")
    (tmp_path / "pictures.csv").write_text("\n".join(table))
    paths = os.pathsep.join(["" if p is None else p for p in sys.path])

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *arguments, "--data", "pictures.csv", "--batch-size", "8"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def test_torchrun(command, tmp_path):
    """The command in two processes and in one. The losses, in single precision, differ by at most 1e-6 of them."""
    losses = []
    for i, launch in enumerate(([], TORCHRUN)):
        run = command(*launch, "-m", "fastssl.train", "siglip", "--steps", "3", "--checkpoint", f"{i}.pt")
        output, error = run.communicate(timeout=400)
        assert run.returncode == 0, error
        for line in ("pictures.csv: 16 training examples", "siglip step 2: loss", "recall@1 of"):
            assert output.count(line) == 1, output
        losses.append([step["loss"] for step in checkpoint.load(tmp_path / f"{i}.pt")["history"]["siglip"]])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("launch", "number", "to_all"),
    [([], signal.SIGTERM, False), (TORCHRUN, signal.SIGTERM, False), (TORCHRUN, signal.SIGINT, True)],
    ids=["alone", "scheduler", "terminal"],
)
def test_signals_to_the_command_save_and_another_run_is_kept_out(launch, number, to_all, command, tmp_path):
    """A scheduler sends them to the first process or to all, a terminal to all."""
    arguments = [*launch, "-m", "fastssl.train", "siglip", "--steps", "100000", "--checkpoint", "run.pt"]
    arguments += ["--save-every", "100000"]  # so that only the signal saves, however long the other run takes to start
    run = command(*arguments)
    for line in run.stdout:
        if "siglip step 0: loss" in line:
            break
    if not launch:
        other = command(*arguments)
        _, error = other.communicate(timeout=400)
        assert other.returncode != 0 and "error: run.pt is the checkpoint of another run" in error
        assert not (tmp_path / "run.pt").exists()
    (os.killpg if to_all else os.kill)(run.pid, number)
    _, error = run.communicate(timeout=400)
    assert run.returncode == (128 + number if not launch else run.returncode) != 0, error
    assert 1 <= len(checkpoint.load(tmp_path / "run.pt")["history"]["siglip"]) < 100_000
    assert not list(tmp_path.glob("run.pt.*"))
