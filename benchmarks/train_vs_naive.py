"""Train methods with fastssl's kernels and with naive ones, side by side: whether the curves are the same, how fast."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fastssl.train import METHODS, Images, Method, create, fit, load, twins
from fastssl.train.cli import RunParser, positive_int, run

IMAGE_METHODS = [name for name, method in METHODS.items() if method.load is Method.load]
COLORS = {"naive": "tab:orange", "fastssl": "tab:blue"}


def compare(
    name: str, images: Images, untrained: dict[type, dict[str, float]], steps: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """One row of the table: what each twin took and what became of it.

    Args:
        untrained: what random encoders are worth, by class; filled.
    """
    torch.manual_seed(seed)
    both = twins(create(name, steps))
    encoder = type(both["naive"].encoder)
    if encoder not in untrained:  # a constructor makes the encoder first, so all methods begin with the same weights
        untrained[encoder] = both["naive"].evaluate(images)
    data = both["naive"].training_data(images)
    history = fit(both, data, batch_size=batch_size, steps=steps, seed=seed, console=Console(stderr=True))
    losses = {impl: torch.tensor([step.loss for step in done], dtype=torch.float64) for impl, done in history.items()}
    difference = (losses["fastssl"] - losses["naive"]).abs()
    row = {
        "method": name,
        "first loss": losses["fastssl"][0].item(),
        "last loss": losses["fastssl"][-1].item(),
        "first difference": difference[0].item(),
        "largest difference": difference.max().item(),
    }
    for impl, done in history.items():
        timed = [step for step in done if step.peak_bytes is None]
        row[f"{impl} step ms"] = 1e3 * median(step.seconds for step in timed)
        row[f"{impl} loss ms"] = 1e3 * median(step.loss_seconds for step in timed)
        row[f"{impl} loss MiB"] = max(step.loss_peak_bytes or 0 for step in done) / 2**20
        for test, value in both[impl].evaluate(images).items():
            row[f"{impl} {test}"] = value
    return row | {f"random {test}": value for test, value in untrained[encoder].items()}


def table(rows: list[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda r: r["method"],
        "step": lambda r: f"{r['fastssl step ms']:.1f} ms",
        "naive": lambda r: f"{r['naive step ms'] / r['fastssl step ms']:.2f}x",
        "loss": lambda r: f"{r['fastssl loss ms']:.1f} ms",
        "naive loss": lambda r: f"{r['naive loss ms'] / r['fastssl loss ms']:.1f}x",
        "share of step": lambda r: f"{r['fastssl loss ms'] / r['fastssl step ms']:.0%}",
        "naive share": lambda r: f"{r['naive loss ms'] / r['naive step ms']:.0%}",
        "loss memory": lambda r: f"{r['fastssl loss MiB']:.0f} MiB",
        "naive memory": lambda r: f"{r['naive loss MiB']:.0f} MiB",
        "curves differ by": lambda r: f"{r['largest difference']:.1e} of {abs(r['last loss']):.3g}",
        "kNN": lambda r: f"{r['fastssl kNN accuracy']:.1%}",
        "naive kNN": lambda r: f"{r['naive kNN accuracy']:.1%}",
        "random kNN": lambda r: f"{r['random kNN accuracy']:.1%}",
        "probe": lambda r: f"{r['fastssl linear probe']:.1%}",
        "random probe": lambda r: f"{r['random linear probe']:.1%}",
    }
    shown = Table(title="Training, fastssl and naive", caption="A ratio is naive's time over fastssl's; medians.")
    for name in columns:
        shown.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        shown.add_row(*(show(row) for show in columns.values()))
    return shown


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar for each twin's step, the loss at its bottom."""
    figure = Figure(figsize=(1.5 + 1.2 * len(rows), 4), layout="constrained")
    axes = figure.subplots()
    for shift, (impl, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
        places = [place + shift for place in range(len(rows))]
        axes.bar(places, [row[f"{impl} step ms"] for row in rows], 0.38, color=color, alpha=0.4, label=f"{impl}, step")
        axes.bar(places, [row[f"{impl} loss ms"] for row in rows], 0.38, color=color, label=f"{impl}, its loss")
    axes.set(title="Time of a training step", ylabel="ms", xticks=range(len(rows)))
    axes.set_xticklabels([row["method"] for row in rows])
    axes.legend()
    figure.savefig(path, dpi=150, format="png")


def main() -> None:
    parser = RunParser("python benchmarks/train_vs_naive.py", __doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(IMAGE_METHODS)}; all by default")
    parser.add_argument("--steps", type=positive_int, default=200, help="of each method (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the CSV and the plot")
    parser.set_defaults(batch_size=256)
    args = parser.parse_args()
    if unknown := set(args.methods) - set(IMAGE_METHODS):
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(IMAGE_METHODS)}")
    images = load(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    untrained: dict[type, dict[str, float]] = {}
    for name in args.methods or IMAGE_METHODS:
        rows.append(compare(name, images, untrained, args.steps, args.batch_size, args.seed))
        with open(args.output / "train_vs_naive.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    Console(width=None if sys.stdout.isatty() else 220).print(table(rows))
    draw(rows, args.output / "train_vs_naive.png")


if __name__ == "__main__":
    run(main)
