"""The registry under pytest-benchmark, to compare two commits.

pytest benchmarks --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import registry
import torch

CASES = [(op, size, mode) for op, b in registry.load().items() for mode in registry.MODES for size in b.sizes]


@pytest.fixture(autouse=True)
def _restore_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("op, size, mode", CASES, ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else x)
def test_fastssl(benchmark, op: str, size: registry.Size, mode: str) -> None:
    case = registry.BENCHMARKS[op]
    contestant = case.contestants(size, mode, ())["fastssl"]
    torch.set_float32_matmul_precision(contestant.precision)
    benchmark(registry.forward_backward, contestant.make(), case.inputs(size, registry.MODES[mode].dtype))
