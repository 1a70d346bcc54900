"""What Barlow Twins and VICReg take the trouble to compute, by which algorithm, in how much memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import (
    barlow_twins,
    correlation_algorithm,
    covariance_loss,
    redundancy_loss,
    variance_loss,
    vicreg,
)
from fastssl.ops import _portable
from fastssl.ops._op import Op
from tests.accuracy import with_gradients
from tests.inputs import alike

LOSSES = {"barlow_twins": barlow_twins, "vicreg": vicreg}


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments after the tensors of every operation that is called from now on."""
    calls, call = [], Op.__call__

    def spy(self: Op, *args: Any) -> Any:
        calls.append(tuple(x for x in args if not isinstance(x, Tensor)))
        return call(self, *args)

    monkeypatch.setattr(Op, "__call__", spy)
    return calls


FUNCTIONS = {
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "redundancy_loss": redundancy_loss,
    "covariance_loss": lambda a, b: covariance_loss(a),
    "variance_loss": lambda a, b: variance_loss(a),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients_are_made_only_where_they_are_wanted(function, monkeypatch, backend):
    """The value is the same."""
    calls, views = _spy(monkeypatch), alike(9, 5)
    values = [function(*views)]
    with torch.no_grad():
        values.append(function(*(z.requires_grad_() for z in views)))
    values.append(function(*views).detach())
    assert [derive for *_, derive, _ in calls] == [False, False, True]
    assert all(torch.equal(x, values[0]) for x in values)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_algorithm_is_chosen_by_cost(function, monkeypatch):
    calls = _spy(monkeypatch)
    for shape, algorithm in {
        (3, 4): "dual",
        (4, 5): "primal",
        (4, 6): "dual",
        (9, 9): "primal",
        (2, 1): "primal",
    }.items():
        assert correlation_algorithm(*shape) == algorithm
        function(*alike(*shape))
    assert [dual for *_, dual, _, _ in calls] == [True, False, True, False, False]


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
@pytest.mark.parametrize("rows, dim", [(200, 256), (60, 256)])
def test_portable_blocks_are_all_that_is_added(name, rows, dim, monkeypatch):
    """No D x D matrix is allocated, of which the first shape's would be larger than its rows."""
    views = alike(rows, dim)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with fastssl.use_backend("portable"):
        expected = with_gradients(LOSSES[name], *views)
        monkeypatch.setattr(_portable, "_BLOCK_ELEMENTS", 1 << 12)
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            results = with_gradients(LOSSES[name], *views)
    allocated = [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::")]
    assert max(allocated) == views[0].nbytes
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-5 * right.abs().max().item())


MEMORY = """
    import sys, torch, fastssl
    from fastssl.functional import barlow_twins, covariance_loss, redundancy_loss, vicreg
    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
    def step(rows, dim):
        x, y = (torch.randn(rows, dim).requires_grad_() for _ in range(2))
        for loss in (barlow_twins, vicreg, redundancy_loss, lambda x, y: covariance_loss(x)):
            loss(x, y).backward()
    for backend in ("auto", "portable"):
        with fastssl.use_backend(backend):
            step(300, 20)
            step(20, 300)
            before = peak()
            step(32, 8192)
            step(8192, 32)
        print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_is_that_of_the_rows():
    """D x D, and B x B, would take 256 MiB; the views and their gradients take 1 MiB each."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert all(float(line) < 60 for line in run.stdout.split())
