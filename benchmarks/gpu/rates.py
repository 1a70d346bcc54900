"""Writes what the machine is, and its rates, as a line of JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.ops import machine


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args(argv)
    machine.require(arguments.device)
    rates = machine.measure_rates(arguments.device, small=arguments.device == "cpu")
    line = {"kind": "machine", **machine.describe(arguments.device), "rates": asdict(rates)}
    arguments.results.write_text(json.dumps(line) + "\n")
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
