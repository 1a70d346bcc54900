"""Commands in processes of their own, each with a time limit: what one does to itself or the GPU ends with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LINES = 40  # of the output's end, and of tests that failed before, that a report keeps
_COLUMNS = 400  # of a line


@dataclass(frozen=True)
class Command:
    """
    Attributes:
        name: what it is for.
        argv: the program and its arguments; a program that is not there is skipped, with a note.
        seconds: the limit.
        environment: variables, beside this process's.
        copy: a file for what it prints.
    """

    name: str
    argv: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    copy: Path | None = None


def python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


def run(command: Command, log: Path, limit: float) -> dict[str, Any]:
    """Runs it within both limits, in seconds; what it prints goes straight into the log. Returns what became of it:
    `returncode` None where it was not there, or was ended at its limit, with all the processes that it started."""
    limit = min(command.seconds, limit)
    result = unfinished(command) | {"missing": shutil.which(command.argv[0]) is None}
    if result["missing"]:
        return result | {"note": f"no {command.argv[0]} here"}
    if limit <= 0:
        return result | {"note": "not started: no time left"}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
    note(log, f"\n$ {result['command']}\n")
    with log.open("a+b") as output:
        begin = output.seek(0, os.SEEK_END)
        # A group, to be ended with all that it starts; not a session, which whoever ends this one would not find.
        process = subprocess.Popen(
            command.argv, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            result |= {"returncode": process.wait(limit), "note": ""}
        except subprocess.TimeoutExpired:
            result["note"] = f"ended after {limit:.0f} s"
        finally:
            _end(process)
        output.seek(begin)
        printed = output.read().decode(errors="replace")
    if command.copy:
        command.copy.write_text(printed)
    lines = [line[:_COLUMNS] for line in printed.splitlines()]
    failed = [line for line in lines[:-_LINES] if " FAILED " in line]
    return result | {"seconds": time.monotonic() - start, "tail": failed[:_LINES] + lines[-_LINES:]}


def unfinished(command: Command) -> dict[str, Any]:
    """What is known of it before it has ended."""
    result = {"name": command.name, "command": " ".join(command.argv), "seconds": 0.0, "tail": []}
    return result | {"returncode": None, "missing": False, "note": "cut off"}


def note(log: Path, text: str) -> None:
    try:
        with log.open("a") as file:
            file.write(text)
    except OSError:
        pass  # a full disk, of which the next command will speak


def _end(process: subprocess.Popen) -> None:
    """With what it started, which is in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass  # which the GPU's driver holds
