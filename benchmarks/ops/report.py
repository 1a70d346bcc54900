"""How measurements are shown: tables for the terminal and for a README, a CSV, a plot."""

from __future__ import annotations

import csv
import dataclasses
import math
import textwrap
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.ops.machine import Rates
from benchmarks.ops.measure import Measurement
from fastssl._meter import format_bytes, format_seconds

_QUIET = 0.1  # cores; the system's own housekeeping
_MODES = {
    "float32": "float32 products for all",
    "tf32": "TF32 products for all",
    "medium": "fastssl under set_float32_matmul_precision('medium'), baselines under 'highest' unless named",
    "bfloat16": "bfloat16 inputs for all",
}
Grid = tuple[list[str], list[list[str]]]


def preamble(
    op: str, timed: str, machine: dict[str, str | int | float], rates: Rates, results: list[Measurement], command: str
) -> list[str]:
    """What one must know to read the tables: the machine, its rates, how figures were taken, how to repeat them."""
    gpu = "{gpu} (sm {compute_capability}, driver {driver}, CUDA {cuda}, Triton {triton}), "
    cpu = "{cpu} ({instruction_sets}), {cores} cores, {threads} threads, PyTorch {torch}; "
    lines = [
        ((gpu if "gpu" in machine else "") + cpu).format(**machine)
        + f"fastssl {machine['fastssl']}, {op} {machine['kernels']}.",
        f"{timed[0].upper()}{timed[1:]}: medians of interleaved repeats in one process, on the same "
        "inputs; a ratio is the baseline's time, in brackets, over fastssl's.",
        " ".join(f"{mode}: {_MODES[mode]}." for mode in dict.fromkeys(r.mode for r in results)),
        "Floor: the products at the machine's best measured rate, plus the traffic at its copy bandwidth; exponentials "
        f"count nothing. Copy {rates.copy / 1e9:.0f} GB/s; "
        + "; ".join(f"{name} products {rate / 1e9:.0f} GFLOP/s ({how})" for name, (rate, how) in rates.product.items())
        + ".",
        f"Repeat it with: {command}",
    ]
    disturbed = [r.other_processes_cores for r in (rates, *results) if r.other_processes_cores > _QUIET]
    if disturbed:
        warning = f"WARNING: other processes used up to {max(disturbed):.1f} cores meanwhile: do not use these times."
        lines.insert(1, warning)
    return lines


def times(results: list[Measurement]) -> Grid:
    """One row per precision and size: fastssl's time, each baseline's ratio and time, floor, error."""
    timed = [r for r in results if not r.largest and (r.repeats or not math.isnan(r.floor))]
    names = _contestants(timed)
    rows = []
    for (mode, size), case in _cases(timed).items():
        ours = case["fastssl"]
        errors = (f"{case[n].error:.0e}" for n in ("fastssl", "naive") if n in case)
        rows.append(
            [mode, size, ours.note if math.isnan(ours.median) else format_seconds(ours.median), _quartiles(ours)]
            + [_against(case.get(name), ours) for name in names[1:]]
            + ["-" if math.isnan(ours.median) else f"{ours.floor_fraction:.0%}", " / ".join(errors)]
        )
    columns = [f"against {name}" for name in names[1:]]
    header = ["precision", "size", "fastssl", "quartiles", *columns]
    return [*header, "floor / time", "error (naive's)"], rows


def memory(results: list[Measurement]) -> Grid:
    """One row per precision and size whose memory was measured."""
    names, rows = _contestants(results), []
    for (mode, size), case in _cases([r for r in results if not r.largest]).items():
        if any(not math.isnan(r.extra_memory) for r in case.values()):
            rows.append([mode, size] + [_bytes(case.get(name)) for name in names])
    return ["precision", "size", *names], rows


def largest(results: list[Measurement]) -> Grid:
    """One row per precision and size of features: the largest batch of each contestant, and what ended the search."""
    searched = [r for r in results if r.largest]
    names, rows = _contestants(searched), {}
    for r in searched:
        rows.setdefault((r.mode, r.size.partition("x")[2]), {})[r.contestant] = f"{r.largest} ({r.note})"
    return ["precision", "n x", *names], [[*key, *(row.get(name, "") for name in names)] for key, row in rows.items()]


def show(console: Console, title: str, grid: Grid) -> None:
    header, rows = grid
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(title: str, grid: Grid) -> str:
    header, rows = grid
    lines = [header, ["---"] * len(header), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_csv(path: Path, results: list[Measurement], machine: dict[str, str | int | float], rates: Rates) -> None:
    """Every measurement, with the machine and its rates in every row."""
    common = dict(machine)
    for name, (rate, how) in rates.product.items():
        common |= {f"{name}_flops_per_second": rate, f"{name}_measured_by": how}
    common["copy_bytes_per_second"] = rates.copy
    rows = [{**dataclasses.asdict(r), "floor_fraction": r.floor_fraction, **common} for r in results]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, results: list[Measurement], title: str, timed: str) -> None:
    """Time, and below it peak extra memory, over the first dimension of the size; one column for each of the rest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[tuple[str, str], dict[str, list[tuple[int, Measurement]]]] = {}
    for r in (r for r in results if not r.largest):
        rows, _, rest = r.size.partition("x")
        curves.setdefault((r.mode, rest), {}).setdefault(r.contestant, []).append((int(rows), r))
    longest = max(len(points) for panel in curves.values() for points in panel.values())
    curves = {
        key: panel for key, panel in curves.items() if longest == 1 or max(map(len, panel.values())) > 1
    }  # a lone point is no curve
    colors = {name: f"C{i}" for i, name in enumerate(_contestants(results))}
    with_memory = any(r.extra_memory > 0 for r in results)
    shape = {"nrows": 1 + with_memory, "ncols": len(curves), "figsize": (4.6 * len(curves), 4.2 + 3.4 * with_memory)}
    figure, axes = pyplot.subplots(**shape, sharex="col", sharey="row", squeeze=False)
    for column, ((mode, rest), panel) in zip(axes.T, curves.items(), strict=True):
        for name, points in panel.items():
            x, y = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            style = {"marker": "o", "markersize": 4, "label": name, "linewidth": 2.5 if name == "fastssl" else 1.3}
            style["color"] = colors[name]
            column[0].plot(x, [1e3 * r.median for r in y], **style)
            low, high = [1e3 * r.quartile1 for r in y], [1e3 * r.quartile3 for r in y]
            column[0].fill_between(x, low, high, color=colors[name], alpha=0.25)
            if name == "fastssl":
                column[0].plot(x, [1e3 * r.floor for r in y], "k:", label="floor")
            if with_memory:
                column[1].plot(x, [r.extra_memory / 2**20 for r in y], **style)
        column[0].set_title(mode + (f", n x {rest}" if rest else ""))
        column[0].legend(fontsize=8)
        for axis in column:
            axis.set(xscale="log", yscale="log", xlabel="n")
            axis.grid(True, which="major", alpha=0.4)
    for axis, label in zip(axes[:, 0], (f"{timed.partition(',')[0]} [ms]", "peak extra memory [MiB]")):  # noqa: B905
        axis.set_ylabel(label)
    figure.suptitle(textwrap.fill(title, 65 * len(curves)), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _contestants(results: list[Measurement]) -> list[str]:
    return list(dict.fromkeys(["fastssl", *(r.contestant for r in results)]))


def _cases(results: list[Measurement]) -> dict[tuple[str, str], dict[str, Measurement]]:
    cases: dict[tuple[str, str], dict[str, Measurement]] = {}
    for r in results:
        cases.setdefault((r.mode, r.size), {})[r.contestant] = r
    return cases


def _against(baseline: Measurement | None, ours: Measurement) -> str:
    if baseline is None:
        return ""
    if math.isnan(baseline.median) or math.isnan(ours.median):
        return baseline.note or format_seconds(baseline.median)
    return f"{baseline.median / ours.median:.3g}x ({format_seconds(baseline.median)})"


def _quartiles(r: Measurement) -> str:
    return "" if math.isnan(r.median) else f"{format_seconds(r.quartile1)} - {format_seconds(r.quartile3)}"


def _bytes(r: Measurement | None) -> str:
    if r is None or math.isnan(r.extra_memory):
        return r.note if r else ""
    return format_bytes(r.extra_memory)
