"""A training script with and without `fastssl.patch`: both losses, step times, memories and largest batches."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import fastssl

LIMIT = 4  # GiB, for the largest batch


def compare(
    peer: str, train: Callable[[argparse.Namespace], Iterator[float]], rounding: float, **defaults: int
) -> None:
    """Run the script that calls this twice more, each time in a process of its own, and print what came out.

    Args:
        peer: what to patch; several names are separated by spaces.
        train: imports the peer, and yields the loss of each step; its only argument has `batch_size`, `steps`, `seed`
            `data` and the other options.
        rounding: how far the losses may be apart, relative to the larger one.
        defaults: of the options, all of them integers.

    Raises:
        SystemExit: with the exit status 1, if the losses are further apart.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    for name, value in {"batch_size": 256, "steps": 20, "seed": 0, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--data", help="what fastssl.train would be given; default: what it fetches")
    parser.add_argument("--largest", action="store_true", help=f"look for the largest batch in {LIMIT} GiB, too")
    parser.add_argument("--only", choices=["theirs", "ours"], help="run one of the two here, and print it as JSON")
    options = parser.parse_args()
    if options.only:
        if options.only == "ours":
            for name in peer.split():
                fastssl.patch(name)
        print(json.dumps(_measured(train(options))))
        return
    results = {name: _run(name) for name in ("theirs", "ours")}
    if None in results.values():
        sys.exit(1)
    theirs, ours = (result["losses"] for result in results.values())
    print(f"{peer}, batches of {options.batch_size}, {torch.get_num_threads()} threads\n\nstep    theirs      ours")
    for step in sorted({*range(0, len(theirs), max(1, len(theirs) // 10)), len(theirs) - 1}):
        print(f"{step + 1:4}{theirs[step]:10.5f}{ours[step]:10.5f}")
    apart = max(abs(a - b) / max(abs(a), abs(b)) for a, b in zip(theirs, ours, strict=True))
    print(f"\nlosses are at most {apart:.1e} apart, relative to the larger one; {rounding:.0e} is allowed")
    rows = {
        "seconds a step": [f"{result['seconds']:.3f}" for result in results.values()],
        "peak memory, GiB": [f"{result['gibibytes']:.2f}" for result in results.values()],
    }
    if options.largest:
        rows[f"largest batch in {LIMIT} GiB"] = [str(_largest(name, options.batch_size)) for name in results]
    print(f"\n{'':24}" + "".join(f"{name:>10}" for name in results))
    for label, cells in rows.items():
        print(f"{label:24}" + "".join(f"{cell:>10}" for cell in cells))
    sys.exit(apart > rounding)


def _measured(train: Iterator[float]) -> dict[str, float | list[float]]:
    losses, times = [], [time.perf_counter()]
    for loss in train:
        losses.append(loss)
        times.append(time.perf_counter())
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {
        "losses": losses,
        "seconds": statistics.median(steps[2:] or steps),  # the first ones allocate
        "gibibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _run(name: str, *options: str) -> dict | None:
    """What a process of its own prints last, None if it fails; that of an earlier option counts less."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", name, *options], stdout=subprocess.PIPE, text=True)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def _largest(name: str, batch_size: int) -> int | None:
    """By doubling, until a batch takes more, or fails: the data may have no more, and the system may stop it."""
    fits = None
    while (result := _run(name, "--steps", "2", "--batch-size", str(batch_size))) and result["gibibytes"] <= LIMIT:
        fits, batch_size = batch_size, 2 * batch_size
    return fits
