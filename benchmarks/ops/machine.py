"""The machine: its name, its clock, and the rates that the floor is computed from."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Rates:
    """The best rates: `product` by precision, with the call that reached it, and `copy`, in FLOP/s and bytes/s.

    Other processes that kept cores busy meanwhile make them too low, and so the floor too high.
    """

    product: dict[str, tuple[float, str]]
    copy: float
    other_processes_cores: float = 0.0


def require(device: str) -> None:
    """Ends this process, with a message, where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device must be cpu where PyTorch finds no GPU, got cuda")


def describe(device: str = "cpu") -> dict[str, str | int | float]:
    """CPU, instruction sets, cores, threads, versions and date; the GPU, if that is the device."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return (_describe_gpu() if device == "cuda" else {}) | {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instruction_sets": " ".join(name for name in _INSTRUCTION_SETS if name in flags),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _describe_gpu() -> dict[str, str | int | float]:
    properties = torch.cuda.get_device_properties()
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "l2_cache": l2_cache("cuda"),
        "driver": driver,
        "cuda": torch.version.cuda or "",
        "triton": __import__("triton").__version__ if find_spec("triton") else "",
    }


def l2_cache(device: str) -> int:
    """Bytes of a GPU's second-level cache; 0 for a CPU, whose caches are left to do their work."""
    return torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 0


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call: wall time on the CPU; on a GPU that was idle, from events, with the time that its launches take."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


class OtherProcesses:
    """Measures, over a `with` block, the cores that processes other than this one kept busy, from Linux's count."""

    cores = float("nan")

    def __enter__(self) -> OtherProcesses:
        self._start = self._count()
        return self

    def __exit__(self, *_: object) -> None:
        if self._start is not None:
            clock, busy, own = (b - a for a, b in zip(self._start, self._count(), strict=True))
            self.cores = max(0.0, busy - own) / clock

    @staticmethod
    def _count() -> tuple[float, float, float] | None:
        if not Path("/proc/stat").exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()


def measure_rates(device: str = "cpu", small: bool = False) -> Rates:
    """The best of several repeats; on a CPU with all of PyTorch's threads. `small` ones only show that it can be done.

    A product's rate on a CPU is the best of torch.mm and of convolutions, which oneDNN computes as products: on some
    CPUs torch.mm's float32 library is slower than that by half. A product of bfloat16 numbers can be computed in a
    wider format, so its rate is at least that of the wider one.
    """
    product: dict[str, tuple[float, str]] = {}
    products = _products_on_cpu if device == "cpu" else _products_on_gpu
    before = torch.get_float32_matmul_precision()
    with OtherProcesses() as others:
        for name in ("float32", "tf32", "bfloat16"):
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            found = [(flops / _best_seconds(run, device, small), how) for how, flops, run in products(name, small)]
            product[name] = max(found + list(product.values()))
        source = torch.ones(1 << (18 if small else 26 if device == "cpu" else 28), device=device)
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, small)
    torch.set_float32_matmul_precision(before)
    return Rates(product, copy, others.cores)


Runs = list[tuple[str, float, Callable[[], Tensor]]]  # name, floating-point operations, call


def _products_on_cpu(precision: str, small: bool) -> Runs:
    """Products large enough to run at full speed."""
    size, channels, side = (64, 8, 8) if small else (2048, 256, 64)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    runs = [(f"torch.mm {size}x{size}x{size} {precision}", 2.0 * size**3, lambda: torch.mm(a, b, out=out))]
    for kernel in (1, 3):
        image = torch.randn(1, channels, side, side).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, kernel, kernel).to(dtype, memory_format=torch.channels_last)
        flops = 2.0 * (channels * kernel * (side - kernel + 1)) ** 2
        convolve = functools.partial(F.conv2d, image, weight)
        runs.append((f"{kernel}x{kernel} convolution of {channels} channels {precision}", flops, convolve))
    return runs


def _products_on_gpu(precision: str, small: bool) -> Runs:
    """Of random numbers: zeros cost less power, and so run faster."""
    dtype, runs = torch.bfloat16 if precision == "bfloat16" else torch.float32, []
    for size in (64,) if small else (4096, 8192):
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        name = f"torch.mm {size}x{size}x{size} {precision}"
        runs.append((name, 2.0 * size**3, functools.partial(torch.mm, a, b, out=torch.empty_like(a))))
    return runs


def _best_seconds(run: Callable[[], object], device: str, small: bool = False) -> float:
    run()
    best, stop = float("inf"), time.perf_counter() + (0.01 if small else 0.5)
    while time.perf_counter() < stop:
        best = min(best, seconds(run, device))
    return best
