"""The Triton kernels, on any machine: their values in the interpreter, their code for GPUs that are not there.

FASTSSL_TRITON_SWEEP=1 compiles every configuration of every kernel for every architecture instead of a selection, and
has the assembler count spills:

    FASTSSL_TRITON_SWEEP=1 python -m pytest tests/gpu/test_triton.py -k compile
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tests.gpu.triton_checks.compile_gate import (  # noqa: E402
    MATRICES,
    PRECISIONS,
    PRODUCTS,
    SHARED_MEMORY,
    SUMS,
    TENSOR_CORES,
    Case,
    column_cases,
    compile_case,
    product_cases,
    row_cases,
    suited,
)

SWEEP = os.environ.get("FASTSSL_TRITON_SWEEP") == "1"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", ["numerics", "numerics_sums", "numerics_correlation"])
@pytest.mark.parametrize("interpret", ["1", "0"])
def test_numerics(interpret, file):
    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/triton_checks/{file}.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _cases() -> list[Case]:
    if SWEEP:
        everything = [c for capability in SHARED_MEMORY for p in PRECISIONS for c in product_cases(capability, p)]
        return everything + [
            c for f in (row_cases, column_cases) for capability in SHARED_MEMORY for c in f(capability)
        ]
    # The first configuration of each kernel: of all for Hopper's bfloat16, else of those that use most. Tiles of 64 and
    # rows of 64 use less than those of 128.
    cases = []
    for capability, precision in [(90, "bfloat16"), (80, "float32"), (80, "bfloat16"), (90, "tf32"), (100, "float16"),
                                  (120, "tf32")]:  # fmt: skip
        first = {}
        for case in product_cases(capability, precision):
            constants = dict(case.constants)
            first.setdefault((case.kernel, case.variant, constants.get("D"), constants.get("T")), case)
        everything = (capability, precision) == (90, "bfloat16")
        for (_, variant, d, t), case in first.items():
            largest = 64 not in (d, t) or precision == "float32"
            if largest and (everything or variant in ("nt_xent", "sigmoid", "panel")):
                cases.append(case)
    others = [c for c in row_cases(80, (128,)) if ("NORMALIZE", False) not in c.constants]
    others += [c for c in column_cases(90) if c.precision == "float16"]
    return cases + [c for c in others if c.rows == PRECISIONS[c.precision]]


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_compiles_without_spills_and_within_the_card(case):
    usage = compile_case(case, count_spills=SWEEP)
    assert usage.stack == usage.local == 0
    assert usage.spills in ("", "0 bytes spill stores, 0 bytes spill loads")
    assert usage.shared <= SHARED_MEMORY[case.capability]
    if "PRECISION" in dict(case.constants) and case.precision != "float32":
        assert TENSOR_CORES[case.capability] in usage.ptx


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_card_keeps_a_configuration(capability, precision):
    kept = {(case.kernel, case.variant, dict(case.constants).get("T"), dict(case.constants).get("D"))
            for case in product_cases(capability, precision)}  # fmt: skip
    of_rows = len(SUMS) + len(PRODUCTS) if precision == "float32" else 2 * len(SUMS) + 3 * len(PRODUCTS)
    assert len(kept) == of_rows + len(MATRICES)


def test_shared_memory_prunes():
    wide = [len(suited("_forward_tile", c, "tf32", T=128, PRECISION="tf32")) for c in (90, 120)]
    assert wide == [2, 1]
