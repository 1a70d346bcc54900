"""Twin runs as one table in the terminal, and as one self-contained HTML file: styles and plots are inside."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from benchmarks.twins.agreement import DRIFT, LOOKS, TIMES
from benchmarks.twins.figures import Plot
from benchmarks.twins.losses import CHUNK, Cost
from benchmarks.twins.results import Huge, Point, Result, Results
from fastssl._meter import format_bytes, format_seconds

_QUIET = 0.1  # cores; the system's own housekeeping
FACTOR = 5  # how many times below the memory budget fastssl should stay, where naive exceeds it
LESS = 0.6  # the share of the loss's time that should be saved at `LESS_AT`
LESS_AT = 4096
FROM = 256  # the batch size from which a step should be as fast

Row = Sequence[str]


class Grid(NamedTuple):
    """A table. The first column is text, the others are numbers."""

    title: str
    text: str
    header: Row
    rows: Sequence[Row]


class Finding(NamedTuple):
    """A sentence with measured numbers, and whether it is what was hoped for."""

    good: bool
    text: str


def findings(results: Results) -> list[Finding]:
    """What the measurements say about agreement, speed, memory and features, good or bad."""
    found = [Finding(False, line) for line in results.complaints]
    if results.methods and not any(r.agreement.complaints for r in results.methods):
        names = ", ".join(r.method for r in results.methods)
        found.append(Finding(True, f"All twins agree within the tolerances stated below: {names}."))
    for result in results.methods:
        test, shares = next(iter(result.tests.items()))
        better = shares["fastssl"] > shares["random"]
        compared = "against {random:.1%} with random weights".format(**shares)
        found.append(Finding(better, f"{result.method}: {test} {shares['fastssl']:.1%} {compared}."))
    for point in results.sweep:
        if point.batch_size == LESS_AT:
            saved = 1 - 1 / point.loss_ratio
            text = f"{point.method}, batches of {point.batch_size:,}: {saved:.0%} less time in the loss than naive"
            found.append(Finding(saved >= LESS, f"{text} (at least {LESS:.0%} was the aim)."))
    timed = [point for point in results.sweep if point.batch_size >= FROM]
    if timed:
        ratios = ", ".join(f"{point.batch_size:,}: {point.step_ratio:.3f}x" for point in timed)
        good = all(point.step_ratio >= 1 for point in timed)
        found.append(Finding(good, f"Naive step time over fastssl's, by batch size: {ratios}."))
    for huge in results.huge:
        naive, ours = huge.memory["naive"].bytes, huge.memory["fastssl"].bytes
        text = (
            f"{huge.method}, a batch of {huge.memory['naive'].batch_size:,} by chunks: a step takes {_size(ours)}, "
            f"naive {_size(naive, huge.limit)}; the budget is {_size(results.budget)}."
        )
        found.append(Finding(naive > results.budget >= FACTOR * ours, text))
    return found


def terminal_table(results: Results) -> Table:
    """The main figures, one line for each method."""
    columns: dict[str, Callable[[Result], str]] = {
        "method": lambda r: r.method,
        "step": lambda r: _seconds(r.timing["fastssl"].step),
        "naive": lambda r: f"{r.step_ratio:.2f}x",
        "loss": lambda r: _seconds(r.timing["fastssl"].loss),
        "naive ": lambda r: f"{r.timing['naive'].loss / r.timing['fastssl'].loss:.1f}x",
        "compile": lambda r: _ratio(r.costs, "compile"),
        "chunked": lambda r: _ratio(r.costs, "chunked"),
        "share": lambda r: f"{_share(r, 'fastssl'):.1%}",
        "naive  ": lambda r: f"{_share(r, 'naive'):.1%}",
        "loss memory": lambda r: _size(r.timing["fastssl"].loss_bytes),
        "naive   ": lambda r: _size(r.timing["naive"].loss_bytes),
        f"batch in {_size(results.budget)}": lambda r: _largest(r, "fastssl", results.budget),
        "naive    ": lambda r: _largest(r, "naive", results.budget),
        "agree": lambda r: "NO" if r.agreement.complaints else "yes",
        "kNN or recall@1": lambda r: _marks(r, 0),
        "probe or recall@10": lambda r: _marks(r, 1),
    }
    caption = (
        "A ratio is the other's time over fastssl's. Share: of the step, in loss, masking, teacher and queue. Batch: "
        "the largest whose loss fits. Marks: trained, naive, random weights, supervised."
    )
    shown = Table(title="Training, fastssl and naive", caption=caption)
    for name in columns:
        shown.add_column(name.strip(), justify="left" if name == "method" else "right")
    for result in results.methods:
        shown.add_row(*(show(result) for show in columns.values()))
    return shown


def grids(results: Results) -> list[Grid]:
    """All figures."""
    tables = []
    if results.methods:
        tables += [_accuracy(results), _steps(results), _costs(results), _memory(results), _agreement(results)]
    if results.sweep:
        tables.append(_sweep(results.sweep))
    tables += [_huge(huge, results.budget) for huge in results.huge]
    return tables


def _accuracy(results: Results) -> Grid:
    rows = []
    for r in results.methods:
        for test, shares in r.tests.items():
            if "fastssl" in shares:
                marks = (f"{shares[who]:.1%}" if who in shares else "" for who in ("random", "supervised"))
                gain = f"{100 * (shares['fastssl'] - shares['random']):+.1f}"
                rows.append([f"{r.method}: {test}", f"{shares['fastssl']:.1%}", f"{shares['naive']:.1%}", *marks, gain])
    own = {shares["supervised"] for r in results.methods for t, shares in r.tests.items() if "fastssl" not in shares}
    text = (
        f"After {results.steps} steps of {results.methods[0].batch_size} examples, seed {results.seed}. Supervised: "
        "the same encoder trained with labels, as long and on the same batches. Twins end apart because training "
        "amplifies rounding; neither is better for it."
    )
    if own:
        text += (
            " The supervised runs' own classifiers label " + ", ".join(f"{a:.1%}" for a in sorted(own)) + " rightly."
        )
    return Grid("Features", text, ["test", "fastssl", "naive", "random", "supervised", "points over random"], rows)


def _steps(results: Results) -> Grid:
    rows = []
    for r in results.methods:
        ours, naive = r.timing["fastssl"], r.timing["naive"]
        row = [r.method, _seconds(ours.step), _seconds(naive.step), f"{r.step_ratio:.2f}x"]
        for part, seconds in r.kernels("fastssl").items():
            row += [_seconds(seconds), _seconds(r.kernels("naive")[part])] if seconds > 1e-4 else ["", ""]
        rows.append([*row, f"{_share(r, 'fastssl'):.1%}", f"{_share(r, 'naive'):.1%}"])
    header = ["method", "step", "naive", "naive / fastssl", "loss", "naive", "masking", "naive"]
    header += ["teacher, queue", "naive", "their share", "naive"]
    text = (
        "Medians over the run; the twins take turns, and naive / fastssl is the median of the same step's. A step is "
        "forward and backward pass and update, without loading and augmentation. Masking is measured apart from the "
        "run. What is not in the share is the encoder, which is the same code in both."
    )
    return Grid("Time of a step", text, header, rows)


def _costs(results: Results) -> Grid:
    rows = []
    for r in results.methods:
        ours = r.costs["fastssl"]
        row = [r.method, ours.note or _seconds(ours.seconds)]
        for name in ("naive", "compile", "chunked"):
            cost = r.costs.get(name, Cost())
            row.append(cost.note or (f"{_ratio(r.costs, name)} ({_seconds(cost.seconds)})" if name in r.costs else ""))
        rows.append([*row, *(_size(r.costs.get(n, Cost()).bytes) for n in ("fastssl", "naive", "compile", "chunked"))])
    header = ["method", "fastssl", "naive", "torch.compile", "chunked loop", "memory", "naive", "torch.compile"]
    text = (
        "The loss forward and backward on the embeddings of one batch, measured alone in turns, medians; a ratio is "
        "the other's time over fastssl's. torch.compile is of the naive loss. The chunked loop is what bounds memory "
        f"in plain PyTorch: {CHUNK} rows of similarities, or columns of correlations, at a time, computed again in the "
        "backward pass. BYOL's and SimSiam's losses build no matrix: there fastssl is plain PyTorch too. Small "
        "memory, below about 2 MiB, is not told from noise."
    )
    return Grid("The loss against other ways to compute it", text, [*header, "chunked loop"], rows)


def _memory(results: Results) -> Grid:
    rows = []
    for r in results.methods:
        last = {impl: next((m for m in reversed(ms) if m.bytes < math.inf), ms[0]) for impl, ms in r.memory.items()}
        beyond = (f"{_size(last[impl].bytes)} at {last[impl].batch_size:,}" for impl in ("fastssl", "naive"))
        batches = (_largest(r, impl, results.budget) for impl in ("fastssl", "naive"))
        peaks = (_size(getattr(r.timing[i], a)) for a in ("step_bytes", "loss_bytes") for i in ("fastssl", "naive"))
        rows.append([r.method, *batches, *beyond, *peaks])
    header = ["method", f"largest batch in {_size(results.budget)}", "naive", "last that was measured", "naive"]
    header += ["step of the run", "naive", "its loss", "naive"]
    text = (
        "Peaks of resident memory, less what was resident before. Largest batch: of those tried, each double the one "
        "before, the largest whose loss, forward and backward, fits the budget. ≥ marks the largest tried. The "
        f"encoder's activations come on top, and are bounded by --chunk-size. A step of the run has "
        f"{results.methods[0].batch_size} examples."
    )
    return Grid("Memory", text, header, rows)


def _agreement(results: Results) -> Grid:
    rows = []
    for r in results.methods:
        errors = r.agreement.errors
        row = [r.method]
        for quantity in ("loss", "gradients", "step", "state"):
            row += [f"{errors[quantity][i]:.1e}" for i in ("fastssl", "naive")] if quantity in errors else ["", ""]
        rows.append(
            [*row, f"{r.agreement.largest:.2%}", f"{r.agreement.drift:.2%}", "no" if r.agreement.complaints else "yes"]
        )
    header = ["method", "loss", "naive", "its gradients", "naive", "whole step", "naive", "state", "naive"]
    header += ["curves apart", "running means", "agree"]
    text = (
        f"{min(LOOKS, results.steps)} times in each run the same step is taken from the same weights with fastssl, "
        "with naive code, and with naive code in float64. Relative errors against float64, the largest of all looks; "
        "naive's is what float32 itself loses. Loss and its gradients are of the same embeddings; whole step is the "
        "gradients of all parameters, where float32 loses more because activations near 0 change sign; state is "
        f"teacher, queue and running statistics. Tolerance: {TIMES:.0f} times naive's, plus eight units in the last "
        "place. Curves apart: the largest difference of the two free runs' losses, as a share of the loss's root mean "
        "square; training amplifies rounding, so that single steps may be far apart. Running means over a tenth of the "
        f"run may differ by {DRIFT:.0%}."
    )
    return Grid("Agreement", text, header, rows)


def _sweep(points: Sequence[Point]) -> Grid:
    rows = []
    for p in points:
        row = [f"{p.batch_size:,}"]
        for name, ratio in (("step", p.step_ratio), ("loss", p.loss_ratio)):
            row += [_seconds(getattr(p.timing[i], name)) for i in ("fastssl", "naive")] + [f"{ratio:.3g}x"]
        row += [f"{1 - 1 / p.loss_ratio:.0%}"]
        row += [f"{p.timing[i].loss / p.timing[i].step:.1%}" for i in ("fastssl", "naive")]
        rows.append([*row, *(_size(p.timing[i].loss_bytes) for i in ("fastssl", "naive"))])
    header = ["batch size", "step", "naive", "naive / fastssl", "loss", "naive", "naive / fastssl", "saved"]
    header += ["loss / step", "naive", "loss memory", "naive"]
    text = (
        "Whole training steps, the twins in turns, medians; naive / fastssl of the step is the median of the same "
        "step's. Where the loss's share of the naive step is small, so is "
        "what can be gained, and a ratio near 1 is within the noise of the encoder's time. A larger batch is "
        "no claim of higher accuracy: on Fashion-MNIST it does not raise it."
    )
    return Grid(f"{points[0].method} over batch sizes", text, header, rows)


def _huge(huge: Huge, budget: float) -> Grid:
    rows = []
    for impl, m in huge.memory.items():
        fits = "yes" if m.bytes <= budget else "no"
        rows.append([huge.command[impl], _size(m.bytes, huge.limit), fits, f"{m.bytes / budget:.2f}"])
    text = (
        f"Peak extra resident memory of the second step, each command's step in a process of its own, which may take "
        f"{_size(huge.limit)}; the batch's views are in memory before. Chunks bound the encoder's activations, so that "
        "the loss is what grows."
    )
    header = ["command", "a step takes", f"fits {_size(budget)}", "of the budget"]
    return Grid(f"{huge.method}: a batch of {huge.memory['naive'].batch_size:,}", text, header, rows)


def _share(r: Result, impl: str) -> float:
    return sum(r.kernels(impl).values()) / r.timing[impl].step


def _ratio(costs: Mapping[str, Cost], name: str) -> str:
    ratio = costs[name].seconds / costs["fastssl"].seconds if name in costs else math.nan
    return "" if math.isnan(ratio) else f"{ratio:.2f}x"


def _largest(r: Result, impl: str, budget: float) -> str:
    largest = f"{r.largest(impl, budget):,}"
    return f"≥ {largest}" if r.is_largest_tried(impl, budget) else largest


def _marks(r: Result, place: int) -> str:
    shares = [*r.tests.values(), {}, {}][place]
    return ", ".join(f"{shares[who]:.1%}" for who in ("fastssl", "naive", "random", "supervised") if who in shares)


def _seconds(value: float) -> str:
    return "" if math.isnan(value) else format_seconds(value)


def _size(value: float, limit: float = math.nan) -> str:
    """In GiB or MiB; where it is infinite, more than `limit`."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return f"more than {_size(limit)}"
    return format_bytes(value)


def write(results: Results, plots: Sequence[Plot], path: Path) -> None:
    """The report: findings, plots, tables, and notes on them."""
    body = [
        f"<p class=lead>{_text(_introduction(results))}</p>",
        *(f"<p class=warning>{_text(line)}</p>" for line in _warnings(results)),
        "<h2>Findings</h2><ul class=findings>",
        *(f"<li class={'good' if f.good else 'bad'}>{_text(f.text)}</li>" for f in findings(results)),
        "</ul>",
        *map(_figure, plots),
        *map(_table, grids(results)),
        "<h2>How to repeat it</h2>",
        f"<pre>{_text(results.command)}</pre>",
        "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in results.machine.items()) + "</dl>",
    ]
    path.write_text(_PAGE.replace("BODY", "\n".join(body)), encoding="utf-8")


def _introduction(results: Results) -> str:
    data = ", ".join(dict.fromkeys(r.data for r in results.methods))
    return (
        "Each method was trained twice side by side, from the same weights on the same batches: with fastssl's "
        f"kernels, and with the same code on naive PyTorch. {'Data: ' + data + '. ' if data else ''}"
        "{cpu}, {cores} cores, {threads} threads, PyTorch {torch}, {date}.".format(**results.machine)
    )


def _warnings(results: Results) -> list[str]:
    if results.other_processes_cores <= _QUIET:
        return []
    cores = f"{results.other_processes_cores:.1f} cores"
    return [f"Other processes used up to {cores} while methods were trained: times are less certain for it."]


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(plot.title)}">'
    return f"<h2>{_text(plot.title)}</h2><figure>{image}<figcaption>{_text(plot.text)}</figcaption></figure>"


def _table(grid: Grid) -> str:
    header = "".join(f"<th>{_text(cell)}</th>" for cell in grid.header)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h2>{_text(grid.title)}</h2><p>{_text(grid.text)}</p><div class=wide>{table}</div>"


def _text(value: object) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastssl: training both ways</title>
<style>
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5b6776; --line: #dde3ea; --paper: #fff; --shade: #f5f7fa;
  --good: #00694e; --bad: #b3400e; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --soft: #9aa7b5; --line: #323b47; --paper: #14181e; --shade: #1c222a;
    --good: #4cc9a4; --bad: #f0955d; --accent: #62b5e5; }
}
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; }
p, li { max-width: 48rem; }
.lead, figcaption, h2 + p { color: var(--soft); }
.warning { border-left: 4px solid var(--bad); padding: .5rem 1rem; background: var(--shade); }
.findings { list-style: none; padding: 0; }
.findings li { padding: .3rem 0 .3rem 2rem; text-indent: -2rem; border-bottom: 1px solid var(--line); }
.findings li::before { display: inline-block; width: 2rem; text-indent: 0; font-weight: 700; }
.good::before { content: "\\2713"; color: var(--good); }
.bad::before { content: "\\2717"; color: var(--bad); }
figure { margin: 1rem 0; }
figcaption { margin-top: .5rem; max-width: 48rem; }
img { display: block; max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 8px; box-sizing: border-box; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; }
tbody tr:hover { background: var(--shade); }
pre { overflow-x: auto; padding: 1rem; background: var(--shade); border: 1px solid var(--line); border-radius: 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; font-size: .85rem; }
dt { color: var(--soft); }
dd { margin: 0; }
</style>
</head>
<body>
<h1>Training with fastssl and with naive PyTorch</h1>
BODY
</body>
</html>
"""
