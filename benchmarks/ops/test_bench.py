"""The registry under pytest-benchmark, to compare two commits.

pytest benchmarks/ops --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.ops import registry

CASES = [(name, size, mode) for name, b in registry.load().items() for mode in b.modes for size in b.sizes]


@pytest.fixture(autouse=True)
def _restore_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name, size, mode", CASES, ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else x)
def test_fastssl(benchmark, name: str, size: registry.Size, mode: str) -> None:
    case = registry.BENCHMARKS[name]
    contestant = case.contestants(size, mode, ())["fastssl"]
    torch.set_float32_matmul_precision(contestant.precision)
    benchmark(case.step, contestant.make(), case.inputs(size, registry.MODES[mode].dtype))
