"""The plots of twin runs, one file each, in colours that everyone can tell apart (Okabe and Ito's)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from benchmarks.twins.results import GIB, MIB, Result, Results

COLORS = {"naive": "#D55E00", "fastssl": "#0072B2", "random": "#777777", "supervised": "#009E73"}
MARKERS = {"random": "|", "supervised": "D", "naive": "s", "fastssl": "o"}
_HATCHES = {"loss": "", "masking": "///", "teacher and queue": "..."}


class Plot(NamedTuple):
    """A file, and what it shows."""

    path: Path
    title: str
    text: str


def draw(results: Results, folder: Path) -> list[Plot]:
    """The plots for which there are results."""
    plots = []

    def add(name: str, title: str, text: str, function: Callable[[Results], Figure], wanted: object) -> None:
        if wanted:
            plots.append(Plot(folder / f"twins_{name}.png", title, text))
            figure = function(results)
            figure.savefig(plots[-1].path, dpi=150, format="png")

    add(
        "curves",
        "Losses",
        "Both runs of each method, from the same weights, on the same batches: naive as the broad line, fastssl as the "
        "narrow one.",
        _curves,
        results.methods,
    )
    add(
        "steps",
        "Time of a training step",
        "Medians. What is pale is the encoder's, the same code in both; what is not is the loss, kernels for masked "
        "images, teacher and queue.",
        _steps,
        results.methods,
    )
    add(
        "accuracy",
        "What the features are worth",
        "Both runs beside random weights and, for images, the same encoder trained with labels for as many steps.",
        _accuracy,
        results.methods,
    )
    add(
        "sweep",
        "SimCLR over batch sizes",
        "Medians and peaks of whole training steps and of the loss in them. A larger batch is no claim of higher "
        "accuracy.",
        _sweep,
        results.sweep,
    )
    add(
        "memory",
        "Memory on growing batches",
        "Of each method's loss alone, forward and backward, in a process of its own; the dotted line is the budget. "
        "A line ends at the first batch that exceeds it, or at the largest that was tried.",
        _memory,
        results.methods,
    )
    return plots


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(11 if columns > 1 else 6, height * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    for panel in axes[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, axes[:count]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)


def _curves(results: Results) -> Figure:
    figure, axes = _grid(len(results.methods), 4, 2.1)
    for panel, result in zip(axes, results.methods, strict=True):
        panel.plot(result.losses["naive"], color=COLORS["naive"], linewidth=4, alpha=0.45, label="naive")
        panel.plot(result.losses["fastssl"], color=COLORS["fastssl"], linewidth=1, label="fastssl")
        panel.set_title(result.method, loc="left", fontsize=10)
        panel.tick_params(labelsize=8)
    axes[0].set(xlabel="step", ylabel="loss")
    _legend(figure, axes[0])
    return figure


def _steps(results: Results) -> Figure:
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(results.methods)), layout="constrained")
    axes = figure.subplots()
    for place, result in enumerate(results.methods):
        for shift, impl in ((-0.2, "fastssl"), (0.2, "naive")):
            total, left = 1e3 * result.timing[impl].step, 0.0
            first = place == 0
            for part, seconds in result.kernels(impl).items():
                style = {"color": COLORS[impl], "hatch": _HATCHES[part], "edgecolor": "white", "linewidth": 0}
                axes.barh(
                    place + shift, 1e3 * seconds, 0.36, left=left, label=f"{impl}: {part}" if first else None, **style
                )
                left += 1e3 * seconds
            rest = f"{impl}: the rest" if first else None
            axes.barh(place + shift, total - left, 0.36, left=left, color=COLORS[impl], alpha=0.3, label=rest)
    axes.set(xlabel="ms per step", yticks=range(len(results.methods)))
    axes.set_yticklabels([result.method for result in results.methods])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _accuracy(results: Results) -> Figure:
    tests: dict[str, list[Result]] = {}
    for result in results.methods:
        for test, shares in result.tests.items():
            if "fastssl" in shares:
                tests.setdefault(test, []).append(result)
    marks = {who: {"marker": marker, "linestyle": "", "markersize": 6} for who, marker in MARKERS.items()}
    marks["naive"] |= {"markerfacecolor": "none", "markersize": 9}  # around fastssl's
    marks["random"] |= {"markeredgewidth": 2, "markersize": 10}
    figure, axes = _grid(len(tests), 2, 0.9 + 0.22 * max(map(len, tests.values())))
    for panel, (test, rows) in zip(axes, tests.items(), strict=True):
        for place, result in enumerate(rows):
            shares = result.tests[test]
            panel.plot([shares["random"], shares["fastssl"]], [place, place], color="#cccccc", zorder=0)
            for who, style in marks.items():
                if who in shares:
                    panel.plot(shares[who], place, color=COLORS[who], **style)
        panel.set_title(test, loc="left", fontsize=10)
        panel.set(yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        panel.set_yticklabels([result.method for result in rows])
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    for who, style in marks.items():
        axes[0].plot([], [], color=COLORS[who], label=who, **style)
    _legend(figure, axes[0])
    return figure


def _sweep(results: Results) -> Figure:
    panels = {
        "step time, s": ("step", 1.0),
        "loss time, s": ("loss", 1.0),
        "peak memory of a step, MiB": ("step_bytes", MIB),
        "peak memory of its loss, MiB": ("loss_bytes", MIB),
    }
    figure, axes = _grid(len(panels), 2, 2.8)
    sizes = [point.batch_size for point in results.sweep]
    for panel, (title, (name, unit)) in zip(axes, panels.items(), strict=True):
        for impl in ("naive", "fastssl"):
            values = [getattr(point.timing[impl], name) / unit for point in results.sweep]
            panel.plot(sizes, values, f"{MARKERS[impl]}-", color=COLORS[impl], label=impl)
        panel.set_title(title, loc="left", fontsize=10)
        _powers_of_two(panel, sizes)
        panel.set_yscale("log")
    axes[0].set_xlabel("batch size")
    _legend(figure, axes[0])
    return figure


def _memory(results: Results) -> Figure:
    figure, axes = _grid(len(results.methods), 4, 2.1)
    for panel, result in zip(axes, results.methods, strict=True):
        for impl in ("naive", "fastssl"):
            points = [(m.batch_size, m.bytes / GIB) for m in result.memory[impl] if m.bytes < math.inf]
            sizes, peaks = zip(*points, strict=True) if points else ((), ())
            panel.plot(sizes, peaks, f"{MARKERS[impl]}-", color=COLORS[impl], markersize=4, label=impl)
        panel.axhline(results.budget / GIB, color="black", linestyle=":", linewidth=1)
        panel.set_title(result.method, loc="left", fontsize=10)
        _powers_of_two(panel, [m.batch_size for m in max(result.memory.values(), key=len)][::2])
        panel.set_yscale("log")
        panel.tick_params(labelsize=8)
    axes[0].set(xlabel="batch size", ylabel="GiB")
    _legend(figure, axes[0])
    return figure


def _powers_of_two(panel: Axes, sizes: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.xaxis.set_minor_formatter(NullFormatter())
