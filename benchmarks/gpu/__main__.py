"""Brings a machine up, stage by stage, each bounded in time and none of them stopped by another's failure.

    python -m benchmarks.gpu [STAGE ...] --device cuda --out DIR

Offline, with the Python, PyTorch, Triton and CUDA that are there. DIR gets a file for each stage, a log of everything
and a report; stages that ran into the same folder at other times are in the report, too. On a CPU everything runs at
toy sizes: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import commands, report
from benchmarks.gpu.stages import SECONDS, STAGES, build, results_in


def run_stage(name: str, device: str, out: Path, seconds: float = SECONDS) -> None:
    """Runs its commands one after the other, and writes what became of them after each."""
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    stage = {"device": device, "started": started, "commands": [], "results": []}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch, (out / "log.txt").open("a") as log:
        log.write(f"\n===== {name}, --device {device}, {started} =====\n")
        for command in [*build(device), *STAGES[name](device, Path(scratch))]:
            print(f"{name}: {command.name} ...", end=" ", flush=True)
            done = commands.run(command, log, end - time.monotonic())
            print(done["note"] or f"ended with {done['returncode']}", f"({done['seconds']:.0f} s)", flush=True)
            stage["commands"].append(done)
            stage["results"] = results_in(Path(scratch))
            (out / f"{name}.json").write_text(json.dumps(stage, indent=1))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stage", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all by default; report: none"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="at most 8 files are written there")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each stage")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.stage) - {*STAGES, "report"}:
        parser.error(f"stage {', '.join(sorted(unknown))} is none of {', '.join(STAGES)}, report")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.stage or STAGES:
        if name != "report":
            run_stage(name, arguments.device, arguments.out, arguments.seconds)
    stages = report.read(arguments.out)
    text = report.render(stages)
    (arguments.out / "report.md").write_text(text)
    print(text)
    return int(bool(report.failures(stages)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
