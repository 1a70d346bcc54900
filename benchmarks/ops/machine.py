"""The machine: its name, and the rates that the floor is computed from."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True)
class Rates:
    """The machine's best rates: `product` by dtype, with the call that reached it, and `copy`, in FLOP/s and bytes/s.

    Other processes that kept cores busy meanwhile make them too low, and so the floor too high.
    """

    product: dict[torch.dtype, tuple[float, str]]
    copy: float
    other_processes_cores: float = 0.0


def describe() -> dict[str, str | int | float]:
    """CPU, instruction sets, cores, threads, versions and date."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instruction_sets": " ".join(name for name in _INSTRUCTION_SETS if name in flags),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


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


def measure_rates() -> Rates:
    """The best of several repeats, with all of PyTorch's threads.

    A product's rate is the best of torch.mm and of convolutions, which oneDNN computes as products: on some CPUs
    torch.mm's float32 library is slower than that by half. A product of bfloat16 numbers can be computed in float32, so
    its rate is at least that of float32.
    """
    product: dict[torch.dtype, tuple[float, str]] = {}
    with OtherProcesses() as others:
        for dtype in (torch.float32, torch.bfloat16):
            found = [(flops / _best_seconds(run), how) for how, flops, run in _products(dtype)]
            product[dtype] = max(found + list(product.values()))
        source = torch.ones(1 << 26)
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))
    return Rates(product, copy, others.cores)


def _products(dtype: torch.dtype) -> list[tuple[str, float, Callable[[], Tensor]]]:
    """(name, floating-point operations, call) of products large enough to run at full speed."""
    size, channels, side = 2048, 256, 64
    name = str(dtype).removeprefix("torch.")
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    runs = [(f"torch.mm {size}x{size}x{size} {name}", 2.0 * size**3, lambda: torch.mm(a, b, out=out))]
    for kernel in (1, 3):
        image = torch.randn(1, channels, side, side).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, kernel, kernel).to(dtype, memory_format=torch.channels_last)
        flops = 2.0 * (channels * kernel * (side - kernel + 1)) ** 2
        convolve = functools.partial(F.conv2d, image, weight)
        runs.append((f"{kernel}x{kernel} convolution of {channels} channels {name}", flops, convolve))
    return runs


def _best_seconds(run: Callable[[], object], budget: float = 0.5) -> float:
    run()
    best, stop = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
