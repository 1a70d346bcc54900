"""Compile one specialisation of a Triton kernel for a GPU that need not be there, and read what it uses."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastssl.kernels.common import accumulate, collect, launch
from fastssl.kernels.common import rows as row_kernels
from fastssl.kernels.contrastive import sums
from fastssl.kernels.correlation import columns, derivatives, dual, primal, products

# Modules that a function of theirs has replaced in their package.
nt_xent = import_module("fastssl.kernels.contrastive.nt_xent")
barlow_twins = import_module("fastssl.kernels.correlation.barlow_twins")
vicreg = import_module("fastssl.kernels.correlation.vicreg")

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
PRECISIONS = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# What is a multiple of 16: the padded sizes, and those of the matrices of `_multiply`.
_PADDED = ("PADDED", "padded_rows")
_PRODUCT_SIZES = ("rows", "columns", "left_view", "left_stride", "right_view", "right_stride", "out_view", "out_slot",
                  "out_stride", "view_stride", "slot_stride", "padded", "stride")  # fmt: skip
_NUMBERS = ("eps", "pull", "apart", "gram_weight", "reciprocal")
_DTYPES = [
    ("float32", "fp32"),
    ("tf32", "fp32"),
    ("bfloat16", "bf16"),
    ("bfloat16", "fp32"),
    ("float16", "fp16"),
    ("float16", "fp32"),
]
_TUNED = {
    "_forward_tile": (sums._forward_tile, sums._forward_needs),
    "accumulate_narrow": (accumulate.accumulate_narrow, accumulate.narrow_needs),
    "accumulate_wide": (accumulate.accumulate_wide, accumulate.wide_needs),
    "_multiply": (products._multiply, products.multiply_needs),
}
_ROWS = {
    "prepare": row_kernels.prepare,
    "collect": collect.collect,
    "_project": nt_xent._project,
    "_merge": sums._merge,
}
_COLUMNS = {
    "_statistics": columns._statistics,
    "_barlow_twins_columns": barlow_twins._barlow_twins_columns,
    "_vicreg_columns": vicreg._vicreg_columns,
    "_standardise": products._standardise,
    "_gram": dual._gram,
    "_diagonal": dual._diagonal,
    "_weigh": primal._weigh,
    "_round_gram": dual._round_gram,
    "_gradient_sums": derivatives._gradient_sums,
    "_differentiate": derivatives._differentiate,
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
MATRICES = {
    "gram": {"LAYOUT": "NT", "LOWER": True, "ADD": False},
    "panel": {"LAYOUT": "TN", "LOWER": False, "ADD": False},
    "left": {"LAYOUT": "NN", "LOWER": False, "ADD": False},
    "left_more": {"LAYOUT": "NN", "LOWER": False, "ADD": True},
    "right": {"LAYOUT": "NT", "LOWER": False, "ADD": False},
    "right_more": {"LAYOUT": "NT", "LOWER": False, "ADD": True},
}
_COLLECTED = {
    "both": {"tops": None, "totals": None, "shift": None, "total": None},
    "softmax": {"scale": None, "peak": None, "share": None},
    "sigmoid": {"peak": None, "shift": None},
}
# Of the kernels over columns, those of Barlow Twins and of VICReg, of one view or without what not every call needs.
_CENTRED = {"rstd": None, "other_offset": None, "other_rstd": None}
_PRIMAL = {name: None for name in ("gram", "operand", "other_operand", "scale", "dots")}
_GRADIENTS = {
    "barlow_twins_dual": {"scale": None},
    "barlow_twins_primal": _PRIMAL,
    "vicreg_dual": {**_CENTRED, "scale": None},
    "vicreg_dual_scaled": _CENTRED,
    "vicreg_primal": {**_CENTRED, **_PRIMAL},
    "one_view_dual": {**_CENTRED, "other": None},
}
_OF_COLUMNS = {
    "_statistics": {
        "barlow_twins": {"CROSS": "product"},
        "vicreg": {"CROSS": "difference"},
        "one_view": {"CROSS": None},
    },
    "_barlow_twins_columns": {"": {}},
    "_vicreg_columns": {"vicreg": {"CROSS": "difference"}, "one_view": {"CROSS": None}},
    "_standardise": {
        "barlow_twins": {"scale": None},
        "vicreg": {"rstd": None, "scale": None},
        "vicreg_scaled": {"rstd": None},
    },
    "_gram": {
        "barlow_twins": {"scale": None},
        "barlow_twins_loss": {"scale": None, "gram_a": None, "gram_b": None},
        "vicreg": {"products_b": None, "gram_b": None, "scale": None},
        "vicreg_scaled": {"products_b": None, "gram_b": None},
        "vicreg_loss": {"products_b": None, "gram_a": None, "gram_b": None},
    },
    "_diagonal": {"barlow_twins": {"scale": None}, "vicreg": {}},
    "_weigh": {
        "barlow_twins": {"scale": None, "SYMMETRIC": False},
        "barlow_twins_loss": {"scale": None, "SYMMETRIC": False, "weights": None},
        "vicreg": {"SYMMETRIC": True, "scale": None},
        "vicreg_scaled": {"SYMMETRIC": True},
        "vicreg_loss": {"SYMMETRIC": True, "weights": None},
    },
    "_round_gram": {"": {}},
    "_gradient_sums": _GRADIENTS,
    "_differentiate": _GRADIENTS,
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
    named = {"left": torch.empty(0, dtype=launch.DTYPES[precision]), **arguments}
    tuned, needs = _TUNED[kernel]
    return launch.suited(needs, tuned.configs, named, capability, SHARED_MEMORY[capability])


def product_cases(capability: int, precision: str) -> Iterator[Case]:
    """The kernels that multiply. D is a runtime argument of the wide ones: one specialisation serves every D."""
    input_precision = launch.input_precision(precision)
    short = precision != "float32"
    problems = [
        ("_forward_tile", name, {"T": t, **SUMS[name]}) for name in SUMS for t in ((64, 128) if short else (64,))
    ]
    problems += [("accumulate_wide", name, PRODUCTS[name]) for name in PRODUCTS]
    if short:
        problems += [("accumulate_narrow", name, {"D": d, **PRODUCTS[name]}) for name in PRODUCTS for d in (64, 128)]
    problems += [("_multiply", name, MATRICES[name]) for name in MATRICES]
    for kernel, name, problem in problems:
        constants = {**problem, "PRECISION": input_precision}
        for config in suited(kernel, capability, precision, **constants):
            items = tuple({**constants, **config.kwargs}.items())
            yield Case(
                kernel, name, capability, precision, PRECISIONS[precision], items, config.num_warps, config.num_stages
            )


def row_cases(capability: int, dims: tuple[int, ...] = (64, 128, 256, 512, 768, 1024)) -> Iterator[Case]:
    """The kernels over rows, one for each width that `dims` need, and the merging of slots."""
    blocks = {tuple(launch.row_block(dim).items()) for dim in dims}
    for block, (precision, rows) in itertools.product(sorted(blocks), _DTYPES):
        for normalize in (True, False):
            for kernel in ("prepare", "_project"):
                yield Case(kernel, "", capability, precision, rows, (("NORMALIZE", normalize), *block))
        for weight, absent in _COLLECTED.items():
            constants = (("WEIGHT", weight), *absent.items(), *block)
            yield Case("collect", weight, capability, precision, rows, constants, warps=8)
    for name, absent, slots in (("nt_xent", {}, 2), ("self", {"aligned": None, "loss": None}, 2),
                                ("pair", {"aligned": None, "loss": None}, 4)):  # fmt: skip
        constants = {"SYMMETRIC": slots == 2, "T": 64, "SLOTS": slots * sums._BAND, "BR": 16, **absent}
        yield Case("_merge", name, capability, "float32", "fp32", tuple(constants.items()))


def column_cases(capability: int) -> Iterator[Case]:
    """The kernels over columns, and those that turn products into losses and weights."""
    for precision, rows in _DTYPES:
        for kernel, variants in _OF_COLUMNS.items():
            arguments = _COLUMNS[kernel].arg_names
            sizes = {
                "T": products.TILE,
                "SLOTS": columns.SLOTS,
                **columns.BLOCK,
                "TF32": precision == "tf32",
            }
            for variant, constants in variants.items():
                constants = {name: x for name, x in {**constants, **sizes}.items() if name in arguments}
                yield Case(kernel, variant, capability, precision, rows, tuple(constants.items()))


def _types(case: Case) -> dict[str, str]:
    """What the arguments are, or are pointers to; integers are not listed."""
    product, rows = PRECISIONS[case.precision], case.rows
    if case.kernel in _COLUMNS or case.kernel == "_multiply":
        out = {"_multiply": "fp32", "_standardise": product, "_round_gram": product}.get(case.kernel, rows)
        return {
            **dict.fromkeys(("z", "z_a", "z_b", "other"), rows),
            **dict.fromkeys(("left", "right", "operand", "other_operand", "weights"), product),
            **dict.fromkeys(("sums", "terms", "scale", "weight"), "fp64"),
            **dict.fromkeys(("offset", "rstd", "other_offset", "other_rstd", "slope", "peak", "dots"), "fp32"),
            **dict.fromkeys(("product", "products", "products_a", "products_b", "gram", "gram_a", "gram_b"), "fp32"),
            **dict.fromkeys(("inner", "squares", "grad_loss"), "fp32"),
            "out": out,
        }
    return {
        "exclude": "i64",
        **dict.fromkeys(("inverse", "dscale", "share"), "fp64"),
        **dict.fromkeys(("z", "left", "right"), product),
        **dict.fromkeys(("z1", "z2", "dz1", "dz2", "x", "out"), rows),
        **dict.fromkeys(("scale", "bias", "aligned", "loss", "losses", "shift", "total", "coefficient"), "fp32"),
        **dict.fromkeys(("tops", "sums", "totals", "row_tops", "row_sums", "column_tops", "column_sums"), "fp32"),
        **dict.fromkeys(("row_shift", "row_factor", "column_shift", "column_factor", "peak", "gradient"), "fp32"),
    }


def compile_case(case: Case, count_spills: bool = False) -> Usage:
    """Compile, and read the resources from the cubin; `count_spills` asks the assembler as well."""
    kernel = _TUNED[case.kernel][0].fn if case.kernel in _TUNED else (_ROWS | _COLUMNS)[case.kernel]
    constants = dict(case.constants)
    for stride in kernel.arg_names:
        if "column_stride" in stride:
            constants[stride] = 1  # contiguous rows
    types = _types(case)
    sizes = _PRODUCT_SIZES if case.kernel in _COLUMNS or case.kernel == "_multiply" else _PADDED
    if case.kernel in _TUNED:
        sizes += ("D",)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "*" + types[name] if name in types else "fp32" if name in _NUMBERS else "i32"
        if signature[name].startswith("*") or name in sizes and signature[name] == "i32":
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
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
