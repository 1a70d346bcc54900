"""What is run, stage by stage: on a GPU, and on a CPU at toy sizes, so that none of it is new on the day."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.commands import ROOT, Command, python

SECONDS = 530.0  # of a stage: a command on a lent machine may have ten minutes
_PYTEST = "-v", "-p", "no:cacheprovider", "--no-header"
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_KERNELS = ("clip_loss", "32768x512"), ("siglip_loss", "32768x512"), ("nt_xent", "32768x128")


def build(device: str) -> list[Command]:
    """The extension for this machine's own GPU, unless it is there: what is compiled once is kept."""
    return [Command("build", python("benchmarks.gpu.build", "--device", device), 420)]


def environment(device: str, scratch: Path) -> list[Command]:
    tools = ("nvidia-smi",), ("nvcc", "--version"), ("ncu", "--version"), ("compute-sanitizer", "--version")
    return [
        Command("fastssl", python("fastssl"), 60),
        Command("rates", python("benchmarks.gpu.rates", "--device", device, "--results", scratch / "rates"), 90),
        *(Command(tool[0], tool, 20) for tool in tools),
    ]


def correctness(device: str, scratch: Path) -> list[Command]:
    """One call of every operation against float64, each survivor of those before it; then the tests, which say by the
    line how they end: many of them will not, in time. Those of the Triton kernels run here, and not in processes of
    tests/gpu/test_triton.py, whose output would be lost at the limit; after 20 failures they stop, and say why."""
    workers = str(min(6, os.cpu_count() or 1))  # which share the GPU
    smoke = python("benchmarks.gpu.smoke", "--device", device, "--results", scratch / "smoke", "--workers", workers)
    commands = [Command("smoke", smoke, 180, _DETERMINISTIC)]
    if device == "cpu":
        few = python("pytest", *_PYTEST, "tests/ops/test_uniformity.py", "--collect-only")
        return [*commands, Command("tests", few, 60)]
    parallel = ("-n", workers) if find_spec("xdist") else ()
    checks = ROOT / "tests/gpu/triton_checks"
    families = [file.relative_to(ROOT) for file in sorted(checks.rglob("[!_]*.py")) if file.parent.name != "common"]
    kernels = "tests/gpu/test_cuda.py", "-k", "on_the_gpu"
    operations = "tests/ops", "tests/nn", "tests/test_optim.py", "tests/train/test_device.py", "-m", "gpu"
    return [
        *commands,
        Command("tests of the Triton kernels", python("pytest", *_PYTEST, *parallel, "--maxfail", 20, *families), 170,
                _DETERMINISTIC | {"TRITON_INTERPRET": "0"}),
        Command("tests of the CUDA kernels", python("pytest", *_PYTEST, *kernels), 40),
        Command("tests of the operations", python("pytest", *_PYTEST, *parallel, "--maxfail", 20, *operations), 140,
                _DETERMINISTIC),
    ]  # fmt: skip


def sanitizer(device: str, scratch: Path) -> list[Command]:
    """Accesses outside of arrays, and races in shared memory, of one tiny call of every operation."""
    smoke = python("benchmarks.gpu.smoke", "--device", device, "--tiny", "--results")
    tool = ("compute-sanitizer", "--target-processes", "all", "--error-exitcode", "9", "--print-limit", "20", "--tool")
    return [
        Command(name, (*tool, name, *smoke, str(scratch / name)), 250, _DETERMINISTIC)
        for name in ("memcheck", "racecheck")
    ]


def speed(device: str, scratch: Path) -> list[Command]:
    """The most important first: what no time is left for is listed as not started."""

    def bench(name: str, seconds: float, *arguments: str) -> Command:
        folder = scratch / f"speed-{name.replace(' ', '-')}"
        return Command(name, python("benchmarks.ops", "--device", device, "--output", folder, *arguments), seconds)

    if device == "cpu":
        toy = ("--sizes", "32x8", "--dtype", "float32", "--against", "naive", "--repeats", "2", "--largest", "64")
        return [bench("siglip_loss", 60, "siglip_loss", *toy)]
    commands = [
        bench(op, 80, op, "--dtype", "bfloat16", "--sizes", f"32768x{dim},4096x{dim},512x{dim}")
        for op, dim in (("clip_loss", 512), ("siglip_loss", 512), ("nt_xent", 128))
    ]
    commands += [
        bench(f"{op} of {n}", 60, op, "--dtype", "bfloat16", "--sizes", n, "--against", "chunked")
        for op, n in (("clip_loss", "131072x512"), ("siglip_loss", "131072x512"), ("nt_xent", "131072x128"))
    ]
    return [
        *commands,
        bench("memory", 90, "ema_update_", "adamw_ema_step_", "masked_patch_loss", "restore_tokens", "random_masking"),
        bench("other losses", 90, "dino_loss", "prototype_distillation_loss", "linear_cross_entropy"),
        bench("TF32", 60, "clip_loss", "siglip_loss", "--dtype", "tf32", "--sizes", "32768x512"),
        bench("largest batch", 60, "clip_loss", "--dtype", "bfloat16", "--sizes", "4096x512", "--against", "naive",
              "--largest", str(1 << 21)),
    ]  # fmt: skip


def diagnosis(device: str, scratch: Path) -> list[Command]:
    """Each kernel's time; and what the hardware counted, where Nsight Compute is allowed to read it."""
    kernels = _KERNELS if device == "cuda" else (("siglip_loss", "32x8"),)
    commands = []
    for op, size in kernels:
        profile = python("benchmarks.gpu.profile", op, size, "bfloat16", "--device", device)
        commands.append(Command(f"profile {op}", (*profile, "--results", str(scratch / f"profile-{op}")), 60))
        sections = [x for name in ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats")
                    for x in ("--section", name)]  # fmt: skip
        ncu = ("ncu", "--csv", "--page", "details", "--print-details", "all", "--clock-control", "none",
               "--profile-from-start", "off")  # fmt: skip
        commands.append(Command(f"ncu {op}", (*ncu, *sections, *profile, "--bare"), 120))
    return commands


STAGES: dict[str, Callable[[str, Path], list[Command]]] = {
    stage.__name__: stage for stage in (environment, correctness, sanitizer, speed, diagnosis)
}


def results_in(scratch: Path) -> list[dict[str, Any]]:
    """What the commands have written: lines of JSON, the last of them perhaps cut off, and tables."""
    found = []
    for path in sorted(scratch.rglob("*")):
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                found += ({"kind": "speed", **row} for row in csv.DictReader(file))
        elif path.is_file() and not path.suffix:
            found += _lines(path.read_text().splitlines())
    return found


def _lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
