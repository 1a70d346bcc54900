"""Compiles specialisations of Triton kernels for GPUs that need not be there, and reads what they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastssl.kernels.common import launch

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
PRECISIONS = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Of products, and of the rows that they are made of.
DTYPES = [
    ("float32", "fp32"),
    ("tf32", "fp32"),
    ("bfloat16", "bf16"),
    ("bfloat16", "fp32"),
    ("float16", "fp16"),
    ("float16", "fp32"),
]
# Precisions of products that are compiled where no sweep is wanted; Hopper's bfloat16 in every variant.
_SELECTED = {80: ("float32", "bfloat16"), 90: ("bfloat16", "tf32"), 100: ("float16", "tf32"), 120: ("tf32",)}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_SHOWN = ("T", "TILES", "D", "BM", "BN", "BK", "BR", "BD", "NORMALIZE")


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel, and what its launcher passes: `pointers` to the dtypes (those called "rows" and "product" are the
    case's), floating-point `numbers`, and `multiples` of 16. What is not listed is an integer. `needs` is what
    `launch.autotune` was given."""

    function: Any
    pointers: Mapping[str, str]
    numbers: Sequence[str] = ()
    multiples: Sequence[str] = ()
    needs: Callable[..., int | None] | None = None

    @property
    def jit(self) -> Any:
        return self.function.fn if self.needs else self.function

    def suited(self, capability: int, precision: str, **arguments: Any) -> list[triton.Config]:
        """The configurations that autotuning would try on a device of this capability."""
        named = {"left": torch.empty(0, dtype=launch.DTYPES[precision]), **arguments}
        return launch.suited(self.needs, self.function.configs, named, capability, SHARED_MEMORY[capability])


@dataclass(frozen=True)
class Case:
    """A specialisation: `kernel` with `constants`, for inputs of `rows` dtype and products of `precision`."""

    kernel: Kernel
    variant: str
    capability: int
    precision: str
    rows: str
    constants: tuple[tuple[str, Any], ...]
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        constants = "-".join(f"{name}{value}" for name, value in self.constants if name in _SHOWN)
        problem = f"sm{self.capability}-{self.kernel.jit.__name__}-{self.variant}-{self.precision}-{self.rows}"
        return f"{problem}-{constants}-w{self.warps}-s{self.stages}"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses, in bytes, and the PTX it came from."""

    stack: int
    local: int
    shared: int
    spills: str
    ptx: str


def product_cases(
    kernel: Kernel,
    variants: Mapping[str, Mapping[str, Any]],
    capability: int,
    sweep: bool,
    shapes: Sequence[Mapping[str, int]] = ({},),
    float32_shapes: Sequence[Mapping[str, int]] | None = None,
    largest: str | None = None,
) -> Iterator[Case]:
    """Of an autotuned kernel that multiplies: each of the `variants`, sets of constants, in each of the `shapes`, which
    are more constants (float32, which has no tensor cores, may have fewer), with each configuration that suits the
    card. Without `sweep` only the first configuration, in the last shape; and but for Hopper's bfloat16 only of the
    `largest` variant, for the precisions that differ most."""
    for precision in PRECISIONS if sweep else _SELECTED[capability]:
        in_shapes = shapes if precision != "float32" or float32_shapes is None else float32_shapes
        for shape in in_shapes if sweep else in_shapes[-1:]:
            for variant, constants in variants.items():
                if not (sweep or (capability, precision) == (90, "bfloat16") or variant == largest):
                    continue
                constants = {**shape, **constants, "PRECISION": launch.input_precision(precision)}
                configs = kernel.suited(capability, precision, **constants)
                assert configs, f"no configuration of {kernel.jit.__name__} suits sm_{capability}: {variant} {shape}"
                for config in configs if sweep else configs[:1]:
                    items = tuple({**constants, **config.kwargs}.items())
                    rows = PRECISIONS[precision]
                    yield Case(kernel, variant, capability, precision, rows, items, config.num_warps, config.num_stages)


def compile_case(case: Case, count_spills: bool = False) -> Usage:
    """Compile, and read the resources from the cubin; `count_spills` asks the assembler as well."""
    kernel, jit = case.kernel, case.kernel.jit
    constants = dict(case.constants)
    for stride in jit.arg_names:
        if "column_stride" in stride:
            constants[stride] = 1  # contiguous rows
    of_the_case = {"rows": case.rows, "product": PRECISIONS[case.precision]}
    pointers = {name: "*" + of_the_case.get(dtype, dtype) for name, dtype in kernel.pointers.items()}
    signature, attributes = {}, {}
    for index, name in enumerate(jit.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name) or ("fp32" if name in kernel.numbers else "i32")
            if name in pointers or name in kernel.multiples:
                attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(jit, signature, constants, attributes),
        target=GPUTarget("cuda", case.capability, 32),
        options={"num_warps": case.warps, "num_stages": case.stages, **launch.OPTIONS},
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
