"""How a figure is taken: first the right answer, then interleaved times, then memory in a process of its own."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops import registry
from benchmarks.ops.machine import OtherProcesses, Rates, l2_cache
from benchmarks.ops.machine import seconds as seconds_of
from benchmarks.ops.registry import MODES, Benchmark, Contestant, Inputs, Size, tensors_of
from fastssl._meter import Meter, available_memory

_SECONDS_PER_CONTESTANT = 2.0
_REPEATS = (7, 500)
_REPEATS_OF_LONG_ROUNDS, _LONG = 3, 4.0  # seconds
_SAFE_SHARE = 0.5  # of the available memory, for baselines whose need is only estimated
_SMALLEST_MEMORY = 1 << 28  # below, a process's resident memory says too little
_LONGEST = 20.0  # seconds of a step, beyond which no larger batch is tried


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
    largest: int = 0  # the first number of the largest size that fits
    other_processes_cores: float = math.nan
    note: str = ""

    @property
    def error(self) -> float:
        """The larger of the errors of outputs and gradients; NaN if one is."""
        return max(self.value_error, self.gradient_error, key=lambda error: (math.isnan(error), error))

    @property
    def floor_fraction(self) -> float:
        return self.floor / self.median


def cases(
    benchmark: Benchmark,
    rates: Rates,
    device: str,
    *,
    modes: Sequence[str] | None,
    sizes: Sequence[Size] | None,
    against: tuple[str, ...],
    repeats: int | None,
    largest: int | None,
    status: Callable[[str], AbstractContextManager] = lambda case: nullcontext(),
) -> Iterator[Measurement]:
    """Yields the measurements of one operation case by case; sizes for memory alone only where no others are named."""
    default = benchmark.sizes[0]
    timed = [size + default[len(size) :] for size in sizes or benchmark.sizes_on(device)]
    untimed = () if sizes else benchmark.memory_sizes
    for mode in (m for m in modes or benchmark.modes_on(device) if m in benchmark.modes):
        for size in (*timed, *untimed):
            contestants = benchmark.contestants(size, mode, against)
            with status(f"{benchmark.name} {mode} {size}"):
                if size in timed:
                    results = measure(benchmark, size, mode, contestants, rates, repeats, device)
                else:
                    results = unmeasured(benchmark, size, mode, contestants, device)
                for result in results:
                    if worth_measuring_memory(benchmark, size, mode, device):
                        add_memory(result, size, device)
            yield from results
        if largest:
            for name in benchmark.contestants(timed[-1], mode, against):
                yield largest_batch(benchmark, timed[-1], mode, name, device, largest)


def measure(
    benchmark: Benchmark,
    size: Size,
    mode: str,
    contestants: dict[str, Contestant],
    rates: Rates,
    repeats: int | None = None,
    device: str = "cpu",
) -> list[Measurement]:
    """Check every contestant against the oracle and time those that are right.

    A contestant that fails, is wrong, or would not fit into memory has a note instead of a time. On a GPU a call takes
    the next of several copies of the inputs, so many that its cache no longer holds one when its turn comes again.
    """
    dtype = MODES[mode].dtype
    make = functools.partial(benchmark.inputs_on, device, size, dtype)
    inputs = make()
    copies = [inputs, *(make() for _ in range(_copies(inputs, l2_cache(device)) - 1))]
    expected = benchmark.expected(make())
    products = benchmark.products or MODES[mode].products
    floor = benchmark.floor(size, dtype.itemsize, rates.product[products][0], rates.copy)
    results = {r.contestant: r for r in unmeasured(benchmark, size, mode, contestants, device)}
    functions, steps = {}, {}
    for name, contestant in contestants.items():  # all of them before one runs: what is compiled is then forgotten
        result = results[name]
        result.floor = floor
        if not result.note:
            try:
                functions[name] = contestant.make()
            except Exception as error:
                result.note = _failure(error)
    for name, function in functions.items():
        result, contestant = results[name], contestants[name]
        torch.set_float32_matmul_precision(contestant.precision)
        try:
            found = benchmark.run(function, make())  # inputs of its own, which it may change
        except Exception as error:
            result.note = _failure(error)
            continue
        result.value_error, result.gradient_error = map(relative_error, found, expected)
        if contestant.compiled and torch._dynamo.utils.counters["stats"]["unique_graphs"] != 1:
            result.note = "failed: torch.compile ran eager code"
        elif not result.error <= MODES[mode].tolerance:
            result.note = f"wrong: error {result.value_error:.1e}, of gradients {result.gradient_error:.1e}"
        else:
            steps[name] = (contestant.precision, functools.partial(_step, benchmark, function, itertools.cycle(copies)))
    with OtherProcesses() as others:
        timed = interleaved_seconds(steps, repeats, device)
    for name, seconds in timed.items():
        result = results[name]
        result.repeats, result.other_processes_cores = len(seconds), others.cores
        result.quartile1, result.median, result.quartile3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return list(results.values())


def _copies(inputs: Inputs, cache: int) -> int:
    """How many sets of inputs are four times as large as the cache."""
    size = sum(x.nbytes for x in tensors_of(inputs))
    return max(1, min(1000, -(-4 * cache // max(size, 1))))


def _step(benchmark: Benchmark, function: registry.Function, inputs: Iterator[Inputs]) -> object:
    return benchmark.step(function, next(inputs))


def interleaved_seconds(
    steps: dict[str, tuple[str, Callable[[], object]]], repeats: int | None = None, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each step (float32 matmul precision, call), in rounds of one call each, in rotating order.

    Without `repeats` there are as many rounds as fit into 2 s per step, from 7 (3 if a round takes more than 4 s) to
    500. The setting of the precision and the calls for warming up, up to 3 within 2 s, are not timed, Python's garbage
    collector is off, and nothing may recompile.
    """
    names, seconds = list(steps), {name: [] for name in steps}

    def once(name: str) -> float:
        precision, step = steps[name]
        torch.set_float32_matmul_precision(precision)
        return seconds_of(step, device)

    def warmed_up(name: str) -> float:
        calls = [once(name)]
        while len(calls) < 3 and sum(calls) < _SECONDS_PER_CONTESTANT:
            calls.append(once(name))
        return statistics.median(calls)

    gc.collect()
    gc.disable()
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            warm = [warmed_up(name) for name in names]
            if repeats is None and warm:
                fewest, most = _REPEATS
                fewest = fewest if sum(warm) <= _LONG else _REPEATS_OF_LONG_ROUNDS
                repeats = min(most, max(fewest, int(len(warm) * _SECONDS_PER_CONTESTANT / sum(warm))))
            for turn in range(repeats or 0):
                for position in range(len(names)):
                    name = names[(turn + position) % len(names)]
                    seconds[name].append(once(name))
    finally:
        gc.enable()
    return seconds


def unmeasured(
    benchmark: Benchmark, size: Size, mode: str, contestants: dict[str, Contestant], device: str = "cpu"
) -> list[Measurement]:
    """A measurement still to be taken for each contestant; its note is set where the contestant would not fit."""
    label = "x".join(map(str, size))
    return [Measurement(benchmark.name, label, mode, n, note=_too_large(c, device)) for n, c in contestants.items()]


def add_memory(result: Measurement, size: Size, device: str = "cpu") -> None:
    """Measure the peak extra memory of a contestant that ran, or still may: on the CPU in a process of its own."""
    if result.note:
        return
    if device == "cuda":
        try:
            result.extra_memory = _memory_of(result.op, size, result.mode, result.contestant, device)
        except Exception as error:
            result.note = _failure(error)
    else:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                result.extra_memory = process.submit(
                    _memory_in_new_process, result.op, size, result.mode, result.contestant, kernel_of(result.op)
                ).result()
            except Exception as error:
                result.note = _failure(error)


def largest_batch(
    benchmark: Benchmark, size: Size, mode: str, name: str, device: str = "cpu", limit: int = 1 << 22
) -> Measurement:
    """The largest of `size` with its first number doubled again and again that a contestant takes a step of, in
    memory and within 20 s; its note says what ended the search."""
    (result,) = unmeasured(benchmark, size, mode, {name: benchmark.contestants(size, mode)[name]}, device)
    while not result.note and size[0] <= limit:
        contestant = benchmark.contestants(size, mode)[name]
        torch.set_float32_matmul_precision(contestant.precision)
        result.note = _too_large(contestant, device)
        if not result.note:
            try:
                step = functools.partial(
                    benchmark.step, contestant.make(), benchmark.inputs_on(device, size, MODES[mode].dtype)
                )
                seconds_of(step, device)  # compiles
                taken = seconds_of(step, device)
            except Exception as error:
                result.note = _failure(error)
            else:
                result.size, result.largest = "x".join(map(str, size)), size[0]
                result.note = f"takes {taken:.0f} s" if taken > _LONGEST else ""
                size = (2 * size[0], *size[1:])
    result.note = result.note or f"not tried beyond {limit}"
    return result


@functools.cache
def kernel_of(op: str, device: str = "cpu") -> str:
    """What computes fastssl's side on this machine's CPU or GPU."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel(f"fastssl::{registry.BENCHMARKS[op].kernel}", device.upper()):
        return "in portable PyTorch"
    if device == "cuda":
        return "in its CUDA kernels"
    from fastssl import _C

    return f"in C++ for {_C.current_isa()}"


def worth_measuring_memory(benchmark: Benchmark, size: Size, mode: str, device: str = "cpu") -> bool:
    """Whether the naive code needs enough memory for resident pages to tell it from noise; a GPU's allocator counts."""
    return device == "cuda" or benchmark.needs(size, MODES[mode].dtype.itemsize)["naive"] >= _SMALLEST_MEMORY


def _memory_in_new_process(op: str, size: Size, mode: str, name: str, kernel: str) -> float:
    registry.load()
    if kernel_of(op) != kernel:
        raise RuntimeError(f"{op} is {kernel_of(op)} in a new process, and {kernel} in this one")
    return _memory_of(op, size, mode, name)


def _memory_of(op: str, size: Size, mode: str, name: str, device: str = "cpu") -> float:
    """Libraries and threads are warmed up on the smallest size, compiled code on its own."""
    benchmark = registry.load()[op]
    contestant = benchmark.contestants(size, mode)[name]
    torch.set_float32_matmul_precision(contestant.precision)
    function, make = contestant.make(), functools.partial(benchmark.inputs_on, device, dtype=MODES[mode].dtype)
    benchmark.step(function, make(size if contestant.compiled else benchmark.sizes[0]))
    inputs = make(size)
    return extra_memory(lambda: benchmark.step(function, inputs), device)


def extra_memory(run: Callable[[], object], device: str = "cpu") -> float:
    """Bytes by which `run` raises the peak of what a GPU's allocator has given out, or of this process's resident
    memory, over what was there before; NaN where that cannot be measured."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    with Meter(memory=True) as meter:
        run()
    return math.nan if meter.extra is None else float(meter.extra)


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error (Frobenius norm) among pairs of tensors, 0 where there are none."""
    pairs = zip(found, expected, strict=True)
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _too_large(contestant: Contestant, device: str) -> str:
    if contestant.needs <= _free_memory(device):
        return ""
    return f"not run: needs about {contestant.needs / 2**30:.0f} GiB"


def _free_memory(device: str) -> float:
    """On a GPU, where too much raises an exception, all of it; on a CPU, where it kills the process, half."""
    if device == "cpu":
        return _SAFE_SHARE * available_memory()
    gc.collect()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
