"""The measuring instrument: right answers only, the floor's arithmetic, memory, and what the runner writes."""

from __future__ import annotations

import csv
import math
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ops import __main__ as run
from benchmarks.ops import figures, measure, registry, report
from benchmarks.ops.machine import Rates
from benchmarks.ops.registry import Contestant
from fastssl import functional, reference
from fastssl.reference import OPS

ROOT = Path(__file__).parents[2]
RATES = Rates({"float32": (1e11, "float32"), "tf32": (2e11, "tf32"), "bfloat16": (4e11, "bfloat16")}, 1e10)


@pytest.fixture
def nt_xent() -> registry.Benchmark:
    return registry.load()["nt_xent"]


def _contestants(**losses) -> dict[str, Contestant]:
    return {name: Contestant(lambda loss=loss: loss, "highest") for name, loss in losses.items()}


UNMEASURED = {"", "masking_ids"}  # functions without an operation of their own; what random_masking is measured with


def test_every_operation_has_a_benchmark():
    assert {b.kernel for b in registry.load().values()} >= {spec.op for spec in OPS.values()} - UNMEASURED


def test_names_choose_benchmarks():
    both = {"ema_update_", "ema_of_small_tensors"}
    assert set(registry.load(["ema"])) - {"adamw_ema_step_"} == set(registry.load(["ema_update_"])) == both
    assert set(registry.load(["ema_of_small_tensors", "siglip_loss"])) == {"ema_of_small_tensors", "siglip_loss"}
    of_info_nce = {"info_nce", "info_nce_in_batch", "info_nce_of_ids", "info_nce_paired", "info_nce_symmetric"}
    assert set(registry.load(["info_nce"])) == of_info_nce
    assert set(registry.load(["contrastive"])) == {"nt_xent", *of_info_nce, "clip_loss", "sup_con", "dcl"}
    assert {b.family for b in registry.load().values()} <= {m.name for m in pkgutil.iter_modules(functional.__path__)}


def test_the_floor_is_products_plus_traffic(nt_xent):
    # 1.5 U with U = 2 * 1000 * 1000 * 100, and 0.5 U for the fifth of the tiles that is not kept; rows read twice and
    # gradients written once; three vectors written and read
    products, traffic = 3.2e8, 3 * 1000 * 100 * 4 + 6 * 1000 * 4
    assert nt_xent.floor((1000, 100), 4, 1e11, 1e10) == pytest.approx(products / 1e11 + traffic / 1e10)


@pytest.mark.parametrize("mode, rate", [("float32", 1e11), ("tf32", 2e11), ("medium", 4e11), ("bfloat16", 4e11)])
def test_each_mode_takes_the_rate_of_its_products(nt_xent, mode, rate):
    (result,) = measure.measure(nt_xent, (64, 32), mode, nt_xent.contestants((64, 32), mode, ()), RATES, 2)
    assert result.floor == nt_xent.floor((64, 32), registry.MODES[mode].dtype.itemsize, rate, 1e10)
    assert result.floor_fraction == result.floor / result.median


SMALL = {2: (60, 24), 3: (70, 30, 24), 4: (6, 3, 32, 8)}  # by the numbers that a size has


@pytest.mark.parametrize("op", [name for name, b in registry.load().items() if b.oracle])
def test_the_oracle_is_the_reference_in_float64(op, monkeypatch):
    benchmark = registry.load()[op]
    inputs = benchmark.inputs(SMALL[len(benchmark.sizes[0])], torch.float64)
    expected = replace(benchmark, oracle=None).expected(inputs)
    for block_elements in (1 << 22, 7 * 70):  # one block, and one for seven rows
        monkeypatch.setitem(registry._BLOCK_ELEMENTS, "cpu", block_elements)
        torch.testing.assert_close(benchmark.expected(inputs), expected, check_dtype=False)


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", registry.load())
def test_contestants_are_right(op, mode):
    benchmark = registry.load()[op]
    size = SMALL[len(benchmark.sizes[0])]
    contestants = benchmark.contestants(size, mode, tuple(set(registry.BASELINES) - {"compile", "chunked"}))
    assert len(contestants) == 2 + len(benchmark.peers)
    for result in measure.measure(benchmark, size, mode, contestants, RATES, 2):
        assert result.repeats == 2 and result.floor > 0 or "No module named" in result.note, result.note


def test_wrong_moves_are_refused():
    """Of random outputs, of gradients, in place: each with the right ones beside it, which are timed."""
    restore = reference.masking.restore_tokens

    def masking(wrong):
        def random_masking(x):
            visible, mask, ids_restore = registry.load()["random_masking"].naive(x, 0.75)
            return wrong(visible, mask, ids_restore)

        return random_masking

    def unequal(visible, mask, ids_restore):
        mask = mask.clone()
        mask[0].zero_()
        return visible, mask, ids_restore

    def twice(visible, mask, ids_restore):
        return visible, mask, ids_restore.index_copy(1, torch.tensor([0]), ids_restore[:, 1:2])

    cases = {
        "random_masking": (
            masking(lambda *triple: triple),
            masking(unequal),
            masking(twice),
            masking(lambda visible, mask, ids_restore: (visible.roll(1, 1), mask, ids_restore)),
        ),
        "restore_tokens": (
            restore,
            lambda x, ids, token, pos: restore(x, ids, token, pos) + 1e-3,
            lambda x, ids, token, pos: restore(x, ids, token, pos.detach() + 0 * pos),
        ),
        "ema_update_": (
            lambda targets, sources, momentum: torch._foreach_lerp_(targets, sources, 1 - momentum),
            lambda targets, sources, momentum: torch._foreach_lerp_(targets, sources, momentum),
            lambda targets, sources, momentum: torch._foreach_lerp_(targets[1:], sources[1:], 1 - momentum),
        ),
    }
    for name, (right, *wrong) in cases.items():
        benchmark = registry.load()[name]
        contestants = _contestants(fastssl=right, **{f"wrong {i}": f for i, f in enumerate(wrong)})
        size = SMALL[len(benchmark.sizes[0])]
        first, *others = measure.measure(benchmark, size, "float32", contestants, RATES, 2)
        assert first.repeats == 2 and not first.note
        assert all(result.note.startswith("wrong: ") for result in others), name


def test_every_contestant_in_place_is_checked_from_the_same_start():
    """What an earlier one left behind is nobody's input."""
    benchmark = registry.load()["ema_of_small_tensors"]
    contestants = benchmark.contestants((3, 40), "float32", ("naive", "assign", "foreach"))
    results = measure.measure(benchmark, (3, 40), "float32", contestants, RATES, 5)
    assert all(result.repeats == 5 and result.error < 1e-6 for result in results)


def test_a_precision_that_makes_no_difference_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run.machine, "measure_rates", lambda device: RATES)
    assert run.main(["ema_of_small_tensors", "--dtype", "medium", "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())


def test_a_wrong_contestant_is_refused(nt_xent):
    naive = OPS["nt_xent"].reference
    calls = []

    def wrong_gradient(z1, z2):
        calls.append(None)
        return naive(z1, z2) + 1e-3 * (z1 - z1.detach()).sum()

    contestants = _contestants(
        fastssl=naive,
        wrong_loss=lambda z1, z2: naive(z1, z2, temperature=0.5001),
        wrong_gradient=wrong_gradient,
        nan=lambda z1, z2: naive(z1, z2) * math.nan,
        broken=lambda z1, z2: naive(z1, z2[1:]),
    )
    results = {r.contestant: r for r in measure.measure(nt_xent, (64, 32), "float32", contestants, RATES, 3)}
    assert results["fastssl"].repeats == 3 and results["fastssl"].median > 0 and not results["fastssl"].note
    for name in ("wrong_loss", "wrong_gradient", "nan", "broken"):
        assert math.isnan(results[name].median) and results[name].repeats == 0, name
    assert len(calls) == 1
    assert results["wrong_gradient"].value_error < 1e-6
    assert all(results[name].note.startswith("wrong: ") for name in ("wrong_loss", "wrong_gradient", "nan"))
    assert results["broken"].note.startswith("failed: ")
    _, ((*_, against_loss, against_gradient, _, _, _, _),) = report.times(list(results.values()))
    assert against_loss.startswith("wrong: ") and against_gradient.startswith("wrong: ")


def test_a_baseline_that_would_not_fit_is_not_run(nt_xent):
    def explode(z1, z2):
        raise AssertionError("must not run")

    contestants = {name: replace(c, needs=1e18) for name, c in _contestants(naive=explode).items()}
    (result,) = measure.measure(nt_xent, (64, 32), "float32", contestants, RATES, 2)
    measure.add_memory(result, (64, 32))
    assert result.note == "not run: needs about 931322575 GiB"


def test_eager_code_in_place_of_compiled_code_is_refused(nt_xent):
    registry.compiled(OPS["nt_xent"].reference)  # and then not used
    eager = Contestant(lambda: OPS["nt_xent"].reference, "highest", compiled=True)
    (result,) = measure.measure(nt_xent, (64, 32), "float32", {"compile": eager}, RATES, 2)
    assert result.note == "failed: torch.compile ran eager code"


def test_compiled_code_is_timed(nt_xent):
    compiled = nt_xent.contestants((64, 32), "float32", ("compile",))["compile"]
    (result,) = measure.measure(nt_xent, (64, 32), "float32", {"compile": compiled}, RATES, 2)
    assert result.repeats == 2 and not result.note


def test_interleaving_times_every_step_under_its_own_precision():
    order = []

    def step(name):
        return lambda: order.append((name, torch.get_float32_matmul_precision()))

    steps = {"a": ("highest", step("a")), "b": ("medium", step("b")), "c": ("high", step("c"))}
    seconds = measure.interleaved_seconds(steps, 4)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    timed = order[-12:]
    assert set(timed) == {("a", "highest"), ("b", "medium"), ("c", "high")}
    assert [name for name, _ in timed] == list("abcbcacababc")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak resident memory")
def test_extra_memory_is_the_peak_and_not_what_remains():
    def run():
        torch.ones(1 << 26)  # 256 MiB, freed again
        return torch.ones(1 << 24)  # 64 MiB, kept

    assert measure.extra_memory(run) == pytest.approx(256 * 2**20, rel=0.03)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak resident memory")
def test_memory_is_measured_in_a_process_of_its_own(nt_xent):
    size = (2048, 64)
    naive = nt_xent.contestants(size, "float32", ("naive",))["naive"]
    (result,) = measure.unmeasured(nt_xent, size, "float32", {"naive": naive})
    measure.add_memory(result, size)
    matrices = result.extra_memory / (4 * size[0] ** 2)
    assert not result.note and 2 < matrices < 8


def test_runner(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ops", "nt_xent", "--dtype", "float32,medium"]
    command += ["--sizes", "64,32x16", "--against", "naive", "--repeats", "3", "--markdown", "--output", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "python -m benchmarks.ops nt_xent --dtype float32,medium --sizes 64,32x16" in output
    with (tmp_path / "nt_xent.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {"float32": ["fastssl", "naive"], "medium": ["fastssl", "naive", "naive, medium"]}
    cases = [(size, mode, name) for mode in names for size in ("64x128", "32x16") for name in names[mode]]
    assert [(r["size"], r["mode"], r["contestant"]) for r in rows] == cases
    for row in rows:
        assert 0 < float(row["quartile1"]) <= float(row["median"]) <= float(row["quartile3"])
        assert row["repeats"] == "3" and row["note"] == "" and row["cpu"] and row["torch"] == torch.__version__
        assert float(row["floor_fraction"]) == pytest.approx(float(row["floor"]) / float(row["median"]))
    assert (tmp_path / "nt_xent.png").read_bytes().startswith(b"\x89PNG")
    table = [line for line in (tmp_path / "nt_xent.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sigmoids"], "family sigmoids is none of adamw_ema_step_, barlow_twins"),
        (["--dtype", "float8"], "float8 is none of float32, tf32, medium, bfloat16"),
        (["--against", "faster"], "faster is none of naive, compile, chunked, lightly"),
        (["--sizes", "8k"], "sizes look like 512,8192x128, got 8k"),
        (["nt_xent", "--sizes", "8x8x8"], "--sizes must have at most 2 numbers for nt_xent, got (8, 8, 8)"),
        (["--repeats", "1"], "--repeats must be at least 2, for quartiles, got 1"),
    ],
)
def test_runner_names_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_views_come_in_pairs(nt_xent):
    with pytest.raises(ValueError, match="even number of rows.*63"):
        nt_xent.inputs((63, 8), torch.float32)


@pytest.mark.parametrize("slow, calls", [(3.0, (1, 3)), (0.5, (3, 7))])
def test_long_steps_are_repeated_less(monkeypatch, slow, calls):
    """Its calls that warm up, and those that are timed."""
    done = []
    monkeypatch.setattr(measure, "seconds_of", lambda step, device: done.append(step()) or done[-1])
    found = measure.interleaved_seconds({"slow": ("highest", lambda: slow), "other": ("highest", lambda: 1.5)})
    warm, repeats = calls
    assert {name: len(seconds) for name, seconds in found.items()} == {"slow": repeats, "other": repeats}
    assert done.count(slow) == warm + repeats


def test_the_figures_of_the_documentation_are_drawn(tmp_path):
    figures.draw_all(figures.RESULTS, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir() if "</svg>" in path.read_text()}
    assert drawn == {path.name for path in figures.FIGURES.iterdir()} and len(drawn) == 3
    assert set(figures.CURVES) <= {op for op, _ in figures.read(figures.RESULTS).cases()}


def test_figures_are_of_one_machine(tmp_path):
    for path in sorted(figures.RESULTS.glob("*.csv"))[:2]:
        (tmp_path / path.name).write_text(path.read_text())
    assert figures.read(tmp_path).measurements
    with path.open(newline="") as file:
        cpu = next(csv.DictReader(file))["cpu"]
    (tmp_path / path.name).write_text(path.read_text().replace(cpu, "Another CPU"))
    with pytest.raises(SystemExit, match="one machine, got .*Another CPU"):
        figures.read(tmp_path)
