"""`python -m fastssl check` and `bench`: what one runs after installing."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from benchmarks.ops import machine, measure, registry
from benchmarks.ops.machine import Rates
from fastssl import functional
from fastssl.__main__ import main
from fastssl._smoke import smoke
from fastssl.reference import OPS

pytest.importorskip("matplotlib")
quick = pytest.importorskip("benchmarks.ops.quick")

RATES = Rates({name: (1e11, name) for name in ("float32", "tf32", "bfloat16")}, 1e10)


@pytest.fixture
def few(monkeypatch):
    """Leaves two operations to check, one of which is written in place."""
    for name in set(OPS) - {"variance_loss", "ema_update_"}:
        monkeypatch.delitem(OPS, name)


def test_check_passes_where_all_is_right(few, capsys):
    assert main(["check"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", "variance_loss"], ["ok", "ema_update_"]]
    assert last == "All operations are right." and all(int(line.split()[2]) >= 5 for line in lines)


def _wrong(x, **options):
    return 1.001 * OPS["variance_loss"].reference(x, **options)


def _unwritten(x, **options):
    return torch.empty_like(OPS["variance_loss"].reference(x, **options))


def _raises(x, **options):
    raise ValueError("no such thing")


@pytest.mark.parametrize("function", [_wrong, _unwritten, _raises])
def test_check_fails_where_an_operation_does(few, capsys, monkeypatch, function):
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(functional, "variance_loss", function)
    assert main(["check"]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED") and last == "1 failed: variance_loss" and second.startswith("ok")
    assert function is not _raises or first.endswith("ValueError: no such thing")
    assert torch.are_deterministic_algorithms_enabled() is deterministic


def test_check_of_a_wrong_gradient(monkeypatch):
    def half(x, **options):
        loss = OPS["variance_loss"].reference(x, **options)
        return (loss + loss.detach()) / 2

    monkeypatch.setattr(functional, "variance_loss", half)
    ((name, _, wrong),) = smoke(operations=["variance_loss"])
    assert name == "variance_loss" and "gradient 0" in wrong


@pytest.mark.parametrize("device", ["abacus", "meta"])
def test_check_names_a_device_that_cannot_compute(device, capsys):
    with pytest.raises(SystemExit):
        main(["check", "--device", device])
    assert f"--device must be one that PyTorch finds, and has numbers, got {device}" in capsys.readouterr().err


def test_bench_measures_draws_and_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "measure_rates", lambda: RATES)
    assert main(["bench", "uniformity", "--output", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"uniformity .*\d\.\dx", printed) and max(map(len, printed.splitlines()[:-1])) <= 80
    assert (tmp_path / "figures" / "bench.png").stat().st_size > 1000
    monkeypatch.setattr(measure, "relative_error", lambda found, expected: 1.0)
    assert main(["bench", "uniformity", "--output", str(tmp_path)]) == 1  # wrong results are not timed


def test_bench_takes_sizes_whose_eager_step_is_short():
    for name, benchmark in registry.load().items():
        needs = {size: benchmark.needs(size, 4)["naive"] for size in benchmark.sizes}
        chosen = needs[quick.size_of(benchmark, "float32")]
        assert chosen == max((x for x in needs.values() if x <= 1 << 26), default=min(needs.values())), name


def test_bench_says_what_it_lacks(monkeypatch):
    with pytest.raises(SystemExit, match="operation must be one of .*nt_xent, .*uniformity.*, got nt_xnt"):
        main(["bench", "nt_xnt"])
    found = importlib.util.find_spec
    for missing, message in (
        ("matplotlib", "matplotlib not found: pip install"),
        ("benchmarks.ops", "folder benchmarks/"),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, m=missing: None if name == m else found(name))
        with pytest.raises(SystemExit, match=message):
            main(["bench"])
