"""What is run, stage by stage: on a GPU, and on a CPU at toy sizes, so that none of it is new on the day."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import counters
from benchmarks.gpu.commands import ROOT, Command, python

SECONDS = 530.0  # of a stage: a command on a lent machine may have ten minutes
_PYTEST = "-v", "-p", "no:cacheprovider", "--no-header"
_WORKERS = min(12, os.cpu_count() or 1)  # that share the GPU, and the cores, for most of their time goes to compiling
_CALLS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "OMP_NUM_THREADS": str((os.cpu_count() or 1) // _WORKERS),
    "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),  # no configuration that was timed on a shared GPU for `speed`
}
_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables",
             "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")  # fmt: skip
_KERNELS = ("clip_loss", "32768x512"), ("siglip_loss", "32768x512"), ("nt_xent", "32768x128")


def build(device: str) -> list[Command]:
    """The extension for this machine's own GPU, unless it is there: what is compiled once is kept."""
    return [Command("build", python("benchmarks.gpu.build", "--device", device), 420)]


def environment(device: str, scratch: Path) -> list[Command]:
    tools = ("nvidia-smi",), ("nvcc", "--version"), ("ncu", "--version"), ("compute-sanitizer", "--version")
    return [
        Command("fastssl", python("fastssl"), 60),
        _rates(device, scratch),
        *(Command(tool[0], tool, 20) for tool in tools),
    ]


def _rates(device: str, scratch: Path) -> Command:
    return Command("rates", python("benchmarks.gpu.rates", "--device", device, "--results", scratch / "rates"), 90)


def correctness(device: str, scratch: Path) -> list[Command]:
    """One call of every operation against float64, each survivor of those before it; then the tests, which say by the
    line how they end: many of them will not, in time. Those of the Triton kernels run here, and not in processes of
    tests/gpu/test_triton.py, whose output would be lost at the limit; after 20 failures they stop, and say why."""
    smoke = python("benchmarks.gpu.smoke", "--device", device, "--results", scratch / "smoke", "--workers", _WORKERS)
    commands = [Command("smoke", smoke, 160, _CALLS)]
    if device == "cpu":
        few = python("pytest", *_PYTEST, "tests/ops/test_uniformity.py", "--collect-only")
        return [*commands, Command("tests", few, 60)]
    parallel = ("-n", _WORKERS) if find_spec("xdist") else ()
    checks = ROOT / "tests/gpu/triton_checks"
    families = [file.relative_to(ROOT) for file in sorted(checks.rglob("[!_]*.py")) if file.parent.name != "common"]
    kernels = "tests/gpu/test_cuda.py", "-k", "on_the_gpu"
    rest = "tests/train/test_device.py", "tests/test_optim.py", "tests/nn", "tests/ops"
    telling = "test_value_and_gradients or test_same_bits or test_misaligned or test_strided or test_nan_and_inf"

    def tests(name: str, seconds: float, *arguments: object, **environment: str) -> Command:
        some = python("pytest", *_PYTEST, *parallel, "--maxfail", 20, *arguments)
        return Command(f"tests of {name}", some, seconds, _CALLS | environment)

    return [
        *commands,
        tests("the Triton kernels", 130, *families, TRITON_INTERPRET="0"),
        tests("the CUDA kernels", 50, *kernels),
        tests("every operation", 110, "tests/ops/test_ops.py", "-m", "gpu", "-k", telling),
        tests("the rest", 80, *rest, "-m", "gpu", "-k", f"not ({telling})"),
    ]


def sanitizer(device: str, scratch: Path) -> list[Command]:
    """Accesses outside of arrays, and races in shared memory, of one tiny call of every operation. PyTorch keeps no
    memory, between whose parts nothing would be outside; the tool waits for GPU code as long as its first call takes.
    """
    smoke = python("benchmarks.gpu.smoke", "--device", device, "--tiny", "--seconds", 200, "--workers", _WORKERS)
    tool = ("compute-sanitizer", "--target-processes", "all", "--launch-timeout", "0", "--error-exitcode", "9",
            "--print-limit", "20", "--tool")  # fmt: skip
    return [
        Command(name, (*tool, name, *smoke, "--results", str(scratch / name)), 250,
                _CALLS | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        for name in ("memcheck", "racecheck")
    ]  # fmt: skip


def speed(device: str, scratch: Path) -> list[Command]:
    """The most important first: what no time is left for is listed as not started."""

    def bench(name: str, seconds: float, *arguments: object) -> Command:
        files = "--rates", scratch / "rates", "--results", scratch / f"speed-{name.replace(' ', '-')}"
        return Command(name, python("benchmarks.gpu.speed", "--device", device, *files, *arguments), seconds)

    if device == "cpu":
        toy = ("--size", "32x8", "--dtype", "float32", "--against", "naive", "--repeats", 2, "--largest", 64)
        return [_rates(device, scratch), bench("siglip_loss", 60, "siglip_loss", *toy)]
    losses, half = {"clip_loss": 512, "siglip_loss": 512, "nt_xent": 128}, ("--dtype", "bfloat16")
    loop = "--against", "chunked", "--repeats", 20
    small = {op: ("--size", f"4096x{dim}", "--size", f"512x{dim}") for op, dim in losses.items()}
    return [
        _rates(device, scratch),
        *(bench(op, 110, op, *half, "--size", f"32768x{dim}", "--repeats", 40) for op, dim in losses.items()),
        *(bench(f"{op} of 131072", 80, op, *half, "--size", f"131072x{dim}", *loop) for op, dim in losses.items()),
        *(bench(f"small {op}", 70, op, *half, *sizes, "--against", "naive", *loop) for op, sizes in small.items()),
        bench("TF32", 60, "clip_loss", "siglip_loss", "--dtype", "tf32", "--size", "32768x512", *loop),
        bench("memory", 90, "ema_update_", "adamw_ema_step_", "masked_patch_loss", "restore_tokens", "random_masking"),
        bench("other losses", 90, "dino_loss", "prototype_distillation_loss", "linear_cross_entropy"),
        bench("largest batch", 100, "clip_loss", *half, "--size", "4096x512", "--against", "naive", "--repeats", 2,
              "--largest", 1 << 20),
    ]  # fmt: skip


def diagnosis(device: str, scratch: Path) -> list[Command]:
    """Each kernel's time; and what the hardware counted, where Nsight Compute is allowed to read it: what the report
    has, then all that tells why, which is in the log alone."""
    kernels = _KERNELS if device == "cuda" else (("siglip_loss", "32x8"),)
    ncu = ("ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off")
    metrics = "--metrics", ",".join(counters.METRICS)
    sections = ("--page", "details", "--print-details", "all", "--print-metric-name", "name", "--launch-count", "24",
                *(x for name in _SECTIONS for x in ("--section", name)))  # fmt: skip
    steps = {op: python("benchmarks.gpu.profile", op, size, "bfloat16", "--device", device) for op, size in kernels}
    return [
        *(Command(f"profile {op}", (*step, "--results", str(scratch / f"profile-{op}")), 60)
          for op, step in steps.items()),
        *(Command(f"count {op}", (*ncu, *metrics, *steps[op], "--bare"), 90, copy=scratch / f"{op} {size}.ncu")
          for op, size in kernels),
        *(Command(f"explain {op}", (*ncu, *sections, *step, "--bare"), 90) for op, step in steps.items()),
    ]  # fmt: skip


STAGES: dict[str, Callable[[str, Path], list[Command]]] = {
    stage.__name__: stage for stage in (environment, correctness, sanitizer, speed, diagnosis)
}


def results_in(scratch: Path) -> list[dict[str, Any]]:
    """What the commands have written: lines of JSON, the last of them perhaps cut off, and Nsight Compute's tables."""
    found = []
    for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
        lines = path.read_text().splitlines()
        if path.suffix == ".ncu":
            op, size = path.stem.split()
            found += ({"kind": "counter", "op": op, "size": size, **kernel} for kernel in counters.read(lines))
        elif not path.suffix:
            found += _lines(lines)
    return found


def _lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
