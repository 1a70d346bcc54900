"""Times operations case by case, each a line of JSON as soon as it is done: a time limit takes the rest alone. Needs
nothing but PyTorch; `python -m benchmarks.ops` shows more."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.ops import machine, measure, registry
from fastssl._meter import format_bytes, format_seconds


def _size(text: str) -> registry.Size:
    return tuple(map(int, text.split("x")))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="+", choices=registry.load())
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dtype", choices=registry.MODES, action="append", help="by default those of the device")
    parser.add_argument("--size", type=_size, action="append", help="by default those of the device")
    parser.add_argument("--against", choices=registry.BASELINES, action="append", help="all by default")
    parser.add_argument("--largest", type=int, metavar="ROWS", help="look for the largest batch that fits, up to ROWS")
    parser.add_argument("--repeats", type=int, help="rounds; by default about 2 s for each contestant")
    parser.add_argument("--rates", type=Path, help="what benchmarks.gpu.rates has written; measured if it is not there")
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args(argv)
    machine.require(arguments.device)
    if arguments.rates and arguments.rates.exists():
        rates = machine.Rates(**json.loads(arguments.rates.read_text())["rates"])
    else:
        rates = machine.measure_rates(arguments.device)
    failed = False
    for name in arguments.op:
        cases = measure.cases(
            registry.BENCHMARKS[name], rates, arguments.device, modes=arguments.dtype, sizes=arguments.size,
            against=tuple(arguments.against or registry.BASELINES), repeats=arguments.repeats,
            largest=arguments.largest,
        )  # fmt: skip
        for r in cases:
            with arguments.results.open("a") as file:
                file.write(json.dumps({"kind": "speed", **asdict(r), "floor_fraction": r.floor_fraction}) + "\n")
            time = r.note if math.isnan(r.median) else format_seconds(r.median)
            memory = "" if math.isnan(r.extra_memory) else format_bytes(r.extra_memory)
            print(f"{r.op} {r.size} {r.mode} {r.contestant}: {time}, {memory}, error {r.error:.0e}", flush=True)
            failed |= bool(r.contestant == "fastssl" and r.note and not r.largest)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
