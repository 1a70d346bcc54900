"""Draws the figures of docs/performance.md from the CSVs that `python -m benchmarks.ops` has written.

    python -m benchmarks.ops.figures --measure

measures anew, first, on a machine that nothing else uses: times that were taken beside busy processes are left out.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ops import __main__ as runner
from benchmarks.ops.measure import Measurement
from fastssl._meter import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AxesOf = Callable[[int, float, float], "Sequence[Axes]"]  # so many, in a figure of this width and height

ROOT = Path(__file__).parents[2]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures" / "performance"
CURVES = "nt_xent", "clip_loss", "siglip_loss"
MODE = "float32"
BUSY = 0.5  # cores that other processes may use while times are taken
RUNS = (
    "nt_xent clip_loss siglip_loss --sizes 64,256,1024,2048,8192",
    "sup_con dcl uniformity koleo --sizes 4096",
    "barlow_twins vicreg --sizes 256x8192",
    "dino_loss --sizes 10x2x8",
    "sinkhorn_center --sizes 1024",
    "linear_cross_entropy --sizes 512",
    "random_masking restore_tokens masked_patch_loss patch_embed --sizes 64",
    "ema_update_ adamw_ema_step_",
)
AGAINST = "naive,lightly,open_clip,metric_learning,pytorch,foreach,fused"
# The colours of docs/pictures, and what each stands for there.
COLORS = {"fastssl": "#0072B2", "naive": "#D55E00", "metric_learning": "#CC79A7"}
PEER = "#009E73"
NAMES = {"naive": "eager", "metric_learning": "pytorch-metric-learning"}


@dataclasses.dataclass(frozen=True)
class Results:
    """Measurements of one machine, without times that were taken beside busy processes."""

    measurements: list[Measurement]
    machine: str

    def cases(self) -> dict[tuple[str, str], dict[str, Measurement]]:
        """By operation and size, then by contestant."""
        found: dict[tuple[str, str], dict[str, Measurement]] = {}
        for one in self.measurements:
            found.setdefault((one.op, one.size), {})[one.contestant] = one
        return found


def read(folder: Path) -> Results:
    rows = [row for path in sorted(folder.glob("*.csv")) for row in csv.DictReader(path.open(newline=""))]
    rows = [row for row in rows if row["mode"] == MODE]
    if not rows:
        sys.exit(f"{folder} must have a CSV with measurements in {MODE}, got none")
    machines = {"{cpu}, {threads} threads, PyTorch {torch}, fastssl {fastssl}".format(**row) for row in rows}
    if len(machines) > 1:
        sys.exit(f"{folder} must have measurements of one machine, got {'; '.join(sorted(machines))}")
    kinds = {"op": str, "size": str, "mode": str, "contestant": str, "note": str, "repeats": int, "largest": int}
    fields = Measurement.__dataclass_fields__
    measurements = [Measurement(**{name: kinds.get(name, float)(row[name]) for name in fields}) for row in rows]
    (machine,) = machines
    return Results([_timed_in_quiet(one) for one in measurements], machine)


def _timed_in_quiet(one: Measurement) -> Measurement:
    """Memory is what it is, whatever else runs."""
    if not one.other_processes_cores > BUSY:
        return one
    return dataclasses.replace(one, median=math.nan, quartile1=math.nan, quartile3=math.nan, floor=math.nan)


def ratios(results: Results, axes_of: AxesOf) -> None:
    """How many times as long the others take, of each operation at the size that takes eager code longest."""
    largest = _largest(results, lambda one: one.median)
    axis = _bars(axes_of, largest, [f": {format_seconds(ours.median)}" for ours, _, _ in largest])
    for y, (ours, naive, others) in enumerate(largest):
        ratio = naive.median / ours.median
        share = "" if math.isnan(ours.floor_fraction) else f"; fastssl at {ours.floor_fraction:.0%} of the floor"
        axis.barh(y, ratio, height=0.62, color=COLORS["naive"], alpha=0.85, label=NAMES["naive"] if y == 0 else None)
        for one in others:
            axis.plot(one.median / ours.median, y, "D", markersize=5, color=PEER, markeredgecolor="white")
        right = max(one.median / ours.median for one in (naive, *others))
        axis.text(1.12 * right, y, f"eager {ratio:.1f}x{share}", va="center", fontsize=7)
    _say_if_nothing(axis, largest)
    axis.plot([], [], "D", markersize=5, color=PEER, label="another library")
    axis.axvline(1, color=COLORS["fastssl"], linewidth=2, label="fastssl")
    slower = [one.median / ours.median for ours, naive, others in largest for one in (naive, *others)]
    axis.set(xscale="log", xlabel="time over fastssl's", xlim=(0.5, 22 * max(slower, default=10.0)))
    axis.set_xticks([1, 3, 10, 30, 100], ["1x", "3x", "10x", "30x", "100x"])
    axis.minorticks_off()
    _legend_above(axis)


def memory(results: Results, axes_of: AxesOf) -> None:
    """Peak extra memory, results included, of each operation at the size at which eager code needs most."""
    largest = _largest(results, lambda one: one.extra_memory)
    axis = _bars(axes_of, largest, [""] * len(largest))
    for y, (ours, naive, others) in enumerate(largest):
        for one, name, up in ((ours, "fastssl", 0.17), (naive, "naive", -0.17)):
            label = NAMES.get(name, name) if y == 0 else None
            axis.barh(y + up, one.extra_memory, height=0.34, color=COLORS[name], alpha=0.85, label=label)
        right = max(one.extra_memory for one in (naive, *others))
        for one, of_whom, x, up in ((ours, "", ours.extra_memory, 0.17), (naive, "eager ", right, -0.17)):
            axis.text(1.12 * x, y + up, of_whom + format_bytes(one.extra_memory), va="center", fontsize=7)
        for one in others:
            axis.plot(one.extra_memory, y, "D", markersize=5, color=PEER, markeredgecolor="white")
    axis.plot([], [], "D", markersize=5, color=PEER, label="another library")
    most = max((one.extra_memory for case in largest for one in case[:2]), default=1.0)
    axis.set(xscale="log", xlabel="peak extra memory, results included", xlim=(2.0**20, 8 * most))
    axis.set_xticks([2.0**i for i in (20, 25, 30)], ["1 MiB", "32 MiB", "1 GiB"])
    axis.minorticks_off()
    _legend_above(axis)


Case = tuple[Measurement, Measurement, list[Measurement]]  # of fastssl, eager code, others


def _largest(results: Results, value: Callable[[Measurement], float]) -> list[Case]:
    """Of each operation the size at which eager code's value is the largest, from the last name to the first."""
    found: dict[str, Case] = {}
    for (op, _), case in results.cases().items():
        ours, naive = case["fastssl"], case.get("naive")
        if naive is None or math.isnan(value(naive) / value(ours)):
            continue
        if op not in found or value(naive) > value(found[op][1]):
            others = [
                one for name, one in case.items() if name not in ("fastssl", "naive") and not math.isnan(value(one))
            ]
            found[op] = ours, naive, others
    return [found[op] for op in sorted(found, reverse=True)]


def _bars(axes_of: AxesOf, cases: list[Case], notes: list[str]) -> Axes:
    (axis,) = axes_of(1, 8.5, 1.3 + 0.38 * len(cases))
    sizes = (" x ".join(ours.size.split("x")) for ours, *_ in cases)
    labels = [f"{case[0].op}\n{size}{note}" for case, size, note in zip(cases, sizes, notes, strict=True)]
    axis.set_yticks(range(len(cases)), labels, fontsize=7)
    return axis


def _legend_above(axis: Axes) -> None:
    axis.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def _say_if_nothing(axis: Axes, drawn: Sequence) -> None:
    if not drawn:
        text = "not measured yet while\nnothing else ran"
        axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=9, color=COLORS["naive"])


def time(results: Results, axes_of: AxesOf) -> None:
    """Over the rows, with the floor."""
    for axis, op in zip(axes_of(len(CURVES), 3.6 * len(CURVES), 3.6), CURVES, strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for one in results.measurements:
            if one.op == op:
                rows = int(one.size.partition("x")[0])
                curves.setdefault(one.contestant, []).append((rows, 1e3 * one.median))
                if one.contestant == "fastssl":
                    curves.setdefault("floor", []).append((rows, 1e3 * one.floor))
        for name, points in curves.items():
            if known := sorted(point for point in points if not math.isnan(point[1])):
                style = {"marker": "o", "markersize": 3, "color": COLORS.get(name, PEER)}
                if name == "floor":
                    style = {"color": "black", "linestyle": ":"}
                width = 2.5 if name == "fastssl" else 1.3
                axis.plot(*zip(*known, strict=True), label=NAMES.get(name, name), linewidth=width, **style)
        _say_if_nothing(axis, axis.lines)
        features = next(one.size.partition("x")[2] for one in results.measurements if one.op == op)
        axis.set(xscale="log", yscale="log", xlabel="rows", title=f"{op}, {features} features")
        if axis.lines:
            axis.grid(alpha=0.4)
            axis.legend(fontsize=8, frameon=False)
        else:
            axis.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)
        if op == CURVES[0]:
            axis.set_ylabel("milliseconds")


def measure(folder: Path) -> None:
    for path in folder.glob("*.csv"):
        path.unlink()
    for run in RUNS:
        how = ["--dtype", MODE, "--against", AGAINST, "--repeats", "5", "--output", os.path.relpath(folder)]
        if runner.main([*run.split(), *how]):
            sys.exit(f"{run}: a result is wrong")
    for path in folder.glob("*.png"):
        path.unlink()


def draw_all(results: Path, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = read(results)
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (ratios, time, memory):
        with matplotlib.rc_context({"svg.hashsalt": draw.__name__, "font.family": "DejaVu Sans"}):

            def axes_of(count: int, width: float, height: float):
                figure, axes = pyplot.subplots(1, count, figsize=(width, height), layout="constrained", squeeze=False)
                figure.suptitle(f"{MODE}; {found.machine}", fontsize=8, color="#444444")
                return axes[0]

            draw(found, axes_of)
            pyplot.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None}, bbox_inches="tight")
            pyplot.close()
    print(f"Written: {', '.join(str(path) for path in sorted(folder.glob('*.svg')))}")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="anew, some minutes; else draw what is there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = _arguments(argv)
    if arguments.measure:
        measure(arguments.results)
    draw_all(arguments.results, arguments.figures)


if __name__ == "__main__":
    main(sys.argv[1:])
