"""Benchmarks on a GPU, as far as a machine without one can tell: where tensors are, what is timed, what fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from benchmarks.ops import __main__ as run
from benchmarks.ops import machine, measure, registry
from benchmarks.ops.registry import Contestant
from tests.benchmarks.test_benchmarks import RATES, SMALL

UNTIMED = {"block_masking_ids", "sample_negatives"}  # of numbers alone
UNFAKED = "unknown device type for autocast", ".numpy() is not supported for tensor subclasses"
SMALLEST = SMALL | {2: (2, 24)}  # layers, too


@pytest.mark.parametrize("op", sorted(set(registry.load()) - UNTIMED))
def test_everything_stays_on_the_inputs_device(op, monkeypatch):
    """Fake tensors refuse to be mixed with those of another device; what depends on values they cannot run."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    benchmark = registry.load()[op]
    size, dtype = SMALLEST[len(benchmark.sizes[0])], torch.float32
    contestants = benchmark.contestants(
        size, "float32", ("naive", "chunked", "cosine", "assign", "foreach", "open_clip")
    )
    for function in (*(contestant.make for contestant in contestants.values()), None):
        with FakeTensorMode():
            inputs = benchmark.inputs_on("meta", size, dtype)
            try:
                results = benchmark.expected(inputs) if function is None else benchmark.run(function(), inputs)
            except (DataDependentOutputException, DynamicOutputShapeException, ImportError):
                continue
            except RuntimeError as error:
                if any(message in str(error) for message in UNFAKED):
                    continue
                raise
        assert {x.device.type for x in registry.tensors_of(results)} == {"meta"}


@pytest.mark.parametrize("op", ["clip_loss", "nt_xent", "sup_con", "linear_cross_entropy"])
def test_a_loop_over_blocks_is_a_contestant(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(registry._BLOCK_ELEMENTS, "cpu", 7 * 70)
    benchmark = registry.load()[op]
    size = SMALL[len(benchmark.sizes[0])]
    contestants = benchmark.contestants(size, "float32", ("chunked",))
    assert list(contestants) == ["fastssl", "chunked"]
    for result in measure.measure(benchmark, size, "float32", contestants, RATES, 2):
        assert result.repeats == 2 and result.error < 1e-5


def test_a_compiled_loop_is_timed_beside_other_compiled_code():
    benchmark = registry.load()["siglip_loss"]
    contestants = benchmark.contestants((64, 8), "bfloat16", ("compile", "chunked"))
    assert all(r.repeats == 2 for r in measure.measure(benchmark, (64, 8), "bfloat16", contestants, RATES, 2))


def test_a_gpu_has_sizes_and_precisions_of_its_own():
    clip, ema, queue = (registry.load()[name] for name in ("clip_loss", "ema_update_", "info_nce"))
    assert clip.sizes_on("cpu") == clip.sizes and (131072, 1024) in clip.sizes_on("cuda")
    assert ema.sizes_on("cuda") == ema.sizes and queue.sizes_on("cuda") == queue.sizes
    assert clip.modes_on("cpu") == ("float32", "medium", "bfloat16") and clip.modes_on("cuda") == ("tf32", "bfloat16")
    assert ema.modes_on("cuda") == ("float32", "bfloat16")


def test_a_gpu_never_serves_inputs_from_its_cache(monkeypatch):
    """As many copies as are four times the cache, one after the other."""
    benchmark, seen = registry.load()["nt_xent"], []

    def loss(z1, z2):
        seen.append(z1.data_ptr())
        return benchmark.naive(z1, z2)

    monkeypatch.setattr(measure, "l2_cache", lambda device: 64 * 8 * 4)  # of both views
    (result,) = measure.measure(
        benchmark, (64, 8), "float32", {"fastssl": Contestant(lambda: loss, "highest")}, RATES, 9
    )
    timed = seen[1:]
    assert len(set(timed)) == 4 and timed[:8] == timed[4:12] and not result.note
    assert seen[0] not in timed  # what was checked


def test_a_gpu_is_timed_by_events_and_waited_for(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    assert machine.seconds(lambda: log.append("run"), "cuda") == 0.25
    assert log == ["idle", "record", "run", "record", "wait"]


def test_memory_on_a_gpu_is_the_allocators(monkeypatch):
    for name, value in {"reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 170}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert measure.extra_memory(lambda: None, "cuda") == 70


def test_a_gpu_is_described(monkeypatch):
    properties = SimpleNamespace(
        name="H", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    described = machine.describe("cuda")
    assert described["gpu"] == "H" and described["compute_capability"] == "9.0" and described["l2_cache"] == 50 << 20
    assert described["cpu"] and "gpu" not in machine.describe()


def test_rates_are_measured_in_every_precision():
    before = torch.get_float32_matmul_precision()
    rates = machine.measure_rates("cpu", small=True)
    assert list(rates.product) == ["float32", "tf32", "bfloat16"] and rates.copy > 0
    assert all(rate > 0 and how for rate, how in rates.product.values())
    assert torch.get_float32_matmul_precision() == before


def test_the_largest_batch_is_found(monkeypatch):
    benchmark = registry.load()["nt_xent"]

    def until(rows):
        def loss(z1, z2):
            if 2 * len(z1) > rows:
                raise torch.OutOfMemoryError("out of memory")
            return benchmark.naive(z1, z2)

        return {"naive": Contestant(lambda: loss, "highest")}

    found = {}
    for rows in (32, 100, 1000):
        monkeypatch.setattr(type(benchmark), "contestants", lambda *_, rows=rows: until(rows))
        found[rows] = measure.largest_batch(benchmark, (64, 8), "float32", "naive", limit=256)
    assert [r.largest for r in found.values()] == [0, 64, 256] and found[100].size == "64x8"
    assert found[100].note.startswith("failed: OutOfMemoryError") and found[1000].note == "not tried beyond 256"


def test_the_runner_takes_a_gpu_only_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device must be cpu where PyTorch finds no GPU, got cuda"):
        run.main(["--device", "cuda"])


def test_the_runner_finds_the_largest_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.machine, "measure_rates", lambda device: RATES)
    arguments = ["nt_xent", "--dtype", "float32", "--sizes", "32x8", "--against", "naive", "--repeats", "2"]
    assert run.main([*arguments, "--largest", "64", "--output", str(tmp_path)]) == 0
    assert "largest batch that fits" in capsys.readouterr().out
    rows = (tmp_path / "nt_xent.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 and sum("not tried beyond 64" in row for row in rows) == 2
