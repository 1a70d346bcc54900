"""Train methods with fastssl's kernels and with naive ones, side by side: whether they agree, how fast, how small.

Every method is trained twice at once, from the same weights on the same batches, and compared (see agreement.py); its
loss is measured alone against other ways to compute it; batches grow until they exceed a budget of memory; its features
are tested against random weights and a supervised run. SimCLR is also timed over batch sizes. Everything goes into a
table, a CSV, plots and a report in HTML. The exit status is 1 if anything failed or twins disagreed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastssl
from benchmarks.ops import machine, measure, registry
from benchmarks.twins import figures, report
from benchmarks.twins.agreement import Watched, agreement
from benchmarks.twins.losses import loss_costs, masking_seconds
from benchmarks.twins.memory import largest_batch, training_step
from benchmarks.twins.results import GIB, Huge, Point, Result, Results, Timing, Writer, step_ratio
from fastssl.train import METHODS, Method, Run, Step, create, fit, twins
from fastssl.train.cli import RunParser, positive_float, positive_int, run
from fastssl.train.networks.vit import ViT

PROGRAM = "python -m benchmarks.twins"
TWINS = [name for name in METHODS if name != "supervised"]
SWEEP = "simclr"
SWEEP_SIZES = (256, 512, 1024, 2048, 4096, 8192)
SWEEP_EXAMPLES = 25_600  # timed at each size, in at least two steps
CHUNK_SIZE = 256


class Bench:
    """A run over methods, which share data sets, the marks of random weights, and supervised runs."""

    def __init__(self, batch_size: int, steps: int, seed: int, data: str | None, console: Console) -> None:
        self.batch_size, self.steps, self.seed, self.source, self.console = batch_size, steps, seed, data, console
        self.other_processes_cores = 0.0  # the most that kept cores busy while a method was trained
        self._data: dict[Callable[..., Any], Any] = {}
        self._untrained: dict[tuple[Any, ...], dict[str, float]] = {}
        self._supervised: dict[type, dict[str, float]] = {}

    def data(self, name: str) -> Any:
        load = METHODS[name].load
        if load not in self._data:
            self._data[load] = load(self.source)
        return self._data[load]

    def new(self, name: str, steps: int, **options: Any) -> Method:
        torch.manual_seed(self.seed)
        return create(name, steps, self.data(name), **options)

    def fit(self, methods: dict[str, Method], data: Any, steps: int, batch_size: int) -> dict[str, list[Step]]:
        with machine.OtherProcesses() as others:
            history = fit(methods, data, Run(batch_size=batch_size, steps=steps, seed=self.seed), console=self.console)
        self.other_processes_cores = max(self.other_processes_cores, others.cores)
        return history

    def compare(self, name: str, budget: float, largest: int) -> Result:
        """Train a method both ways, and measure everything."""
        dataset, both = self.data(name), twins(self.new(name, self.steps))
        untrained = self.untrained(name, both["naive"], dataset)
        data = Watched(METHODS[name].training_data(dataset), both["fastssl"], self.steps)
        history = self.fit(both, data, self.steps, self.batch_size)
        views = both["naive"].views(data.data[torch.arange(self.batch_size)], torch.Generator().manual_seed(self.seed))
        marks = {impl: method.evaluate(dataset) for impl, method in both.items()}
        marks |= {"random": untrained, "supervised": self.supervised(name, both["naive"], dataset)}
        leaves = [z.detach().requires_grad_(z.requires_grad) for z in both["fastssl"](*views)]
        memory = {impl: largest_batch(name, method, leaves, budget, largest) for impl, method in both.items()}
        return Result(
            name,
            dataset.name,
            self.batch_size,
            {impl: [step.loss for step in steps] for impl, steps in history.items()},
            {impl: Timing.of(steps) for impl, steps in history.items()},
            step_ratio(history),
            agreement(data.found, history),
            {test: {who: its[test] for who, its in marks.items() if test in its} for test in _union(marks.values())},
            masking_seconds(both["fastssl"], views),
            loss_costs(both["fastssl"], leaves),
            {impl: found for impl, (found, _) in memory.items()},
            min(limit for _, limit in memory.values()),
        )

    def untrained(self, name: str, method: Method, dataset: Any) -> dict[str, float]:
        """What random weights are worth. A constructor makes the encoder first, so methods begin with the same ones."""
        key = METHODS[name].evaluate, *((part, x.shape) for part, x in method.encoder.state_dict().items())
        if key not in self._untrained:
            self._untrained[key] = method.evaluate(dataset)
        return self._untrained[key]

    def supervised(self, name: str, method: Method, dataset: Any) -> dict[str, float]:
        """What the same encoder is worth when it is trained with labels for as many steps; empty without labels."""
        encoder = type(method.encoder)
        if METHODS[name].load is not Method.load or dataset.train_labels is None:
            return {}
        if encoder not in self._supervised:
            other = self.new("supervised", self.steps, vit=encoder is ViT)
            self.fit({"supervised": other}, other.training_data(dataset), self.steps, self.batch_size)
            self._supervised[encoder] = other.evaluate(dataset)
        return self._supervised[encoder]

    def point(self, name: str, batch_size: int) -> Point:
        """A few steps both ways. The first pays for the optimiser's state, the second measures memory."""
        steps = 2 + max(2, SWEEP_EXAMPLES // batch_size)
        data = METHODS[name].training_data(self.data(name))
        history = self.fit(twins(self.new(name, steps)), data, steps, batch_size)
        timing = {impl: Timing.of(done) for impl, done in history.items()}
        return Point(name, batch_size, timing, step_ratio(history))

    def huge(self, name: str, batch_size: int) -> Huge:
        command, memory, limits = {}, {}, []
        for impl in ("fastssl", "naive"):
            command[impl] = (
                f"python -m fastssl.train {name} --batch-size {batch_size} --chunk-size {CHUNK_SIZE} --steps 2 "
                f"--impl {impl}"
            )
            memory[impl], limit = training_step(name, impl, batch_size, CHUNK_SIZE, self.source, self.seed)
            limits.append(limit)
        return Huge(name, command, memory, min(limits))


def _union(dictionaries: Iterable[dict[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(key for dictionary in dictionaries for key in dictionary)


def _batch_sizes(text: str) -> list[int]:
    return [positive_int(size) for size in text.split(",")]


def _arguments() -> Any:
    parser = RunParser(PROGRAM, __doc__.partition("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(TWINS)}; all by default")
    parser.add_argument("--steps", type=positive_int, default=200, help="of each method (default: %(default)s)")
    parser.add_argument(
        "--memory-budget", type=positive_float, default=2.0, metavar="GIB", help="for batches (default: %(default)s)"
    )
    parser.add_argument(
        "--largest-batch",
        type=positive_int,
        default=16384,
        help="on which memory is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--sweep",
        type=_batch_sizes,
        default=list(SWEEP_SIZES),
        metavar="SIZES",
        help=f"batch sizes at which {SWEEP} is timed (default: {','.join(map(str, SWEEP_SIZES))})",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="folder of CSV, plots and report (default: %(default)s)"
    )
    parser.set_defaults(batch_size=256)
    args = parser.parse_args()
    if unknown := set(args.methods) - set(TWINS):
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(TWINS)}")
    return args


def main() -> None:
    args = _arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} {PROGRAM} {shlex.join(sys.argv[1:])}"
    registry.load()
    described = machine.describe() | {"fastssl": fastssl.__version__, "kernels": measure.kernel_of("nt_xent")}
    results = Results(command.strip(), described, args.steps, args.seed, args.memory_budget * GIB)
    writer = Writer(args.output / "twins.csv")
    bench = Bench(args.batch_size, args.steps, args.seed, args.data, console)

    def add(found: list[Any], label: str, function: Callable[..., Any], *arguments: Any) -> None:
        console.print(label)
        try:
            found.append(function(*arguments))
            writer.add(found[-1])
        except Exception as error:
            results.failures[label] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            console.print(f"{label} failed: {results.failures[label]}", highlight=False, markup=False)

    methods = args.methods or TWINS
    for name in methods:
        add(results.methods, name, bench.compare, name, results.budget, args.largest_batch)
    if SWEEP in methods:
        for size in args.sweep:
            add(results.sweep, f"{SWEEP}, batches of {size}", bench.point, SWEEP, size)
        add(results.huge, f"{SWEEP}, a batch of {args.largest_batch}", bench.huge, SWEEP, args.largest_batch)
    results.other_processes_cores = bench.other_processes_cores
    plots = figures.draw(results, args.output)
    report.write(results, plots, args.output / "twins.html")
    Console(width=None if sys.stdout.isatty() else 220).print(report.terminal_table(results))
    console.print(f"Written: {', '.join(str(path) for path in sorted(args.output.glob('twins*')))}")
    if results.complaints:
        sys.exit("\n".join(results.complaints))


if __name__ == "__main__":
    run(main)
