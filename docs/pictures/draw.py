"""Draws the pictures of docs/families/, one for each page. `python docs/pictures/draw.py [FOLDER]`

Blue is what fastssl works on, orange what is to be had or avoided, grey what is left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

ORANGE, BLUE, PALE, GREY, INK = "#D55E00", "#0072B2", "#cfe4f2", "#dddddd", "#444444"
PROCESSES = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
Point = tuple[float, float]


def panels(count: int, width: float = 3.7, height: float = 3.6, ratios: Sequence[float] | None = None) -> list[Axes]:
    """Axes side by side, without frames, y downwards."""
    size = (sum(ratios) * width if ratios else count * width), height
    _, axes = pyplot.subplots(1, count, figsize=size, width_ratios=ratios, layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.axis("off")
    return list(axes[0])


def frame(axis: Axes, title: str, x: Point, y: Point, note: str = "") -> None:
    axis.set(xlim=x, ylim=(y[1], y[0]), aspect="equal")
    axis.set_title(title, fontsize=11)
    if note:
        axis.text(0.5, -0.02, note, transform=axis.transAxes, ha="center", va="top", fontsize=9)


def box(axis: Axes, x: float, y: float, width: float = 1, height: float = 1, face=PALE, edge="white", **style) -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, **{"linewidth": 1.0} | style))


def say(axis: Axes, x: float, y: float, text: str, color=INK, size: float = 9, **style) -> None:
    axis.text(x, y, text, color=color, fontsize=size, **{"ha": "center", "va": "center"} | style)


def arrow(axis: Axes, start: Point, end: Point, color=INK, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": color, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def tiles(axis: Axes, rows: int, columns: int, now: tuple[int, int], visited: Callable[[int, int], bool]) -> None:
    """A matrix in tiles of length 1, from (0, 0): `now` is worked on, those not visited are empty."""
    for i in range(rows):
        for j in range(columns):
            if not visited(i, j):
                box(axis, j, i, face="none", edge=GREY)
            else:
                box(axis, j, i, face=BLUE if (i, j) == now else PALE)
    say(axis, now[1] + 0.5, now[0] + 0.5, "$S_{ij}$", "white")


def contrastive() -> None:
    axes = panels(3)
    everything, n = (lambda i, j: True), 6
    frame(axes[0], "the same rows twice", (-0.4, n + 2.9), (-0.5, n + 0.2), "nt_xent, dcl, sup_con: half of the tiles")
    tiles(axes[0], n, n, (1, 4), lambda i, j: i <= j)
    say(axes[0], 1.6, 4.5, "by symmetry", "#888888", 8, rotation=-45)
    for block, text in ((1, "sums of rows i"), (4, "and of rows j")):
        box(axes[0], n + 0.2, block, 0.3, face=BLUE)
        say(axes[0], n + 0.65, block + 0.5, text, BLUE, 8, ha="left")

    frame(axes[1], "two sides, both ways", (-0.4, n + 2.9), (-0.5, n + 1.0), "clip_loss: each tile once")
    tiles(axes[1], n, n, (2, 3), everything)
    for i in range(n):
        axes[1].plot((i, i + 1), (i, i + 1), color=ORANGE, linewidth=1.5)
    say(axes[1], 0.1, -0.25, "positive pairs", ORANGE, 8, ha="left")
    box(axes[1], n + 0.2, 2, 0.3, face=BLUE)
    say(axes[1], n + 0.65, 2.5, "sums of images", BLUE, 8, ha="left")
    box(axes[1], 3, n + 0.2, 1, 0.3, face=BLUE)
    say(axes[1], 4.2, n + 0.37, "sums of texts", BLUE, 8, ha="left")

    frame(axes[2], "a queue, one way", (-1.7, 8.6), (-2.6, 5.2), "info_nce: keys are constants")
    tiles(axes[2], 3, 7, (1, 4), everything)
    say(axes[2], -0.2, 1.5, "queries", INK, 8, ha="right")
    say(axes[2], 3.5, -0.35, "keys of the queue", INK, 8)
    arrow(axes[2], (0.2, 3.45), (6.8, 3.45), BLUE)
    say(axes[2], 3.5, 4.2, r"carried along: $\sum_j e^{S_{ij}}$ and $\sum_j e^{S_{ij}} y_j$,", BLUE, 8)
    say(axes[2], 3.5, 4.85, "which is the gradient", BLUE, 8)


def sigmoid() -> None:
    axes = panels(2, 4.4)
    n = 5
    frame(axes[0], "eager PyTorch: forward, then backward", (-0.5, 7.5), (-1.4, 6), "several matrices are kept")
    for x, text in ((1.6, "gradient"), (0.8, "log-sigmoid"), (0, "logits")):
        box(axes[0], x, 1.2 - x, 4.6, 4.6, face="#fbe3d4", edge=ORANGE, linewidth=1.5)
        say(axes[0], x + 4.5, 1.5 - x, text, ORANGE, 8, ha="right")
    frame(axes[1], "fastssl: loss and gradients in one pass", (-0.5, 9.3), (-0.5, 6.9), "nothing of a tile is kept")
    tiles(axes[1], n, n, (1, 3), lambda i, j: True)
    box(axes[1], n + 0.3, 1, 0.35, face=BLUE)
    say(axes[1], n + 0.9, 1.5, r"$W_{ij}\, y_j$: gradient of $x_i$", BLUE, 9, ha="left")
    box(axes[1], 3, n + 0.3, 1, 0.35, face=BLUE)
    say(axes[1], 3.5, n + 1.2, r"$W_{ij}^T x_i$: gradient of $y_j$", BLUE, 9)
    say(axes[1], n + 0.9, 3.5, "loss, and the gradients\nof scale and bias", BLUE, 9, ha="left")


def correlation() -> None:
    axes = panels(2, 4.9, 3.4)
    frame(axes[0], "primal: N ≥ D", (-0.2, 9.8), (-0.4, 5.6), "squares of C = AᵀB, each once")
    box(axes[0], 0, 0.4, 1.9, 4.4)
    say(axes[0], 0.95, 2.6, "A, B\nN x D")
    arrow(axes[0], (2.1, 2.6), (2.9, 2.6))
    for i in range(4):
        for j in range(4):
            box(axes[0], 3.1 + j, 0.6 + i, face=BLUE if (i, j) == (1, 2) else PALE)
    say(axes[0], 5.6, 2.1, "C", "white")
    say(axes[0], 5.1, 5.0, "D x D, in tiles", size=8)
    arrow(axes[0], (7.3, 2.6), (7.9, 2.6))
    say(axes[0], 8.0, 2.6, "loss,\nA C, B Cᵀ:\ngradients", BLUE, 9, ha="left")

    frame(axes[1], "dual: N < D", (-0.2, 9.8), (-0.4, 5.6), "the same sum from Gram matrices")
    for y, name in ((0.5, "A"), (3.1, "B")):
        box(axes[1], 0, y, 4.4, 1.5)
        say(axes[1], 2.2, y + 0.75, f"{name}   N x D")
        arrow(axes[1], (4.6, y + 0.75), (5.2, y + 0.75))
        for i in range(3):
            for j in range(3):
                face = "none" if j < i else BLUE
                box(axes[1], 5.4 + 0.5 * j, y + 0.5 * i, 0.5, 0.5, face=face, edge=GREY if j < i else "white")
        say(axes[1], 6.15, y + 1.85, f"{name}{name}ᵀ, half of it", BLUE, 8)
    say(axes[1], 7.2, 2.5, r"$\langle AA^T, BB^T \rangle$", BLUE, 11, ha="left")


def distillation() -> None:
    axes = panels(2, 5.0, 3.4)
    frame(axes[0], "from logits: a row at a time", (-2.6, 8.2), (-0.6, 5.9), "dino_loss, ibot_loss")
    for y, name, face in ((0, "teacher's views", "#fbe3d4"), (0.7, "", "#fbe3d4"), (1.9, "student's view", PALE)):
        box(axes[0], 0, y, 8, 0.55, face=face)
        say(axes[0], -0.15, y + 0.27, name, size=8, ha="right")
    say(axes[0], 4, 0.27, r"exponentials $P$ of all views stay in the cache", ORANGE, 9)
    say(axes[0], 4, 2.17, r"read from memory once: maximum, sum, $\langle P, s \rangle$", BLUE, 9)
    arrow(axes[0], (4, 2.65), (4, 3.6))
    box(axes[0], 0, 3.7, 8, 0.55, face=BLUE)
    say(axes[0], 4, 3.97, r"gradient $(Q - P) / T_s$, written once", "white")
    say(axes[0], 4, 5.1, "K prototypes", size=8)
    arrow(axes[0], (2.7, 5.1), (0, 5.1), GREY)
    arrow(axes[0], (5.3, 5.1), (8, 5.1), GREY)

    frame(axes[1], "from features: a block of rows at a time", (-0.4, 9.6), (-0.6, 5.9), "prototype_distillation_loss")
    box(axes[1], 0, 1.5, 1.2, 4, face=PALE)
    box(axes[1], 0, 2.5, 1.2, 1, face=BLUE)
    say(axes[1], 0.6, 5.75, "features", size=8)
    box(axes[1], 2, 0, 7.3, 1.1)
    say(axes[1], 5.6, 0.55, "prototypes, K x D")
    box(axes[1], 2, 1.5, 7.3, 4, face="none", edge=GREY)
    box(axes[1], 2, 2.5, 7.3, 1, face=BLUE)
    say(axes[1], 5.6, 3.0, "logits, then weights, of a block", "white")
    say(axes[1], 5.6, 4.6, "never there as a whole", "#888888")


def neighbours() -> None:
    axes = panels(2, 4.4)
    n = 6
    frame(axes[0], "the search: half of the tiles", (-0.4, n + 3), (-0.5, n + 0.2), "only the nearest are kept")
    tiles(axes[0], n, n, (1, 4), lambda i, j: i <= j)
    say(axes[0], 1.6, 4.5, "by symmetry", "#888888", 8, rotation=-45)
    for block, text in ((1, "nearest so far\nof rows i"), (4, "and of rows j")):
        box(axes[0], n + 0.2, block, 0.3, face=BLUE)
        say(axes[0], n + 0.65, block + 0.5, text, BLUE, 8, ha="left")
    frame(axes[1], "the loss: N pairs of rows", (-1.55, 1.55), (-1.35, 1.35), "each is pushed away from its nearest")
    axes[1].add_patch(Circle((0, 0), 1, facecolor="none", edgecolor=GREY, linewidth=1.5))
    angles = [10, 42, 63, 130, 158, 221, 290, 318]
    points = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in angles]
    for i, a in enumerate(points):
        nearest = min((b for b in points if b is not a), key=lambda b: math.dist(a, b))
        axes[1].plot((a[0], nearest[0]), (a[1], nearest[1]), color=ORANGE, linewidth=1.2, zorder=1)
        turn = math.atan2(a[1], a[0]) + (0.28 if (nearest[0] * a[1] - nearest[1] * a[0]) > 0 else -0.28)
        arrow(axes[1], (1.12 * a[0], 1.12 * a[1]), (1.12 * math.cos(turn), 1.12 * math.sin(turn)), BLUE)
        axes[1].plot(*points[i], "o", color=BLUE, markersize=6)


def linear_cross_entropy() -> None:
    axes = panels(2, 4.9, 3.6)
    labelled = (0, 3, 5, 6)
    for axis, title, note in (
        (axes[0], "eager PyTorch: all logits", "N x V, several times over"),
        (axes[1], "fastssl: a block of labelled rows", "logits, then their weights in the same place"),
    ):
        frame(axis, title, (-0.4, 9.4), (-0.5, 5.6), note)
        box(axis, 2, 0, 7.2, 0.9)
        say(axis, 5.6, 0.45, "V words x D")
        for row in range(8):
            ours, skipped = axis is axes[1], row not in labelled
            y = 1.3 + 0.5 * row
            face = "none" if ours and skipped else PALE
            box(axis, 0, y, 1.3, 0.5, face=face, edge=GREY if face == "none" else "white")
            if not ours:
                box(axis, 2, y, 7.2, 0.5, face="#fbe3d4", edge="white")
            elif row not in (5, 6):
                box(axis, 2, y, 7.2, 0.5, face="none", edge=GREY)
    box(axes[1], 2, 3.8, 7.2, 1.0, face=BLUE)
    say(axes[0], 5.6, 3.3, "logits, softmax, gradient", ORANGE)
    say(axes[1], 5.6, 4.3, "logits of a block", "white")
    say(axes[1], 5.6, 2.05, "no label: no work", "#888888", 8)
    for axis in axes:
        say(axis, 0.65, 0.95, "N tokens", size=8)


def tokens() -> None:
    (axis,) = panels(1, 9.2, 3.4)
    frame(axis, "", (-4.2, 13.2), (-0.6, 6.0))
    words = "the cat sat on the mat and saw a dog run off".split()

    def line(y: float, name: str, cells: Sequence[tuple[str, str]]) -> None:
        say(axis, -0.2, y + 0.45, name, size=9, ha="right")
        for k, (text, face) in enumerate(cells):
            box(axis, 1.07 * k, y, 1, 0.9, face=face)
            say(axis, 1.07 * k + 0.5, y + 0.45, text, "white" if face in (BLUE, ORANGE) else INK, 8)

    chosen = {2: "MASK", 5: "MASK", 8: "ran"}
    line(0, "mask_tokens", [(chosen.get(k, word), BLUE if k in chosen else PALE) for k, word in enumerate(words)])
    line(1.6, "span_corruption", [
        (text, BLUE if text.startswith("<") else PALE) for text in "the cat <0> the mat and saw <1> run off".split()
    ])  # fmt: skip
    line(2.6, "its labels", [
        (text, BLUE if text.startswith("<") else ORANGE) for text in "<0> sat on <1> a dog".split()
    ])  # fmt: skip
    negatives = (1, 4, 7, 10)
    line(4.2, "sample_negatives", [
        (str(k), BLUE if k == 5 else ORANGE if k in negatives else PALE) for k in range(12)
    ])  # fmt: skip
    say(axis, 1.07 * 5.5, 5.6, "step 5, and four others of the same sequence", size=9)


def masking() -> None:
    (axis,) = panels(1, 11.0, 3.3)
    frame(axis, "", (-0.3, 24.4), (-1.0, 6.6))
    visible = {(0, 3), (1, 1), (2, 4), (3, 0), (4, 2), (5, 5), (1, 5), (4, 4), (5, 1)}
    n = 6

    def grid(x: float, shown: Callable[[int, int], str]) -> None:
        for i in range(n):
            for j in range(n):
                face = shown(i, j)
                box(axis, x + 0.8 * j, 0.3 + 0.8 * i, 0.8, 0.8, face=face, edge=GREY if face == "none" else "white")

    grid(0, lambda i, j: BLUE if (i, j) in visible else PALE)
    say(axis, 2.4, -0.3, "image")
    arrow(axis, (5.1, 2.7), (6.2, 2.7))
    say(axis, 5.65, 2.2, "patch_embed", size=8, rotation=90, va="bottom")
    for k in range(len(visible)):
        box(axis, 6.5, 0.3 + 0.53 * k, 1.5, 0.53, face=BLUE)
    say(axis, 7.25, -0.3, "visible tokens")
    arrow(axis, (8.3, 2.7), (10.2, 2.7))
    say(axis, 9.25, 2.3, "encoder", size=8)
    arrow(axis, (10.9, 2.7), (11.8, 2.7))
    say(axis, 10.55, 2.7, "restore_tokens", size=8, rotation=90)
    grid(12.1, lambda i, j: BLUE if (i, j) in visible else "#f6c9ad")
    say(axis, 14.5, -0.3, "with mask tokens, positions")
    arrow(axis, (17.1, 2.7), (19.0, 2.7))
    say(axis, 18.05, 2.3, "decoder", size=8)
    grid(19.3, lambda i, j: "none" if (i, j) in visible else ORANGE)
    say(axis, 21.7, -0.3, "loss of hidden patches alone")
    say(axis, 21.7, 5.7, "masked_patch_loss reads the image", ORANGE, 8)


def ema() -> None:
    (axis,) = panels(1, 9.2, 2.8)
    frame(axis, "", (-3.0, 16.2), (-0.6, 4.9))
    lengths, x = (4.6, 0.5, 0.3, 2.9, 0.5, 0.3, 5.5, 0.4, 1.0), 0.0
    for length in lengths:
        for y, face in ((0, PALE), (1.0, "#fbe3d4")):
            box(axis, x, y, length, 0.8, face=face, edge=INK, linewidth=0.8)
        x += length
    say(axis, -0.2, 0.4, "student", ha="right")
    say(axis, -0.2, 1.4, "teacher", ha="right")
    say(axis, -0.2, 3.3, "threads", ha="right")
    for k in range(4):
        width = x / 4
        box(axis, width * k, 2.9, width, 0.8, face=PROCESSES[k])
        say(axis, width * (k + 0.5), 3.3, f"run {k}", "white" if k != 3 else INK)
        arrow(axis, (width * (k + 0.5), 2.0), (width * (k + 0.5), 2.8))
    say(axis, x / 2, 4.4, "tensors of any size, runs of one: read student, read teacher, write teacher")


def memory_bank() -> None:
    (axis,) = panels(1, 9.2, 2.5)
    frame(axis, "", (-2.6, 16.6), (-1.2, 3.9))
    for k in range(16):
        new = k >= 13 or k < 2
        box(axis, k, 0.6, 1, 1, face=BLUE if new else PALE)
        say(axis, k + 0.5, 1.1, str((k - 13) % 16) if new else "", "white")
    say(axis, -0.2, 1.1, "keys", ha="right")
    arrow(axis, (13.0, -0.5), (13.0, 0.5), ORANGE)
    say(axis, 12.8, -0.6, "position, before", ORANGE, 9, ha="right")
    arrow(axis, (2.0, -0.5), (2.0, 0.5), ORANGE)
    say(axis, 2.2, -0.6, "and after", ORANGE, 9, ha="left")
    arrow(axis, (15.5, 1.8), (0.5, 1.8), BLUE, bend=-0.11)
    say(axis, 8, 3.2, "five new keys: three to the end, two at the beginning; nothing else moves", BLUE)


def grad_cache() -> None:
    (axis,) = panels(1, 9.2, 3.6)
    frame(axis, "", (-3.2, 17.2), (-0.9, 7.2))
    steps = [("embed", k, PALE) for k in range(4)] + [("loss", None, ORANGE)]
    steps += [step for k in range(4) for step in (("embed", k, BLUE), ("back", k, BLUE))]
    heights = [0.5] * 4 + [0.5] + [1.7, 0.9] * 4
    width, grown = 1.25, 0.0
    for at, ((what, chunk, face), height) in enumerate(zip(steps, heights, strict=True)):
        box(axis, at * width, 0, width, 1.2, face=face)
        text = what if chunk is None else f"{what}\n{chunk}"
        say(axis, (at + 0.5) * width, 0.6, text, INK if face == PALE else "white", 8)
        grown = min(grown + 0.12, 0.6) if at < 4 else grown
        box(axis, at * width, 6.4 - grown - height, width, height, face=PALE if face == PALE else face, alpha=0.8)
        box(axis, at * width, 6.4 - grown, width, grown, face="#999999")
    say(axis, 2 * width, -0.4, "without a graph", size=9)
    say(axis, 9 * width, -0.4, "again, with a graph, and back", size=9)
    axis.plot((0, 13 * width), (2.4, 2.4), color=ORANGE, linestyle="--", linewidth=1.2)
    say(axis, 13 * width, 2.1, "activations of a plain step: of all chunks", ORANGE, 9, ha="right")
    say(axis, -0.2, 0.6, "time", ha="right")
    say(axis, -0.2, 5.2, "memory", ha="right")
    say(axis, 6.5 * width, 6.9, "grey: embeddings and their gradients", "#777777", 8)


def distributed() -> None:
    axes = panels(2, 4.4)
    frame(axes[0], "rows travel round a ring", (-2.0, 2.0), (-1.8, 1.8), "a process holds its own and one visitor")
    for k in range(4):
        angle = math.radians(90 * k - 90)
        x, y = 1.25 * math.cos(angle), 1.25 * math.sin(angle)
        axes[0].add_patch(Circle((x, y), 0.42, facecolor=PROCESSES[k], edgecolor="white"))
        say(axes[0], x, y, f"rank {k}", "white" if k != 3 else INK)
        start, end = math.radians(90 * k - 65), math.radians(90 * k - 25)
        one, other = ((1.25 * math.cos(a), 1.25 * math.sin(a)) for a in (start, end))
        arrow(axes[0], one, other, bend=-0.2)
    frame(axes[1], "and each block is met once", (-1.7, 4.3), (-1.0, 4.2), "colour: the process that computes it")
    for i in range(4):
        say(axes[1], -0.15, i + 0.5, f"rows of {i}", size=8, ha="right")
        say(axes[1], i + 0.5, -0.3, f"of {i}", size=8)
        for j in range(4):
            box(axes[1], j, i, face=PROCESSES[i])
            visit = (i - j) % 4
            text = "own" if visit == 0 else f"visit {visit}"
            say(axes[1], j + 0.5, i + 0.5, text, "white" if i != 3 else INK, 8)


PICTURES: dict[str, Callable[[], None]] = {
    draw.__name__: draw
    for draw in (
        contrastive,
        sigmoid,
        correlation,
        distillation,
        neighbours,
        linear_cross_entropy,
        tokens,
        masking,
        ema,
        memory_bank,
        grad_cache,
        distributed,
    )
}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        with matplotlib.rc_context({"svg.hashsalt": name, "font.family": "DejaVu Sans"}):
            draw()
            pyplot.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            pyplot.close()


if __name__ == "__main__":
    matplotlib.use("Agg")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
