"""How kernels are launched: dtypes, sizes, options, and which configurations suit a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = 128  # rows are padded to a multiple of this, the height of the largest tile
PEAK = tl.constexpr(8192.0)  # the largest weight: well below float16's maximum, 65504, and far above its 6e-5
PROGRAMS = 256  # how many programs to aim for: row blocks times column splits
# With fused multiply-adds two kernels might round the same S differently, and two lanes that share a sum of products
# might round it differently.
OPTIONS = {"enable_fp_fusion": False}


def configs(*choices: tuple[dict[str, int], int, int]) -> list[triton.Config]:
    """Triton's configurations from (tile sizes, warps, stages)."""
    return [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in choices]


def suited(
    needs: Callable[..., int | None],
    configs: Sequence[triton.Config],
    named: dict[str, Any],
    capability: int,
    shared: int,
) -> list[triton.Config]:
    """Those of `configs` that suit a device: `needs` gives the bytes of shared memory of a tile, or None to refuse."""
    size = named["left"].element_size()
    suited = []
    for config in configs:
        choice = config.kwargs | {"warps": config.num_warps, "stages": config.num_stages}
        tiles = needs(choice, named, size, capability)
        if tiles is not None and tiles + 2048 <= shared:  # 2048 bytes for reductions across warps
            suited.append(config)
    return suited


def autotune(needs: Callable[..., int | None], key: list[str], configs: list[triton.Config]) -> Callable:
    """triton.autotune over those of `configs` that are `suited`, which keeps what it found on disk. Nothing is timed
    where one of them suits, nor while a graph is being captured: the first is taken, the best by arithmetic."""
    choice = True

    def prune(configs: list[triton.Config], named: dict[str, Any], **meta: Any) -> list[triton.Config]:
        nonlocal choice
        capability = driver.active.get_current_target().arch
        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
        found = suited(needs, configs, named | meta, capability, properties["max_shared_mem"])
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        choice = len(found) > 1 and not capturing
        return found if choice else found[:1]

    def time(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
        return driver.active.get_benchmarker()(call, quantiles=quantiles) if choice else [0.0] * len(quantiles)

    early = {"early_config_prune": prune}
    return triton.autotune(configs, key, prune_configs_by=early, do_bench=time, cache_results=True)


def suits_units(c: dict[str, int], named: dict[str, Any]) -> bool:
    """Whether BK suits the precision: without tensor cores (IEEE float32) a thread holds slices of both operands, so
    they must be thin."""
    return (c["BK"] == 16) == (named["PRECISION"] == "ieee")


def row_block(padded: int) -> dict[str, int]:
    """The tile of the kernels over rows: 1024 elements, with as few rows as possible."""
    width = min(triton.next_power_of_2(padded), 1024)
    return {"BR": 1024 // width, "BD": width}


def is_wide(dim: int, precision: str) -> bool:
    """Whether rows are too wide for registers; without tensor cores all are, as a thread would hold a whole row."""
    return dim > 128 or precision == "float32"


def input_precision(precision: str) -> str:
    """tl.dot's `input_precision`, which matters for float32 operands only."""
    return "ieee" if precision == "float32" else "tf32"
