"""The kernels of kernels/common in the compile gate: several families launch them, each with variants of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastssl.kernels.common import accumulate, blocks, collect, launch, rows
from tests.gpu.triton_checks.common.compile_gate import DTYPES, PRECISIONS, Case, Kernel, product_cases

# Of all kernels over tiles of S.
POINTERS = {
    "exclude": "i64",
    **dict.fromkeys(("inverse", "inverse1", "inverse2", "grad_scale", "share"), "fp64"),
    **dict.fromkeys(("z", "left", "right", "w"), "product"),
    **dict.fromkeys(("z1", "z2", "grad_z1", "grad_z2", "x", "out"), "rows"),
    **dict.fromkeys(("scale", "bias", "aligned", "loss", "losses", "shift", "total", "coefficient", "pull"), "fp32"),
    **dict.fromkeys(("tops", "sums", "totals", "row_tops", "row_sums", "column_tops", "column_sums"), "fp32"),
    **dict.fromkeys(
        ("row_total", "column_total", "positive", "factor", "weight", "extra", "query_slope", "scale_slope"), "fp32"
    ),
    **dict.fromkeys(("kept", "row_shift", "row_factor", "column_shift", "column_factor", "peak", "gradient"), "fp32"),
    **dict.fromkeys(("row_relative", "column_relative"), "fp32"),
}
PADDED = ("PADDED", "padded_rows")
STEPS = ("step_i", "step_j")
PREPARE = Kernel(rows.prepare, POINTERS, multiples=PADDED)
COLLECT = Kernel(collect.collect, POINTERS, multiples=PADDED)
NARROW = Kernel(accumulate.accumulate_narrow, POINTERS, multiples=PADDED, needs=accumulate.narrow_needs)
_BLOCK = ("first_row", "first_column", "height", "width")
WEIGH = Kernel(blocks.weigh, POINTERS, multiples=(*PADDED, *STEPS, *_BLOCK, "D"), needs=blocks.weigh_needs)

# What a launcher does not pass. With `exclude` the variants compute more, so those without it are left out.
NO_EXCLUDE = {"exclude": None}
NO_RUNNING = {"tops": None, "totals": None, "losses": None}
NO_KEPT = {"kept": None, "step_i": None, "step_j": None}
_SAID = ("WEIGHT", "EXCLUDE")
NO_ROWS = {"row_shift": None, "row_factor": None}
NO_FACTORS = {**NO_ROWS, "column_shift": None, "column_factor": None, "peak": None}


def accumulate_cases(
    variants: Mapping[str, Mapping[str, Any]], capability: int, sweep: bool, largest: str | None = None
) -> Iterator[Case]:
    """D is a constant of the narrow kernel; of the wide one a runtime argument, so one specialisation serves all."""
    narrow = {"D": 64}, {"D": 128}
    yield from product_cases(NARROW, variants, capability, sweep, narrow, float32_shapes=(), largest=largest)
    wide = {name: in_blocks(constants) for name, constants in variants.items()}
    wide = {name: constants for name, constants in wide.items() if constants is not None}
    yield from product_cases(WEIGH, wide, capability, sweep, largest=largest)


def in_blocks(constants: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `weigh` is not passed where the narrow kernel is not passed this; None where it is not launched."""
    weight, derive = constants["WEIGHT"], "gradient" not in constants
    if weight == "sigmoid" and derive and "losses" in constants:
        return None  # one pass serves both sides
    given = {"softmax": {"row_shift"}, "sigmoid": {"peak"} if derive else set()}.get(weight, set())
    absent = {name for name in constants if name in WEIGH.jit.arg_names and name not in given | set(_SAID)}
    absent |= set() if weight == "sigmoid" else {"totals", "losses"}
    absent |= set() if derive else {"w"}
    return {**{name: constants[name] for name in _SAID}, **dict.fromkeys(sorted(absent)), **NO_KEPT}


def kept_cases(
    kernel: Kernel,
    variants: Mapping[str, Mapping[str, Any]],
    capability: int,
    sweep: bool,
    shapes: Sequence[Mapping[str, int]] = ({},),
) -> Iterator[Case]:
    """Of a kernel that keeps its products, or reads those that are kept: float32 and TF32 only."""
    if sweep or capability == 80:
        for case in product_cases(kernel, variants, capability, True, shapes, shapes[:1]):
            if case.precision == "float32" or (sweep and case.precision == "tf32"):
                yield case


def row_cases(
    kernel: Kernel, variant: str, constants: Mapping[str, Any], capability: int, sweep: bool, warps: int = 4
) -> Iterator[Case]:
    """Of a kernel over rows: one for each width that rows can need; without `sweep` one width, on one card."""
    if not sweep and capability != 80:
        return
    dims = (64, 128, 256, 512, 768, 1024) if sweep else (128,)
    blocks = {tuple(launch.row_block(dim).items()) for dim in dims}
    for block, (precision, dtype) in itertools.product(sorted(blocks), DTYPES):
        if sweep or dtype == PRECISIONS[precision]:
            yield Case(kernel, variant, capability, precision, dtype, (*constants.items(), *block), warps)


def collect_cases(weight: str, absent: Mapping[str, None], capability: int, sweep: bool) -> Iterator[Case]:
    yield from row_cases(COLLECT, weight, {"WEIGHT": weight, **absent}, capability, sweep, warps=8)
