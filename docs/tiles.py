"""Draws tiles.svg: what NT-Xent keeps of the N x N similarities. `python docs/tiles.py [FILE]`"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

ORANGE, BLUE, GREY = "#D55E00", "#0072B2", "#dddddd"
BLOCKS = 6
FEATURES = 128


def _bare(axis: Axes, title: str) -> None:
    axis.set(xlim=(-0.6, BLOCKS + 1.2), ylim=(BLOCKS + 1.7, -1.0), aspect="equal")
    axis.set_title(title, fontsize=11)
    axis.axis("off")


def eager(axis: Axes) -> None:
    """Matrices, one behind the other."""
    _bare(axis, "eager PyTorch: whole matrices")
    for i, name in reversed(list(enumerate(("similarities", "log-softmax", "gradient")))):
        x, y = 0.55 * i, 1.1 - 0.55 * i
        axis.add_patch(Rectangle((x, y), BLOCKS - 0.6, BLOCKS - 0.6, facecolor="#fbe3d4", edgecolor=ORANGE, lw=1.5))
        axis.text(x + BLOCKS - 0.7, y + 0.3, name, fontsize=8, ha="right", va="center", color=ORANGE)
    axis.text(BLOCKS / 2, BLOCKS + 1.2, "several N x N matrices at once", ha="center", fontsize=9)


def tiled(axis: Axes) -> None:
    """The tiles of S = S^T that are visited, and what one of them gives."""
    _bare(axis, "fastssl: one tile at a time, each pair once")
    row, column = 1, 4
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            visited, now = i <= j, (i, j) == (row, column)
            face = BLUE if now else "#cfe4f2" if visited else "none"
            edge = {"edgecolor": "white" if visited else GREY, "linewidth": 1.0}
            axis.add_patch(Rectangle((j, i), 1, 1, facecolor=face, **edge))
    axis.text(column + 0.5, row + 0.5, "$S_{ij}$", color="white", ha="center", va="center")
    axis.text(1.55, 4.5, "by symmetry", color="#888888", ha="center", fontsize=8, rotation=45)
    for block, sums in ((row, "loss and gradient\nof rows i"), (column, "and of rows j")):
        axis.add_patch(Rectangle((BLOCKS + 0.3, block), 0.35, 1, facecolor=BLUE))
        axis.text(BLOCKS + 0.8, block + 0.5, sums, fontsize=8, va="center", color=BLUE)
    axis.text(BLOCKS / 2, BLOCKS + 1.2, "kept: rows, their sums, their gradients", ha="center", fontsize=9)


def growth(axis: Axes) -> None:
    """Bytes of the two kinds of matrix."""
    rows = [2**i for i in range(8, 19)]
    for label, color, size in (
        ("one N x N matrix;\neager code keeps several", ORANGE, lambda n: 4 * n * n),
        (f"one N x {FEATURES} matrix;\nfastssl keeps several", BLUE, lambda n: 4 * n * FEATURES),
    ):
        axis.loglog(rows, list(map(size, rows)), color=color, label=label, lw=2, base=2)
    axis.set_yticks([2**i for i in range(20, 41, 5)], ["1 MiB", "32 MiB", "1 GiB", "32 GiB", "1 TiB"])
    axis.set_xticks([2**i for i in range(8, 19, 2)], ["256", "1 Ki", "4 Ki", "16 Ki", "64 Ki", "256 Ki"])
    axis.minorticks_off()
    axis.grid(alpha=0.4)
    axis.set_xlabel("N, rows (float32)")
    axis.set_title("memory grows with N, not with N²", fontsize=11)
    axis.legend(fontsize=8, frameon=False)


def main(path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "fastssl", "font.family": "DejaVu Sans"}):
        figure, axes = pyplot.subplots(1, 3, figsize=(12.5, 4.2), width_ratios=(1, 1.15, 1), layout="constrained")
        for draw, axis in zip((eager, tiled, growth), axes, strict=True):
            draw(axis)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.use("Agg")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
