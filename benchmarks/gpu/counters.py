"""What Nsight Compute counts for each kernel of a step, and how its table is read."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from typing import Any

TIME = "gpu__time_duration.sum"
_SHARES = {
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",  # of wgmma and mma alike
    "XU": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",  # exponentials
}
_BYTES = {"L2": ("lts__t_bytes.sum",), "DRAM": ("dram__bytes_read.sum", "dram__bytes_write.sum")}
METRICS = (TIME, *_SHARES.values(), *(name for names in _BYTES.values() for name in names))


def read(lines: Iterable[str]) -> list[dict[str, Any]]:
    """A dictionary for each kernel, with its launches, nanoseconds, bytes, and percentages of its time, of a table
    (`--csv --print-units base`) with a line for each metric of each launch, which messages surround."""
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    launches: dict[tuple[str, str], dict[str, float]] = {}
    for row in table:
        launch = launches.setdefault((row["Kernel Name"], row["ID"]), dict.fromkeys(METRICS, math.nan))
        launch[row["Metric Name"]] = _number(row["Metric Value"])
    kernels: dict[str, list[dict[str, float]]] = {}
    for (kernel, _), launch in launches.items():
        kernels.setdefault(kernel, []).append(launch)
    return [{"kernel": kernel, "launches": len(of), **_summary(of)} for kernel, of in kernels.items()]


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.nan  # n/a


def _summary(launches: list[dict[str, float]]) -> dict[str, float]:
    time = sum(launch[TIME] for launch in launches)
    shares = {
        name: sum(launch[metric] * launch[TIME] for launch in launches) / (time or math.nan)
        for name, metric in _SHARES.items()
    }
    moved = {name: sum(launch[m] for launch in launches for m in metrics) for name, metrics in _BYTES.items()}
    return {"nanoseconds": time, **shares, **moved}
