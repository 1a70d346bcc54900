"""One table and a list of failures, from the files that the stages have left in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastssl._meter import format_bytes, format_seconds

Stages = dict[str, dict[str, Any]]


def read(folder: Path) -> Stages:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def failures(stages: Stages) -> list[str]:
    """Every command that failed, every call that was wrong, and every figure of fastssl's that is missing. A tool that
    is not installed is none."""
    found = []
    for name, stage in stages.items():
        for command in stage["commands"]:
            if command["returncode"] != 0 and not command["missing"]:
                why = command["note"] or f"exit status {command['returncode']}"
                found.append(f"{name}: {command['name']}: {why}{_last_words(command['tail'])}")
        for r in stage["results"]:
            if r["kind"] == "smoke" and r["note"]:
                found.append(f"{name}: {r['op']} {r['precision']} ({r['sample']}): {r['note']}")
            if r["kind"] == "speed" and r["contestant"] == "fastssl" and r["note"] and r["largest"] == "0":
                found.append(f"{name}: {r['op']} {r['size']} {r['mode']}: {r['note']}")
    return found


def _last_words(tail: list[str]) -> str:
    lines = [line.strip() for line in tail if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []


def _speeds(results: list[dict[str, Any]]) -> list[str]:
    """A row for each case: fastssl's time, the ratio of each baseline's, share of the floor, memory, error."""
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for r in results:
        if r["kind"] == "speed" and r["largest"] == "0":
            cases.setdefault((r["op"], r["size"], r["mode"]), {})[r["contestant"]] = r
    names = list(dict.fromkeys(name for case in cases.values() for name in case if name != "fastssl"))
    rows = []
    for key, case in cases.items():
        ours = case["fastssl"]
        row = [*key, ours["note"] or format_seconds(float(ours["median"]))]
        for name in names:
            other = case.get(name, {"note": " ", "median": "nan"})
            ratio = float(other["median"]) / float(ours["median"])
            row.append(f"{ratio:.2f}x" if ratio == ratio else other["note"])
        error = max(float(ours["value_error"]), float(ours["gradient_error"]))
        memory = float(ours["extra_memory"])
        row += [
            f"{float(ours['floor_fraction']):.0%}",
            format_bytes(memory) if memory == memory else "",
            f"{error:.0e}",
        ]
        rows.append(row)
    return _table(["op", "size", "precision", "time", *names, "of the floor", "memory", "error"], rows)


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
    smoke = [r for r in results if r["kind"] == "smoke"]
    if smoke:
        lines += ["", f"Calls that were right: {sum(not r['note'] for r in smoke)} of {len(smoke)}."]
    lines += ["", *_speeds(results), ""]
    largest = [r for r in results if r["kind"] == "speed" and r["largest"] != "0"]
    lines += [f"Largest batch of {r['op']} {r['mode']}, {r['contestant']}: {r['size']} ({r['note']})." for r in largest]
    kernels = [
        [r["op"], r["size"], r["kernel"][:60], str(r["calls"]), f"{r['milliseconds']:.3f} ms", f"{r['share']:.0%}"]
        for r in results
        if r["kind"] == "kernel"
    ]
    lines += ["", *_table(["op", "size", "kernel", "calls", "time", "share"], kernels)]
    found = failures(stages)
    return "\n".join([*lines, "", f"## Failures: {len(found)}", "", *(f"- {line}" for line in found)]) + "\n"
