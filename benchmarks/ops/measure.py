"""How a figure is taken: first the right answer, then interleaved times, then memory in a process of its own."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops import registry
from benchmarks.ops.machine import OtherProcesses, Rates
from benchmarks.ops.registry import MODES, Benchmark, Contestant, Size
from fastssl._meter import Meter, available_memory

_SECONDS_PER_CONTESTANT = 2.0
_REPEATS = (7, 500)
_SAFE_SHARE = 0.5  # of the available memory, for baselines whose need is only estimated
_SMALLEST_MEMORY = 1 << 28  # below, a process's resident memory says too little


@dataclass
class Measurement:
    """One contestant on one case. Seconds and bytes; NaN is what was not measured, and `note` says why."""

    op: str
    size: str
    mode: str
    contestant: str
    median: float = math.nan
    quartile1: float = math.nan
    quartile3: float = math.nan
    repeats: int = 0
    floor: float = math.nan
    value_error: float = math.nan
    gradient_error: float = math.nan
    extra_memory: float = math.nan
    other_processes_cores: float = math.nan
    note: str = ""

    @property
    def error(self) -> float:
        """The larger of the errors of outputs and gradients; NaN if one is."""
        return max(self.value_error, self.gradient_error, key=lambda error: (math.isnan(error), error))

    @property
    def floor_fraction(self) -> float:
        return self.floor / self.median


def measure(
    benchmark: Benchmark,
    size: Size,
    mode: str,
    contestants: dict[str, Contestant],
    rates: Rates,
    repeats: int | None = None,
) -> list[Measurement]:
    """Check every contestant against the oracle and time those that are right.

    A contestant that fails, is wrong, or would not fit into memory has a note instead of a time.
    """
    dtype = MODES[mode].dtype
    inputs = benchmark.inputs(size, dtype)
    expected = benchmark.expected(benchmark.inputs(size, dtype))
    products = benchmark.products or (torch.bfloat16 if mode == "medium" else dtype)
    floor = benchmark.floor(size, dtype.itemsize, rates.product[products][0], rates.copy)
    results, steps = {r.contestant: r for r in unmeasured(benchmark, size, mode, contestants)}, {}
    for name, contestant in contestants.items():
        result = results[name]
        result.floor = floor
        if result.note:
            continue
        torch.set_float32_matmul_precision(contestant.precision)
        try:
            function = contestant.make()
            found = benchmark.run(function, benchmark.inputs(size, dtype))  # inputs of its own, which it may change
        except Exception as error:
            result.note = _failure(error)
            continue
        result.value_error, result.gradient_error = map(relative_error, found, expected)
        if contestant.compiled and torch._dynamo.utils.counters["stats"]["unique_graphs"] != 1:
            result.note = "failed: torch.compile ran eager code"
        elif not result.error <= MODES[mode].tolerance:
            result.note = f"wrong: error {result.value_error:.1e}, of gradients {result.gradient_error:.1e}"
        else:
            steps[name] = (contestant.precision, functools.partial(benchmark.step, function, inputs))
    with OtherProcesses() as others:
        timed = interleaved_seconds(steps, repeats)
    for name, seconds in timed.items():
        result = results[name]
        result.repeats, result.other_processes_cores = len(seconds), others.cores
        result.quartile1, result.median, result.quartile3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return list(results.values())


def interleaved_seconds(
    steps: dict[str, tuple[str, Callable[[], object]]], repeats: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each step (float32 matmul precision, call), in rounds of one call each, in rotating order.

    Without `repeats` there are as many rounds as fit into 2 s per step, from 7 to 500. The warm-up round and
    the setting of the precision are not timed, Python's garbage collector is off, and nothing may recompile.
    """
    names, seconds = list(steps), {name: [] for name in steps}

    def once(name: str) -> float:
        precision, step = steps[name]
        torch.set_float32_matmul_precision(precision)
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    gc.collect()
    gc.disable()
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            warm = [sorted(once(name) for _ in range(3))[1] for name in names]
            if repeats is None and warm:
                fewest, most = _REPEATS
                repeats = min(most, max(fewest, int(len(warm) * _SECONDS_PER_CONTESTANT / sum(warm))))
            for turn in range(repeats or 0):
                for position in range(len(names)):
                    name = names[(turn + position) % len(names)]
                    seconds[name].append(once(name))
    finally:
        gc.enable()
    return seconds


def unmeasured(benchmark: Benchmark, size: Size, mode: str, contestants: dict[str, Contestant]) -> list[Measurement]:
    """A measurement still to be taken for each contestant; its note is set where the contestant would not fit."""
    label = "x".join(map(str, size))
    return [Measurement(benchmark.name, label, mode, n, note=_too_large(c)) for n, c in contestants.items()]


def add_memory(result: Measurement, size: Size) -> None:
    """Measure the peak extra memory of a contestant that ran, or still may, in a process of its own."""
    if not result.note:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                result.extra_memory = process.submit(
                    _memory_of, result.op, size, result.mode, result.contestant, kernel_of(result.op)
                ).result()
            except Exception as error:
                result.note = _failure(error)


@functools.cache
def kernel_of(op: str) -> str:
    """What computes fastssl's side on this machine's CPU."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastssl::{registry.BENCHMARKS[op].kernel}", "CPU"):
        return "in portable PyTorch"
    from fastssl import _C

    return f"in C++ for {_C.current_isa()}"


def worth_measuring_memory(benchmark: Benchmark, size: Size, mode: str) -> bool:
    """Whether the naive code needs enough memory for resident pages to tell it from noise."""
    return benchmark.needs(size, MODES[mode].dtype.itemsize)["naive"] >= _SMALLEST_MEMORY


def _memory_of(op: str, size: Size, mode: str, name: str, kernel: str) -> float:
    """Runs in the new process. Libraries and threads are warmed up on the smallest size, compiled code on its own."""
    benchmark = registry.load()[op]
    if kernel_of(op) != kernel:
        raise RuntimeError(f"{op} is {kernel_of(op)} in a new process, and {kernel} in this one")
    contestant = benchmark.contestants(size, mode)[name]
    torch.set_float32_matmul_precision(contestant.precision)
    function, dtype = contestant.make(), MODES[mode].dtype
    benchmark.step(function, benchmark.inputs(size if contestant.compiled else benchmark.sizes[0], dtype))
    inputs = benchmark.inputs(size, dtype)
    return extra_memory(lambda: benchmark.step(function, inputs))


def extra_memory(run: Callable[[], object]) -> float:
    """Bytes by which `run` raises this process's peak resident memory over what was resident before; NaN where that
    cannot be measured."""
    gc.collect()
    with Meter(memory=True) as meter:
        run()
    return math.nan if meter.extra is None else float(meter.extra)


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error (Frobenius norm) among pairs of tensors, 0 where there are none."""
    pairs = zip(found, expected, strict=True)
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _too_large(contestant: Contestant) -> str:
    if contestant.needs <= _SAFE_SHARE * available_memory():
        return ""
    return f"not run: needs about {contestant.needs / 2**30:.0f} GiB"


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
