"""Tries every case, in processes that may die, and prints what is wrong, one line for each kind and argument.

python -m tests.fuzz [--only nt_xent] [--processes 2] [--every 1]
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.verdict import SECONDS, Case, Finding, cases, judge

ROOT = Path(__file__).parents[2]
BATCH = 1500
MEMORY = 6 << 30  # bytes that a process may ask for, in all


def chosen(only: str, every: int) -> list[Case]:
    return [case for i, case in enumerate(cases()) if only in str(case) and i % every == 0]


def _work(first: int, last: int, only: str, every: int) -> None:
    """Prints the number of each case before it runs, and its verdict after."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for i, case in list(enumerate(chosen(only, every)))[first:last]:
        print(json.dumps([i, "began", ""]), flush=True)
        verdict = judge(case)
        told = (verdict.kind, verdict.text) if isinstance(verdict, Finding) else (verdict, "")
        print(json.dumps([i, *told]), flush=True)


def run(first: int, last: int, only: str, every: int) -> dict[int, tuple[str, str]]:
    """The verdicts on a range of cases: where the process ends early, that is one, and another goes on."""
    verdicts: dict[int, tuple[str, str]] = {}
    while first < last:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--range", f"{first}:{last}"]
        process = subprocess.run(
            [*command, "--only", only, "--every", str(every)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=60 + SECONDS * (last - first),
        )  # fmt: skip
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[")]
        verdicts |= {i: (kind, text) for i, kind, text in lines}
        if not lines:
            raise RuntimeError(process.stderr)
        last_seen, kind, _ = lines[-1]
        if kind == "began":
            verdicts[last_seen] = ("crash", f"exit status {process.returncode}: {process.stderr[-300:]!r}")
        first = last_seen + 1
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the name of a case")
    parser.add_argument("--every", type=int, default=1, help="each case of so many")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--range", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.range:
        _work(*map(int, options.range.split(":")), options.only, options.every)
        return 0
    everything = chosen(options.only, options.every)
    ranges = [(i, min(i + BATCH, len(everything))) for i in range(0, len(everything), BATCH)]
    verdicts: dict[int, tuple[str, str]] = {}
    with ThreadPoolExecutor(options.processes) as pool:
        for found in pool.map(lambda ends: run(*ends, options.only, options.every), ranges):
            verdicts |= found
    print(*collections.Counter(kind for kind, _ in verdicts.values()).most_common(), sep="\n")
    groups: dict[tuple[str, str, str, str], list[tuple[Case, str]]] = {}
    for i, (kind, text) in sorted(verdicts.items()):
        if kind not in ("result", "refused", "impossible"):
            case = everything[i]
            rule = text.split(", got ")[0].split("of type ")[0]
            general = re.sub(r"[-\d.e+]+|'[^']*'|\([^()]*\)|torch\.\w+", "_", rule)[:80]
            groups.setdefault((kind, case.call.name, case.argument, general), []).append((case, text))
    for (kind, name, argument, _), found in sorted(groups.items(), key=lambda item: item[0]):
        labels = ", ".join(case.label for case, _ in found[:8]) + (", ..." if len(found) > 8 else "")
        print(f"{kind:10} {name}({argument}=) {len(found)}x [{labels}]: {found[0][1][:220]}")
    return bool(groups)


if __name__ == "__main__":
    sys.exit(main())
