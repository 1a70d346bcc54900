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

from fastssl.kernels import contrastive as kernels

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
PRECISIONS = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_MULTIPLES_OF_16 = ("PADDED", "padded_rows", "D")
_TUNED = {
    "_forward_tile": kernels._forward_needs,
    "_backward_narrow": kernels._narrow_needs,
    "_backward_wide": kernels._wide_needs,
}


@dataclass(frozen=True)
class Case:
    """A specialisation: `kernel` with `constants`, for inputs of `rows` dtype and products of `precision`."""

    kernel: str
    capability: int
    precision: str
    rows: str
    constants: tuple[tuple[str, Any], ...]
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        constants = "-".join(f"{name}{value}" for name, value in self.constants if name != "PRECISION")
        problem = f"sm{self.capability}-{self.kernel}-{self.precision}-{self.rows}"
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
    named = {"z": torch.empty(0, dtype=kernels._DTYPES[precision]), **arguments}
    configs = getattr(kernels, kernel).configs
    return kernels._suited(_TUNED[kernel], configs, named, capability, SHARED_MEMORY[capability])


def product_cases(capability: int, precision: str) -> Iterator[Case]:
    """The kernels that multiply. D is a runtime argument of the wide ones: one specialisation serves every D."""
    input_precision = kernels._input_precision(precision)
    problems: list[tuple[str, dict[str, int]]] = [("_forward_tile", {"T": 64}), ("_backward_wide", {})]
    if precision != "float32":
        problems += [("_forward_tile", {"T": 128}), ("_backward_narrow", {"D": 64}), ("_backward_narrow", {"D": 128})]
    for kernel, problem in problems:
        constants = {**problem, "PRECISION": input_precision}
        for config in suited(kernel, capability, precision, **constants):
            items = tuple({**constants, **config.kwargs}.items())
            yield Case(kernel, capability, precision, PRECISIONS[precision], items, config.num_warps, config.num_stages)


def row_cases(capability: int, dims: tuple[int, ...] = (64, 128, 256, 512, 768, 1024)) -> Iterator[Case]:
    """The kernels over rows, one for each width that `dims` need, and the merging of slots."""
    blocks = {tuple(kernels._row_block(dim).items()) for dim in dims}
    dtypes = [("float32", "fp32"), ("bfloat16", "bf16"), ("bfloat16", "fp32"), ("float16", "fp16"), ("float16", "fp32")]
    for block, normalize, (precision, rows) in itertools.product(sorted(blocks), (True, False), dtypes):
        for kernel in ("_prepare", "_project"):
            yield Case(kernel, capability, precision, rows, (("NORMALIZE", normalize), *block))
    yield Case("_merge", capability, "float32", "fp32", (("SLOTS", 2 * kernels._BAND), ("BR", 16)))


def compile_case(case: Case, count_spills: bool = False) -> Usage:
    """Compile, and read the resources from the cubin; `count_spills` asks the assembler as well."""
    kernel = getattr(kernels, case.kernel)
    kernel = getattr(kernel, "fn", kernel) if case.kernel in _TUNED else kernel
    constants = dict(case.constants)
    if "row_stride1" in kernel.arg_names:
        constants |= {"column_stride1": 1, "column_stride2": 1}  # contiguous rows
    types = {
        "z": PRECISIONS[case.precision],
        "inverse": "fp64",
        "dscale": "fp64",
        **dict.fromkeys(("z1", "z2", "dz1", "dz2"), case.rows),
        **dict.fromkeys(("scale", "tops", "sums", "aligned", "loss", "shift", "total"), "fp32"),
        **dict.fromkeys(("grad_loss", "peak", "gradient"), "fp32"),
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
        options={"num_warps": case.warps, "num_stages": case.stages, **kernels._OPTIONS},
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
