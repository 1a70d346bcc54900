"""Commands in processes of their own, each with a time limit: what one does to itself or the GPU ends with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
_LINES = 40  # of the output's end, and of tests that failed before, that a report keeps


@dataclass(frozen=True)
class Command:
    """
    Attributes:
        name: what it is for.
        argv: the program and its arguments; a program that is not there is skipped, with a note.
        seconds: the limit.
        environment: variables, beside this process's.
    """

    name: str
    argv: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


def run(command: Command, log: IO[str], limit: float) -> dict[str, Any]:
    """Runs it within both limits, in seconds, and copies what it prints into the log. Returns what became of it:
    `returncode` None where it was not there, or was ended at its limit, with all the processes that it started."""
    limit = min(command.seconds, limit)
    result: dict[str, Any] = {"name": command.name, "command": " ".join(command.argv), "seconds": 0.0, "tail": []}
    result |= {"returncode": None, "missing": shutil.which(command.argv[0]) is None}
    if result["missing"]:
        return result | {"note": f"no {command.argv[0]} here"}
    if limit <= 0:
        return result | {"note": "not started: no time left"}
    log.write(f"\n$ {result['command']}\n")
    log.flush()
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command.argv, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            result |= {"returncode": process.wait(limit), "note": ""}
        except subprocess.TimeoutExpired:
            result["note"] = f"ended after {limit:.0f} s"
        finally:
            _end(process)
        output.seek(0)
        printed = output.read()
    log.write(printed)
    lines = printed.splitlines()
    failed = [line for line in lines[:-_LINES] if " FAILED " in line]
    return result | {"seconds": time.monotonic() - start, "tail": failed[:_LINES] + lines[-_LINES:]}


def _end(process: subprocess.Popen) -> None:
    """With what it started, which is in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
