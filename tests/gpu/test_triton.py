"""The Triton kernels, on any machine: their values in the interpreter, their code for GPUs that are not there.

A family of kernels has its checks in triton_checks/<family>.py, or <family>/<op>.py: tests of values, and `cases`, the
specialisations to compile. FASTSSL_TRITON_SWEEP=1 compiles every configuration of every kernel for every architecture
instead of a selection, and has the assembler count spills:

    FASTSSL_TRITON_SWEEP=1 python -m pytest tests/gpu/test_triton.py -k compile
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fastssl.kernels.common import launch  # noqa: E402
from tests.gpu.triton_checks.common.compile_gate import (  # noqa: E402
    SHARED_MEMORY,
    TENSOR_CORES,
    compile_case,
)
from tests.gpu.triton_checks.common.kernels import NARROW, WEIGH  # noqa: E402
from tests.gpu.triton_checks.contrastive.logsumexp import FORWARD  # noqa: E402

SWEEP = os.environ.get("FASTSSL_TRITON_SWEEP") == "1"
ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).parent / "triton_checks"


def _checks() -> dict[str, Path]:
    """The files of every family of kernels, by their names."""
    found = {}
    for kernels in sorted((ROOT / "kernels").iterdir()):
        family = kernels.stem
        if family.startswith("_") or family == "common":
            continue
        files = [CHECKS / f"{family}.py", *sorted((CHECKS / family).glob("[!_]*.py"))]
        of_family = {".".join(f.relative_to(CHECKS).with_suffix("").parts): f for f in files if f.exists()}
        assert of_family, f"the Triton kernels of {family} have no checks in {CHECKS}"
        found |= of_family
    return found


FILES = _checks()
MODULES = [import_module(f"tests.gpu.triton_checks.{name}") for name in FILES]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreted", "on_the_gpu"])
def test_numerics(interpret, name):
    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FILES[name]],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


CASES = [case for module in MODULES for capability in SHARED_MEMORY for case in module.cases(capability, SWEEP)]


@pytest.mark.parametrize("case", dict.fromkeys(CASES), ids=str)
def test_compiles_without_spills_and_within_the_card(case):
    usage = compile_case(case, count_spills=SWEEP)
    assert usage.stack == usage.local == 0
    assert usage.spills in ("", "0 bytes spill stores, 0 bytes spill loads")
    assert usage.shared <= SHARED_MEMORY[case.capability]
    constants = dict(case.constants)
    multiplies = "PRECISION" in constants and (
        case.kernel is not WEIGH or "kept" in constants
    )  # else it reads products
    if multiplies and case.precision != "float32":
        assert TENSOR_CORES[case.capability] in usage.ptx


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_card_keeps_a_configuration(capability):
    """`product_cases` refuses a kernel of which no configuration suits the card."""
    for module in MODULES:
        assert list(module.cases(capability, sweep=True))


def test_shared_memory_prunes():
    wide = [len(FORWARD.suited(c, "tf32", T=128, PRECISION="tf32")) for c in (90, 120)]
    assert wide == [2, 1]


def test_tf32_on_blackwell_keeps_the_tile_without_stack():
    """Of which the sweep knows, and the assembler of one Triton alone does not."""
    for capability, dim, weight, tile in (
        (100, 64, "both", (64, 8)),
        (100, 128, "softmax", (32, 4)),
        (100, 128, "sigmoid", (16, 4)),
        (120, 64, "both", (32, 8)),
        (120, 128, "column", (32, 8)),
    ):
        [config] = NARROW.suited(capability, "tf32", D=dim, WEIGHT=weight, PRECISION="tf32")
        assert (config.kwargs["BM"], config.kwargs["BN"], config.num_warps) == (64, *tile)


def test_timing_only_where_there_is_a_choice(monkeypatch):
    """On a card that suits several configurations, one, or several while a graph is being captured."""
    card, timed = SimpleNamespace(), []
    active = SimpleNamespace(
        get_current_target=lambda: SimpleNamespace(arch=90),
        get_current_device=lambda: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": card.shared}),
        get_benchmarker=lambda: lambda call, quantiles: timed.append(call) or [1.0, 1.0, 1.0],
    )
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    configs = launch.configs(({"BM": 64}, 4, 3), ({"BM": 128}, 4, 3))
    tuner = launch.autotune(lambda c, named, size, capability: 1024 * c["BM"], ["D"], configs)(FORWARD.jit)
    tuner.nargs = {"left": torch.empty(0)}
    for card.shared, card.capturing, suit, times in ((2**20, False, 2, 1), (2**17, False, 1, 0), (2**20, True, 1, 0)):
        timed.clear()
        assert tuner.prune_configs({}) == configs[:suit]
        tuner.do_bench(None, quantiles=(0.5, 0.2, 0.8))
        assert len(timed) == times
