"""One table and a list of failures, from the files that the stages have left in a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastssl._meter import format_bytes, format_seconds

Stages = dict[str, dict[str, Any]]


def read(folder: Path) -> Stages:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def failures(stages: Stages) -> list[str]:
    """Every command and every test that failed, every call that was wrong, and every figure of fastssl's that is
    missing. A tool that is not installed is none."""
    found = []
    for name, stage in stages.items():
        for command in stage["commands"]:
            if command["returncode"] != 0 and not command["missing"]:
                why = command["note"] or f"exit status {command['returncode']}"
                found.append(f"{name}: {command['name']}: {why}{_last_words(command['tail'])}")
                found += (f"{name}: {line.strip()[:200]}" for line in _failed_tests(command["tail"]))
        for r in stage["results"]:
            if r["kind"] == "smoke" and r["note"]:
                found.append(f"{name}: {r['op']} {r['precision']} ({r['sample']}): {r['note']}")
            if r["kind"] == "speed" and r["contestant"] == "fastssl" and r["note"] and not r["largest"]:
                found.append(f"{name}: {r['op']} {r['size']} {r['mode']}: {r['note']}")
    return found


def _failed_tests(tail: list[str]) -> list[str]:
    """As pytest's summary has them, with the reason; or, where it was cut off, as they were run."""
    return [x for x in tail if x.startswith(("ERROR ", "FAILED "))] or [x for x in tail if " FAILED " in x]


def _last_words(tail: list[str]) -> str:
    lines = [line.strip() for line in tail if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []


def _speeds(results: list[dict[str, Any]]) -> list[str]:
    """A row for each case: fastssl's time, the ratio of each baseline's, share of the floor, memory, error."""
    cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for r in results:
        if r["kind"] == "speed" and not r["largest"]:
            cases.setdefault((r["op"], r["size"], r["mode"]), {})[r["contestant"]] = r
    names = list(dict.fromkeys(name for case in cases.values() for name in case if name != "fastssl"))
    rows = []
    for key, case in cases.items():
        ours = case["fastssl"]
        row = [*key, ours["note"] or format_seconds(ours["median"])]
        for name in names:
            other = case.get(name, {"note": " ", "median": math.nan})
            ratio = other["median"] / ours["median"]
            row.append(other["note"] if math.isnan(ratio) else f"{ratio:.2f}x")
        row += [_known(ours["floor_fraction"], "{:.0%}".format), _known(ours["extra_memory"], format_bytes)]
        rows.append([*row, f"{max(ours['value_error'], ours['gradient_error']):.0e}"])
    return _table(["op", "size", "precision", "time", *names, "of the floor", "memory", "error"], rows)


def _counters(results: list[dict[str, Any]]) -> list[str]:
    """A row for each kernel that Nsight Compute has looked at: how long two units were busy, and what memory moved."""
    rows = [
        [r["op"], r["size"], r["kernel"][:60], str(r["launches"]), _known(r["nanoseconds"] / 1e9, format_seconds),
         *(_known(r[name], "{:.0f}%".format) for name in ("tensor", "XU")),
         *(_known(r[name], format_bytes) for name in ("L2", "DRAM"))]
        for r in results if r["kind"] == "counter"
    ]  # fmt: skip
    return _table(["op", "size", "kernel", "launches", "time", "tensor cores", "XU", "L2", "DRAM"], rows)


def _known(number: float, form: Callable[[float], str]) -> str:
    return "" if math.isnan(number) else form(number)


def render(stages: Stages) -> str:
    """In Markdown."""
    results = [r for stage in stages.values() for r in stage["results"]]
    lines = ["# What ran", ""]
    for r in results:
        if r["kind"] == "machine":
            rates = r["rates"]
            products = "; ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, (rate, _) in rates["product"].items())
            lines += [f"{r.get('gpu', r['cpu'])}, PyTorch {r['torch']}, Python {r['python']}, {r['date']}. Measured: "
                      f"{products}; copy {rates['copy'] / 1e9:.0f} GB/s."]  # fmt: skip
            lines += [f"{key}: {r[key]}" for key in ("driver", "cuda", "triton") if r.get(key)]
    for name, stage in stages.items():
        lines += ["", f"**{name}** (--device {stage['device']}, {stage['started']})", ""]
        lines += [f"- {c['name']}: {c['note'] or ('ended with ' + str(c['returncode']))}, {c['seconds']:.0f} s"
                  f"{_last_words(c['tail'])}" for c in stage["commands"]]  # fmt: skip
        calls = sum(r["number"] for r in stage["results"] if r["kind"] == "calls")
        if calls:
            right = sum(r["kind"] == "smoke" and not r["note"] for r in stage["results"])
            lines += [f"- calls that were right: {right} of {calls}"]
    lines += ["", *_speeds(results), ""]
    largest = [r for r in results if r["kind"] == "speed" and r["largest"]]
    lines += [f"Largest batch of {r['op']} {r['mode']}, {r['contestant']}: {r['size']} ({r['note']})." for r in largest]
    kernels = [
        [r["op"], r["size"], r["kernel"][:60], str(r["calls"]), f"{r['milliseconds']:.3f} ms", f"{r['share']:.0%}"]
        for r in results
        if r["kind"] == "kernel"
    ]
    lines += ["", *_table(["op", "size", "kernel", "calls", "time", "share"], kernels), "", *_counters(results)]
    found = failures(stages)
    return "\n".join([*lines, "", f"## Failures: {len(found)}", "", *(f"- {line}" for line in found)]) + "\n"
