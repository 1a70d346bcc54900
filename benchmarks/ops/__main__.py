"""Time fastssl's operations against eager code, torch.compile, peer libraries, and the machine's own limits."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

import fastssl
from benchmarks.ops import machine, measure, registry, report


def _names(known: tuple[str, ...]):
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(filter(None, text.split(",")))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
        return names

    return parse


def _sizes(text: str) -> list[registry.Size]:
    try:
        return [tuple(map(int, size.split("x"))) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"sizes look like 512,8192x128, got {text}") from None


def _arguments(argv: list[str]) -> argparse.Namespace:
    known = sorted({name for b in registry.load().values() for name in (b.family, b.op, b.name)})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help=f"families or operations ({', '.join(known)}); all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", type=_names(tuple(registry.MODES)), help="by default those that the device is for")
    parser.add_argument("--sizes", type=_sizes, help="8192x512, or the first of its numbers: 64,8192x512")
    parser.add_argument(
        "--against", type=_names(registry.BASELINES), help='all by default, "chunked" (a compiled loop) on a GPU alone'
    )
    parser.add_argument("--largest", type=int, metavar="ROWS", help="look for the largest batch that fits, up to ROWS")
    parser.add_argument("--repeats", type=int, help="rounds; by default about 2 s for each contestant")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the CSV and the plot")
    parser.add_argument("--markdown", action="store_true", help="also write the tables as Markdown")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.family) - set(known):
        parser.error(f"family {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if arguments.against is None:
        on_gpu = arguments.device == "cuda"
        arguments.against = tuple(name for name in registry.BASELINES if on_gpu or name != "chunked")
    if arguments.repeats is not None and arguments.repeats < 2:
        parser.error(f"--repeats must be at least 2, for quartiles, got {arguments.repeats}")
    for op, benchmark in registry.load(arguments.family).items():
        for size in arguments.sizes or ():
            if len(size) > len(benchmark.sizes[0]):
                parser.error(f"--sizes must have at most {len(benchmark.sizes[0])} numbers for {op}, got {size}")
    return arguments


def main(argv: list[str]) -> int:
    arguments = _arguments(argv)
    machine.require(arguments.device)
    console = Console()
    if not console.is_terminal:
        console.width = 180
    torch.set_float32_matmul_precision("highest")
    described = machine.describe(arguments.device) | {"fastssl": fastssl.__version__}
    with console.status("the machine's rates"):
        rates = machine.measure_rates(arguments.device)
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} python -m benchmarks.ops {shlex.join(argv)}".strip()
    described["command"] = command
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for op, benchmark in registry.load(arguments.family).items():
        if arguments.device == "cuda" and not registry.tensors_of(benchmark.inputs(benchmark.sizes[0], torch.float32)):
            continue  # of numbers alone: on the CPU unless the caller asks for another device
        described["kernels"] = measure.kernel_of(op, arguments.device)
        results = list(
            measure.cases(
                benchmark, rates, arguments.device, modes=arguments.dtype, sizes=arguments.sizes,
                against=arguments.against, repeats=arguments.repeats, largest=arguments.largest, status=console.status,
            )
        )  # fmt: skip
        if not results:
            continue
        lines = report.preamble(op, benchmark.timed, described, rates, results, command)
        grids = {f"{op}: time": report.times(results)}
        if (grid := report.memory(results))[1]:
            how = "each in a process of its own" if arguments.device == "cpu" else "of the allocator"
            grids[f"{op}: peak extra memory, results included, inputs not; {how}"] = grid
        if (grid := report.largest(results))[1]:
            grids[f"{op}: largest batch that fits"] = grid
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
        for title, grid in grids.items():
            report.show(console, title, grid)
        report.write_csv(arguments.output / f"{op}.csv", results, described, rates)
        report.plot(arguments.output / f"{op}.png", results, lines[0], benchmark.timed)
        if arguments.markdown:
            text = "\n\n".join(lines) + "\n\n" + "\n".join(report.markdown(*item) for item in grids.items())
            (arguments.output / f"{op}.md").write_text(text)
        console.print(f"Written: {', '.join(str(p) for p in sorted(arguments.output.glob(f'{op}.*')))}\n")
        failed |= any(r.contestant == "fastssl" and r.note and not r.largest for r in results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
