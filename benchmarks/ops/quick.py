"""A minute of every operation against eager code: `python -m fastssl bench`. For figures to rely on: `python -m
benchmarks.ops`, which takes longer, measures more contestants, and memory."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.ops import machine, measure, registry
from benchmarks.ops.machine import OtherProcesses, Rates
from benchmarks.ops.measure import Measurement
from benchmarks.ops.registry import MODES, Benchmark, Size
from fastssl._meter import format_seconds

_NEEDS = 1 << 26  # bytes that eager code may take: what takes more takes its time, too
_REPEATS = 9


def size_of(benchmark: Benchmark, mode: str) -> Size:
    """The size of which eager code takes the most memory within bounds; where none does, that of which it takes
    least."""
    needs = {size: benchmark.needs(size, MODES[mode].dtype.itemsize)["naive"] for size in benchmark.sizes}
    return max(needs, key=lambda size: (needs[size] <= _NEEDS, needs[size] if needs[size] <= _NEEDS else -needs[size]))


def rows(names: Sequence[str], rates: Rates, console: Console) -> list[tuple[Measurement, Measurement]]:
    """Of each benchmark, fastssl's measurement and eager code's."""
    found = []
    for name, benchmark in registry.load(names).items():
        mode = benchmark.modes_on("cpu")[0]
        size = size_of(benchmark, mode)
        contestants = benchmark.contestants(size, mode, ("naive",))
        with console.status(f"{name} {'x'.join(map(str, size))}"):
            ours, naive, *_ = measure.measure(benchmark, size, mode, contestants, rates, _REPEATS)
        found.append((ours, naive))
    return found


def bench(names: Sequence[str], folder: Path, console: Console) -> bool:
    """Print the table, and draw it in `folder`. Returns whether all of fastssl's results were right."""
    with console.status("the machine's rates"), OtherProcesses() as others:
        rates = machine.measure_rates()
    found = rows(names, rates, console)
    table = Table("operation", "size", "fastssl", "eager", "ratio", "floor")
    for ours, naive in found:
        times = [r.note or format_seconds(r.median) for r in (ours, naive)]
        ratio, share = naive.median / ours.median, ours.floor_fraction
        known = [f"{ratio:.1f}x" if ratio == ratio else "-", f"{share:.0%}" if share == share else "-"]
        table.add_row(ours.op, ours.size, *times, *known)
    console.print(table)
    described = machine.describe()
    title = "{cpu}, {threads} threads, PyTorch {torch}".format(**described)
    console.print(
        f"{title}. Losses forward and backward, in float32; medians of {_REPEATS} calls, eager code's in between. The "
        f"floor is the share of fastssl's time that products at {rates.product['float32'][0] / 1e9:.0f} GFLOP/s and "
        f"traffic at {rates.copy / 1e9:.0f} GB/s must take.",
        highlight=False,
    )
    if (busy := max(others.cores, *(ours.other_processes_cores for ours, _ in found))) > 0.1:
        console.print(f"WARNING: other processes used up to {busy:.1f} cores meanwhile.", highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    _plot(folder / "bench.png", found, title)
    console.print(f"Written: {folder / 'bench.png'}", highlight=False, soft_wrap=True)
    return not any(ours.note for ours, _ in found)


def _plot(path: Path, found: list[tuple[Measurement, Measurement]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = {f"{ours.op} {ours.size}": naive.median / ours.median for ours, naive in reversed(found)}
    ratios = {label: ratio for label, ratio in ratios.items() if not math.isnan(ratio)}
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.24 * len(ratios)))
    bars = axis.barh(list(ratios), list(ratios.values()))
    axis.bar_label(bars, [f" {ratio:.1f}x" for ratio in ratios.values()], fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="eager PyTorch's time / fastssl's", xmargin=0.15)
    axis.tick_params(axis="y", labelsize=8)
    figure.suptitle(textwrap.fill(title, 90), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
