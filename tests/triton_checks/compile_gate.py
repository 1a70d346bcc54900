"""Compile one specialisation of a Triton kernel for a GPU that need not be there, and read what it uses."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastssl.kernels import _tiles, contrastive

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
PRECISIONS = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_MULTIPLES_OF_16 = ("PADDED", "padded_rows", "D")
_TUNED = {
    "_forward_tile": (contrastive._forward_tile, contrastive._forward_needs),
    "accumulate_narrow": (_tiles.accumulate_narrow, _tiles.narrow_needs),
    "accumulate_wide": (_tiles.accumulate_wide, _tiles.wide_needs),
}
_ROWS = {
    "prepare": _tiles.prepare,
    "collect": _tiles.collect,
    "_project": contrastive._project,
    "_merge": contrastive._merge,
}
# What a launcher does not pass. With `exclude` the variants compute more, so those without it are left out.
_NO_EXCLUDE = {"exclude": None}
_NO_COLUMNS = {"column_tops": None, "column_sums": None}
_NO_RUNNING = {"tops": None, "totals": None, "losses": None}
_NO_ROWS = {"row_shift": None, "row_factor": None}
_NO_FACTORS = {**_NO_ROWS, "column_shift": None, "column_factor": None, "peak": None}
SUMS = {
    "nt_xent": {"EXCLUDE": "partner", "SYMMETRIC": True, **_NO_EXCLUDE},
    "self": {"EXCLUDE": "diagonal", "SYMMETRIC": True, **_NO_EXCLUDE, "aligned": None},
    "pair": {"EXCLUDE": "row", "SYMMETRIC": False, "aligned": None},
    "rows": {"EXCLUDE": "row", "SYMMETRIC": False, "aligned": None, **_NO_COLUMNS},
}
PRODUCTS = {
    "nt_xent": {"WEIGHT": "both", "EXCLUDE": "partner", "bias": None, **_NO_EXCLUDE, **_NO_RUNNING},
    "self": {"WEIGHT": "both", "EXCLUDE": "diagonal", "bias": None, "aligned": None, **_NO_EXCLUDE, **_NO_RUNNING},
    "pair": {"WEIGHT": "both", "EXCLUDE": "row", "bias": None, "aligned": None, **_NO_RUNNING},
    "dy": {"WEIGHT": "column", "EXCLUDE": "column", "bias": None, "aligned": None, **_NO_ROWS, **_NO_RUNNING},
    "softmax": {"WEIGHT": "softmax", "EXCLUDE": "row", "bias": None, "aligned": None, "losses": None, **_NO_FACTORS},
    "sigmoid": {"WEIGHT": "sigmoid", "EXCLUDE": "row", "aligned": None, **_NO_FACTORS},
    "sigmoid_dy": {"WEIGHT": "sigmoid", "EXCLUDE": "column", "aligned": None, "losses": None, **_NO_FACTORS},
    "sigmoid_loss": {
        "WEIGHT": "sigmoid",
        "EXCLUDE": "row",
        "aligned": None,
        "gradient": None,
        "tops": None,
        "totals": None,
        **_NO_FACTORS,
    },
}
_COLLECTED = {
    "both": {"tops": None, "totals": None, "shift": None, "total": None},
    "softmax": {"scale": None, "peak": None, "share": None},
    "sigmoid": {"peak": None, "shift": None},
}


_SHOWN = ("T", "D", "BM", "BN", "BK", "BR", "BD", "NORMALIZE")


@dataclass(frozen=True)
class Case:
    """A specialisation: `kernel` with `constants`, for inputs of `rows` dtype and products of `precision`."""

    kernel: str
    variant: str
    capability: int
    precision: str
    rows: str
    constants: tuple[tuple[str, Any], ...]
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        constants = "-".join(f"{name}{value}" for name, value in self.constants if name in _SHOWN)
        problem = f"sm{self.capability}-{self.kernel}-{self.variant}-{self.precision}-{self.rows}"
        return f"{problem}-{constants}-w{self.warps}-s{self.stages}"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses, in bytes, and the PTX it came from."""

    stack: int
    local: int
    shared: int
    spills: str
    ptx: str


def suited(kernel: str, capability: int, precision: str, **arguments: Any) -> list[triton.Config]:
    """The configurations that autotuning would try on a device of this capability."""
    named = {"left": torch.empty(0, dtype=_tiles.DTYPES[precision]), **arguments}
    tuned, needs = _TUNED[kernel]
    return _tiles.suited(needs, tuned.configs, named, capability, SHARED_MEMORY[capability])


def product_cases(capability: int, precision: str) -> Iterator[Case]:
    """The kernels that multiply. D is a runtime argument of the wide ones: one specialisation serves every D."""
    input_precision = _tiles.input_precision(precision)
    short = precision != "float32"
    problems = [
        ("_forward_tile", name, {"T": t, **SUMS[name]}) for name in SUMS for t in ((64, 128) if short else (64,))
    ]
    problems += [("accumulate_wide", name, PRODUCTS[name]) for name in PRODUCTS]
    if short:
        problems += [("accumulate_narrow", name, {"D": d, **PRODUCTS[name]}) for name in PRODUCTS for d in (64, 128)]
    for kernel, name, problem in problems:
        constants = {**problem, "PRECISION": input_precision}
        for config in suited(kernel, capability, precision, **constants):
            items = tuple({**constants, **config.kwargs}.items())
            yield Case(
                kernel, name, capability, precision, PRECISIONS[precision], items, config.num_warps, config.num_stages
            )


def row_cases(capability: int, dims: tuple[int, ...] = (64, 128, 256, 512, 768, 1024)) -> Iterator[Case]:
    """The kernels over rows, one for each width that `dims` need, and the merging of slots."""
    blocks = {tuple(_tiles.row_block(dim).items()) for dim in dims}
    dtypes = [("float32", "fp32"), ("bfloat16", "bf16"), ("bfloat16", "fp32"), ("float16", "fp16"), ("float16", "fp32")]
    for block, (precision, rows) in itertools.product(sorted(blocks), dtypes):
        for normalize in (True, False):
            for kernel in ("prepare", "_project"):
                yield Case(kernel, "", capability, precision, rows, (("NORMALIZE", normalize), *block))
        for weight, absent in _COLLECTED.items():
            constants = (("WEIGHT", weight), *absent.items(), *block)
            yield Case("collect", weight, capability, precision, rows, constants, warps=8)
    for name, absent, slots in (("nt_xent", {}, 2), ("self", {"aligned": None, "loss": None}, 2),
                                ("pair", {"aligned": None, "loss": None}, 4)):  # fmt: skip
        constants = {"SYMMETRIC": slots == 2, "T": 64, "SLOTS": slots * contrastive._BAND, "BR": 16, **absent}
        yield Case("_merge", name, capability, "float32", "fp32", tuple(constants.items()))


def compile_case(case: Case, count_spills: bool = False) -> Usage:
    """Compile, and read the resources from the cubin; `count_spills` asks the assembler as well."""
    kernel = _TUNED[case.kernel][0].fn if case.kernel in _TUNED else _ROWS[case.kernel]
    constants = dict(case.constants)
    for stride in ("column_stride1", "column_stride2", "column_stride"):
        if stride in kernel.arg_names:
            constants[stride] = 1  # contiguous rows
    types = {
        "exclude": "i64",
        **dict.fromkeys(("inverse", "dscale", "share"), "fp64"),
        **dict.fromkeys(("z", "left", "right"), PRECISIONS[case.precision]),
        **dict.fromkeys(("z1", "z2", "dz1", "dz2", "x", "out"), case.rows),
        **dict.fromkeys(("scale", "bias", "aligned", "loss", "losses", "shift", "total", "coefficient"), "fp32"),
        **dict.fromkeys(("tops", "sums", "totals", "row_tops", "row_sums", "column_tops", "column_sums"), "fp32"),
        **dict.fromkeys(("row_shift", "row_factor", "column_shift", "column_factor", "peak", "gradient"), "fp32"),
    }
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else "*" + types[name] if name in types else "i32"
        padded = name in _MULTIPLES_OF_16 and (name != "D" or case.kernel in _TUNED)
        if signature[name].startswith("*") or (signature[name] == "i32" and padded):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.capability, 32),
        options={"num_warps": case.warps, "num_stages": case.stages, **_tiles.OPTIONS},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run(_TOOLS / "cuobjdump", "-res-usage", cubin)
        stack, local = map(int, re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
        spills = ""
        if count_spills:
            target = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)
            log = _run(get_ptxas(case.capability).path, "-v", f"-arch={target}", ptx, "-o", Path(folder, "again.cubin"))
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).group(0)
    return Usage(stack, local, compiled.metadata.shared, spills, compiled.asm["ptx"])


def _run(tool: str | Path, *arguments: Any) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
