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
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import commands, report
from benchmarks.gpu.stages import SECONDS, STAGES, build, results_in


def run_stage(name: str, device: str, out: Path, stages: report.Stages, seconds: float = SECONDS) -> None:
    """Runs its commands one after the other. What became of them is in `stages`, and written, after each; what is
    running when this process ends counts as cut off."""
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    stages[name] = stage = {"device": device, "started": started, "commands": [], "results": []}
    end = time.monotonic() + seconds
    commands.note(out / "log.txt", f"\n===== {name}, --device {device}, {started} =====\n")
    with tempfile.TemporaryDirectory() as scratch:
        for command in [*build(device), *STAGES[name](device, Path(scratch))]:
            print(f"{name}: {command.name} ...", end=" ", flush=True)
            stage["commands"].append(commands.unfinished(command))
            _write(out / f"{name}.json", json.dumps(stage, indent=1))
            try:
                stage["commands"][-1] = done = commands.run(command, out / "log.txt", end - time.monotonic())
            finally:
                stage["results"] = results_in(Path(scratch))
                _write(out / f"{name}.json", json.dumps(stage, indent=1))
            print(done["note"] or f"ended with {done['returncode']}", f"({done['seconds']:.0f} s)", flush=True)


def _write(path: Path, text: str) -> None:
    """The whole of it or, on a full disk, nothing: what was there remains."""
    new = path.with_name("unfinished")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError as error:
        print(f"not written: {error}", flush=True)
        new.unlink(missing_ok=True)


def _arguments(argv: list[str]) -> argparse.Namespace:
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
    return arguments


def main(argv: list[str]) -> int:
    arguments = _arguments(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stages = report.read(arguments.out)
    try:
        for name in arguments.stage or STAGES:
            if name != "report":
                run_stage(name, arguments.device, arguments.out, stages, arguments.seconds)
    except KeyboardInterrupt:
        pass  # the report says what was cut off
    finally:
        text = report.render(stages)
        _write(arguments.out / "report.md", text)
        print(text)
    return int(bool(report.failures(stages)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what runs, and leaves a report
    sys.exit(main(sys.argv[1:]))
