"""`python -m fastssl.train.demo`: SimCLR with the fused NT-Xent and with naive PyTorch, side by side on real images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastssl import use_backend
from fastssl._meter import Meter, available_memory, format_bytes, format_seconds
from fastssl.functional import nt_xent
from fastssl.train import Run, Step, fit, load, twins
from fastssl.train.cli import RunParser, positive_float, positive_int, run
from fastssl.train.files import check_writable
from fastssl.train.method import IMPLEMENTATIONS
from fastssl.train.methods.simclr import SimCLR

FEATURES = 128
COLORS = {"naive": "tab:orange", "fastssl": "tab:blue"}


class Cost(NamedTuple):
    """The cost of one forward and backward pass of NT-Xent."""

    rows: int
    seconds: float
    bytes: int | None


def naive_bytes(rows: int) -> int:
    """What naive NT-Xent holds at its peak: three float32 matrices of rows x rows, and the mask of the diagonal.

    In the forward pass the similarities, the masked similarities and their log-softmax; in the backward pass the
    log-softmax and two gradients.
    """
    return (3 * 4 + 1) * rows * rows


def train_twins(
    images: Tensor, batch_size: int, steps: int | None, minutes: float, seed: int, console: Console
) -> tuple[dict[str, SimCLR], dict[str, list[Step]]]:
    """SimCLR with either loss, from the same weights, on the same views; `steps` None fills `minutes`."""
    torch.manual_seed(seed)
    both = twins(SimCLR())
    if steps is None:
        with Meter() as trial:
            fit(copy.deepcopy(both), images, Run(batch_size=batch_size, steps=4), console=Console(quiet=True))
        steps = max(1, round(60 * minutes / (trial.seconds / 4)))
    return both, fit(both, images, Run(batch_size=batch_size, steps=steps, seed=seed), console=console)


def training_table(history: dict[str, list[Step]], accuracy: dict[str, float], untrained: float) -> Table:
    timed = {name: [s for s in steps if s.peak_bytes is None] or steps for name, steps in history.items()}
    metered = {name: [s for s in steps if s.peak_bytes is not None] for name, steps in history.items()}

    def row(label: str, values: dict[str, float | None], show: Callable[[float], str]) -> tuple[str, ...]:
        known = None not in values.values()
        ratio = f"{values['naive'] / values['fastssl']:.2f}x" if known else ""
        return label, *(show(value) if value is not None else "n/a" for value in values.values()), ratio

    def time(field: str) -> dict[str, float]:
        return {name: median(getattr(s, field) for s in steps) for name, steps in timed.items()}

    def peak(field: str) -> dict[str, float | None]:
        return {name: max((getattr(s, field) for s in steps), default=None) for name, steps in metered.items()}

    table = Table(title="SimCLR, both ways", caption="Times are medians. Memory is what a step or its loss adds.")
    for column in ("", *history, "naive / fastssl"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(*row("step time", time("seconds"), format_seconds))
    table.add_row(*row("loss time", time("loss_seconds"), format_seconds))
    table.add_row(*row("peak memory, step", peak("peak_bytes"), format_bytes))
    table.add_row(*row("peak memory, loss", peak("loss_peak_bytes"), format_bytes))
    table.add_row("final loss", *(f"{steps[-1].loss:.4f}" for steps in history.values()))
    table.add_row("kNN accuracy", *(f"{accuracy[name]:.2%}" for name in history))
    table.add_row("kNN accuracy, random init", *(f"{untrained:.2%}" for _ in history))
    return table


def growing_batches(largest: int, console: Console) -> dict[str, list[Cost]]:
    """NT-Xent at 2,048 rows, or at `largest` if that is less, doubled up to it; naive only as long as it fits into
    memory."""
    costs: dict[str, list[Cost]] = {"naive": [], "fastssl": []}
    available = available_memory()
    table = Table(title=f"NT-Xent, forward + backward, rows x {FEATURES}, float32")
    for column in ("rows", "naive time", "naive memory", "estimate", "fastssl time", "fastssl memory"):
        table.add_column(column, justify="right")
    rows = min(2048, largest)
    with console.status("") as status:
        while rows <= largest:
            status.update(f"NT-Xent at {rows:,} rows")
            fits = naive_bytes(rows) < 0.9 * available
            for name, cost in _cost(rows, list(costs) if fits else ["fastssl"]).items():
                costs[name].append(cost)
            naive, fused = ((format_seconds(cost[-1].seconds), _memory(cost[-1].bytes)) for cost in costs.values())
            naive = naive if fits else ("-", "does not fit")
            table.add_row(f"{rows:,}", *naive, format_bytes(naive_bytes(rows)), *fused)
            rows *= 2
    table.caption = f"This machine has {format_bytes(available)} available. Estimate: 13 bytes per pair of rows."
    console.print(table)
    return costs


def _cost(rows: int, names: Sequence[str]) -> dict[str, Cost]:
    """Memory of a first pass; time as the median of five more, in turns, or of the first if that took long."""
    z1, z2 = (torch.randn(rows // 2, FEATURES, requires_grad=True) for _ in range(2))

    def measure(name: str, memory: bool) -> Meter:
        z1.grad = z2.grad = None
        with Meter(memory) as meter, use_backend(IMPLEMENTATIONS[name]):
            nt_xent(z1, z2).backward()
        return meter

    first = {name: measure(name, memory=True) for name in names}
    seconds = {name: [meter.seconds] for name, meter in first.items()}
    if max(meter.seconds for meter in first.values()) < 2:
        rounds = [{name: measure(name, memory=False).seconds for name in names} for _ in range(5)]
        seconds = {name: [turn[name] for turn in rounds] for name in names}
    return {name: Cost(rows, median(seconds[name]), first[name].extra) for name in names}


def draw(history: dict[str, list[Step]], costs: dict[str, list[Cost]], title: str, path: Path) -> None:
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    (curves, time), (difference, memory) = figure.subplots(2, 2)

    losses = {name: torch.tensor([step.loss for step in steps], dtype=torch.float64) for name, steps in history.items()}
    curves.plot(losses["naive"], color=COLORS["naive"], linewidth=5, alpha=0.5, label="naive")
    curves.plot(losses["fastssl"], color=COLORS["fastssl"], linewidth=1.2, label="fastssl")
    curves.set(title="Training loss: one curve on the other", xlabel="step", ylabel="NT-Xent")
    difference.plot((losses["fastssl"] - losses["naive"]).abs(), ".", color="black", markersize=3)
    difference.set(title="Their absolute difference", xlabel="step", ylabel="|fastssl - naive|", yscale="log")

    gib = 2**30
    for name, points in costs.items():
        rows = [cost.rows for cost in points]
        time.plot(rows, [cost.seconds for cost in points], "o-", color=COLORS[name], label=name)
        measured = [float("nan") if cost.bytes is None else cost.bytes / gib for cost in points]
        memory.plot(rows, measured, "o-", color=COLORS[name], label=name)
    rows = [cost.rows for cost in costs["fastssl"]]
    memory.plot(rows, [naive_bytes(n) / gib for n in rows], ":", color=COLORS["naive"], label="naive, estimated")
    memory.axhline(available_memory() / gib, color="tab:red", linewidth=1, label="this machine's memory")
    time.set(title=f"NT-Xent, forward + backward, rows x {FEATURES}", ylabel="seconds")
    memory.set(title="Memory it adds at its highest", ylabel="GiB")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rows (2 x batch size)", yscale="log", xticks=rows, xticklabels=[f"{n // 1024}k" for n in rows])
        axes.minorticks_off()
    for axes in (curves, time, memory):
        axes.legend()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png")


def _memory(size: int | None) -> str:
    return "n/a" if size is None else format_bytes(size)


def main() -> None:
    parser = RunParser(
        "python -m fastssl.train.demo", "SimCLR with the fused and with the naive NT-Xent, side by side."
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=positive_float, default=4.0, help="how long to train, both together (default: %(default)s)"
    )
    length.add_argument("--steps", type=positive_int, help="instead of --minutes")
    parser.add_argument(
        "--rows", type=positive_int, default=131072, help="largest NT-Xent to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/demo.png"), help="the figure (PNG; default: %(default)s)"
    )
    args = parser.parse_args()

    check_writable(args.output)
    console = Console()
    images = load(args.data)
    console.print(f"{images.name}: {len(images.train):,} training images, {len(images.test):,} test images")
    trained, history = train_twins(images.train, args.batch_size, args.steps, args.minutes, args.seed, console)
    with console.status("kNN accuracy"):
        torch.manual_seed(args.seed)
        untrained = SimCLR().evaluate(images)["kNN accuracy"]
        accuracy = {name: method.evaluate(images)["kNN accuracy"] for name, method in trained.items()}
    console.print(training_table(history, accuracy, untrained))
    gap = max(abs(a.loss - b.loss) for a, b in zip(*history.values(), strict=True))
    console.print(f"The two loss curves differ by at most {gap:.1e}.")
    costs = growing_batches(args.rows, console)
    largest = costs["fastssl"][-1]
    console.print(
        f"At {largest.rows:,} rows naive PyTorch would need {format_bytes(naive_bytes(largest.rows))}; "
        f"fastssl took {_memory(largest.bytes)} and {format_seconds(largest.seconds)}."
    )
    draw(history, costs, f"SimCLR on {images.name}, batch {args.batch_size:,}", args.output)
    console.print(f"Figure: {args.output}")


if __name__ == "__main__":
    run(main)
