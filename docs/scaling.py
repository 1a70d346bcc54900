"""A model of one training step of CLIP or SigLIP on P GPUs: what is computed, moved and sent, and what hides what.

    python docs/scaling.py [FILE]

prints the tables of scaling.md and draws scaling.svg. Products and bytes sent are counted as the code does them, and
tests/distributed/test_scaling.py compares them with what processes do. Times are estimates: nothing was measured.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

FLOAT32 = 4
NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Gpu:
    """Per GPU and second: FLOP of bfloat16 products, of which kernels reach `share`; bytes of memory, of NVLink and of
    the network in one direction."""

    name: str
    flops: float
    memory: float
    nvlink: float
    network: float
    share: float = 0.6


H100 = Gpu("H100", 800e12, 3.0e12, 340e9, 40e9)
A800 = Gpu("A800", 250e12, 1.6e12, 150e9, 20e9)


@dataclass(frozen=True)
class Pass:
    """What a process does at each of P visits of the ring, with b rows of its own and b visitors of D features."""

    products: int  # of b x D with D x b
    numbers: int  # float32 numbers of each visitor that travel with it
    luggage_rows: int  # rows of float32 that each visitor takes along
    luggage_numbers: int
    weights: int  # how often a b x b matrix of bfloat16 is written or read in the GPU's memory


# Forward, S; columns take their sums along. Backward, S again and a product for either side, for which the weights are
# written once and read twice; columns bring the gradient and the shift of their sums, and take their gradient along.
CLIP = Pass(1, 0, 0, 2, 0), Pass(3, 2, 1, 0, 3)
# Forward, S and a product for either side; texts take their gradient along. Backward multiplies.
SIGLIP = (Pass(3, 0, 1, 0, 3),)
LOSSES = {"clip_loss": CLIP, "siglip_loss": SIGLIP}


def flops(loss: str, rows: int, features: int, processes: int) -> int:
    """Of the products of one process, forward and backward, with `rows` rows on each."""
    return sum(one.products for one in LOSSES[loss]) * processes * 2 * rows * rows * features


def bytes_sent(loss: str, rows: int, features: int, processes: int, itemsize: int) -> int:
    """Around the ring by one process, forward and backward: visitors to all others, luggage home as well."""
    if processes == 1:
        return 0
    return sum(
        (processes - 1) * _visitors(one, rows, features, itemsize) + processes * _luggage(one, rows, features)
        for one in LOSSES[loss]
    )


def _visitors(one: Pass, rows: int, features: int, itemsize: int) -> int:
    return rows * (features * itemsize + one.numbers * FLOAT32)


def _luggage(one: Pass, rows: int, features: int) -> int:
    return rows * (one.luggage_rows * features + one.luggage_numbers) * FLOAT32


@dataclass(frozen=True)
class Step:
    """Seconds of one process: of the loss in all; of products and of memory, whichever takes longer at each visit; of
    what is sent and nothing hides."""

    loss: float
    compute: float
    exposed: float
    memory: float  # bytes of features, gradients and workspace


def step(gpu: Gpu, loss: str, batch: int, features: int, processes: int, itemsize: int = 2) -> Step:
    """The next visitors travel during a visit; luggage travels between visits."""
    rows = batch // processes
    link = math.inf if processes == 1 else gpu.nvlink if processes <= NODE else gpu.network  # the ring's slowest
    compute = exposed = 0.0
    for one in LOSSES[loss]:
        products = one.products * 2 * rows * rows * features / (gpu.share * gpu.flops)
        moved = one.weights * rows * rows * 2 + 6 * rows * features * itemsize
        visit = max(products, moved / gpu.memory)
        travelling = _visitors(one, rows, features, itemsize) / link
        compute += processes * visit
        exposed += (processes - 1) * max(0.0, travelling - visit) + processes * _luggage(one, rows, features) / link
    # Both sides, two sets of visitors, gradients of both sides and two sets of luggage in float32; the weights' block.
    memory = rows * features * (4 * itemsize + 4 * FLOAT32) + (256 << 20)
    return Step(compute + exposed, compute, exposed, memory)


def hides_from(gpu: Gpu, loss: str, link: float, itemsize: int = 2) -> int:
    """The rows for each process from which a visit takes longer than the way of the next visitors, in every pass."""
    rate = gpu.share * gpu.flops
    return max(math.ceil(itemsize * rate / (2 * one.products * link)) for one in LOSSES[loss])


ENCODER = 14.8e9  # FLOP of a pair's forward pass, image and text: ViT-B/32
PASSES = 4  # with grad_cache: forward without a graph, forward again, backward twice as dear
UTILISATION = 0.4


def encoder_seconds(gpu: Gpu, batch: int, processes: int) -> float:
    return PASSES * ENCODER * batch / processes / (UTILISATION * gpu.flops)


FEATURES = 512
PLACES = (H100, 8), (H100, 64), (H100, 256), (A800, 8), (A800, 32)
BATCHES = 1 << 15, 1 << 18, 1 << 20, 1 << 22


def tables() -> list[str]:
    """Of Markdown, under a line that says what each is."""
    lines = [
        f"The loss of CLIP at {FEATURES} features in bfloat16, and the encoders beside it (ViT-B/32, grad_cache):",
        "",
    ]
    lines += ["| GPUs | batch | loss | of it not hidden | encoders | memory of the loss |", "| --- " * 6 + "|"]
    for gpu, processes in PLACES:
        for batch in BATCHES:
            s = step(gpu, "clip_loss", batch, FEATURES, processes)
            lines.append(
                f"| {processes} x {gpu.name} | {batch:,} | {_time(s.loss)} | {s.exposed / s.loss:.0%} | "
                f"{_time(encoder_seconds(gpu, batch, processes))} | {s.memory / 2**30:.2f} GiB |"
            )
    lines += ["", "Rows for each process from which the visitors' way is hidden:", ""]
    lines += ["| GPU | loss | NVLink | network |", "| --- " * 4 + "|"]
    for gpu in (H100, A800):
        for loss in LOSSES:
            hidden = (f"{hides_from(gpu, loss, link):,}" for link in (gpu.nvlink, gpu.network))
            lines.append(f"| {gpu.name} | `{loss}` | {' | '.join(hidden)} |")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = [2**i for i in range(14, 23)]
    with matplotlib.rc_context({"svg.hashsalt": "fastssl", "font.family": "DejaVu Sans"}):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for gpu, processes in PLACES:
            steps = [step(gpu, "clip_loss", batch, FEATURES, processes) for batch in batches]
            label = f"{processes} x {gpu.name}"
            axes[0].loglog(batches, [s.loss for s in steps], marker="o", markersize=3, label=label)
            axes[1].semilogx(batches, [100 * s.exposed / s.loss for s in steps], marker="o", markersize=3, label=label)
        axes[0].set(title="CLIP's loss, forward + backward: an estimate", xlabel="batch", ylabel="seconds")
        axes[1].set(title="of it, sending that nothing hides", xlabel="batch", ylabel="%", ylim=(0, 100))
        for axis in axes:
            axis.set_xticks([2**i for i in range(14, 23, 2)], ["16 Ki", "64 Ki", "256 Ki", "1 Mi", "4 Mi"])
            axis.minorticks_off()
            axis.grid(alpha=0.4)
            axis.legend(fontsize=8, frameon=False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    print("\n".join(tables()))
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
