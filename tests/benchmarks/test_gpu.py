"""What is run on a new machine with a GPU, rehearsed on a CPU: every stage, at toy sizes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import build, commands, counters, profile, rates, report, smoke, speed, stages
from benchmarks.gpu.commands import Command
from benchmarks.ops import machine, measure
from fastssl import _native
from fastssl.reference import OPS
from tests.benchmarks.test_benchmarks import RATES


def _run(argv: tuple[str, ...], tmp_path, seconds: float = 20.0, limit: float = 20.0) -> tuple[dict, str]:
    log = tmp_path / "log"
    result = commands.run(Command("it", argv, seconds), log, limit)
    return result, log.read_text() if log.exists() else ""


def test_a_command_leaves_its_output_and_status(tmp_path):
    result, log = _run(("sh", "-c", "echo out; echo err >&2; exit 3"), tmp_path)
    assert result["returncode"] == 3 and result["tail"] == ["out", "err"] and not result["missing"]
    assert log == "\n$ sh -c echo out; echo err >&2; exit 3\nout\nerr\n"


def test_a_command_is_a_group_of_this_session_whose_output_is_copied(tmp_path):
    code = "import os; print(os.getsid(0), os.getpgrp() == os.getpid())"
    command = Command("it", (sys.executable, "-c", code), 20, copy=tmp_path / "copy")
    commands.run(command, tmp_path / "log", 20)
    assert (tmp_path / "copy").read_text() == f"{os.getsid(0)} True\n"


def test_output_without_end_is_cut(tmp_path):
    result, log = _run(("sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x; kill -9 $$"), tmp_path)
    assert result["returncode"] == -9 and result["tail"] == ["x" * 400] and len(log) > 100000
    assert _run(("echo", "next"), tmp_path)[0]["tail"] == ["next"]


def test_tests_that_failed_are_kept_wherever_they_stand(tmp_path):
    result, _ = _run(("sh", "-c", "echo '[gw0] FAILED a'; seq 100; exit 1"), tmp_path)
    assert result["tail"][0] == "[gw0] FAILED a" and result["tail"][1:] == [str(i) for i in range(61, 101)]


@pytest.mark.parametrize("seconds, limit", [(0.3, 20.0), (20.0, 0.3)])
def test_a_command_ends_at_its_limit_with_all_that_it_started(tmp_path, seconds, limit):
    left = tmp_path / "left"
    start = time.monotonic()
    result, _ = _run(("sh", "-c", f"echo begun; (sleep 2; touch {left}) & sleep 30"), tmp_path, seconds, limit)
    assert time.monotonic() - start < 2 and result["returncode"] is None
    assert result["note"] == "ended after 0 s" and result["tail"] == ["begun"]
    time.sleep(2.2)
    assert not left.exists()


def test_what_cannot_be_started_is_said(tmp_path):
    assert _run(("sh", "-c", "exit"), tmp_path, limit=-1.0)[0]["note"] == "not started: no time left"
    result, _ = _run(("no-such-tool",), tmp_path)
    assert result["missing"] and result["note"] == "no no-such-tool here"


@pytest.fixture
def here(monkeypatch):
    """Runs the project's own modules in this process, at what it costs, and notes all other commands."""
    others = []

    def run(command, log, limit):
        result = {"name": command.name, "command": "", "seconds": 0.0, "tail": [], "returncode": 0, "note": ""}
        module, *arguments = command.argv[command.argv.index("-m") + 1 :] if "-m" in command.argv else ("",)
        if command.argv[0] == sys.executable and module.startswith("benchmarks."):
            module = module if hasattr(importlib.import_module(module), "main") else f"{module}.__main__"
            result["returncode"] = importlib.import_module(module).main(list(arguments))
        else:
            others.append(command)
        return result | {"missing": False}

    monkeypatch.setattr(commands, "run", run)
    monkeypatch.setattr(gpu, "build", lambda device: [])
    monkeypatch.setattr(machine, "measure_rates", lambda device, small=False: RATES)
    monkeypatch.setattr(smoke, "cases", lambda names: [("uniformity", "float32"), ("nt_xent", "tf32")])
    return others


def test_every_stage_on_a_cpu(here, tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(f"{name}.json" for name in stages.STAGES), "log.txt", "report.md"]
    )
    kinds = {name: {r["kind"] for r in stage["results"]} for name, stage in report.read(tmp_path).items()}
    assert kinds == {
        "environment": {"machine"},
        "correctness": {"calls", "smoke"},
        "sanitizer": set(),
        "speed": {"machine", "speed"},
        "diagnosis": {"kernel"},
    }
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "- calls that were right: 2 of 2\n" in text and "## Failures: 0" in text
    assert "| siglip_loss | 32x8 | float32 |" in text and "Largest batch of siglip_loss float32, fastssl: 64x8" in text
    tools = {os.path.basename(command.argv[0]) for command in here}
    assert {"nvidia-smi", "nvcc", "ncu", "compute-sanitizer"} <= tools


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("device, wanted", [("cpu", "9.0"), ("cuda", "12.0")])
def test_what_is_not_built_is_built_for_this_gpu(device, wanted, built, monkeypatch):
    ran = []

    def run(argv, env=None, **_):
        ran.append((argv, env))
        return subprocess.CompletedProcess(argv, int(not built and len(ran) == 1), "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.main(["--device", device]) == 0
    pips = [(argv, env) for argv, env in ran if "pip" in argv]
    assert len(pips) == (not built)
    for argv, env in pips:
        assert argv[1:4] == ["-m", "pip", "install"] and "--no-build-isolation" in argv
        assert env["TORCH_CUDA_ARCH_LIST"] == wanted


def test_whether_it_is_built_is_known():
    assert build._check().stdout.strip() in ("built", str({"_C": _native.status()["_C"]}))


def test_a_gpu_that_is_not_there_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = ["--results", str(tmp_path / "it")]
    for module, arguments in {
        build: [],
        profile: ["siglip_loss", "32x8", "bfloat16"],
        rates: results,
        smoke: results,
        speed: ["siglip_loss", *results],
    }.items():
        with pytest.raises(SystemExit, match="--device must be cpu where PyTorch finds no GPU, got cuda"):
            module.main([*arguments, "--device", "cuda"])


def test_stages_are_called_alone_and_reported_together(here, tmp_path, capsys):
    assert gpu.main(["environment", "--device", "cpu", "--out", str(tmp_path)]) == 0
    failed = {"name": "x", "returncode": 1, "missing": False, "seconds": 1.0, "tail": ["", "E: why", ""], "note": ""}
    absent = {**failed, "returncode": None, "missing": True, "note": "no ncu here"}
    wrong = {"kind": "smoke", "op": "nt_xent", "precision": "tf32", "sample": "s", "error": 1.0, "note": "wrong"}
    missing = {"kind": "speed", "op": "dcl", "size": "1x1", "mode": "tf32", "contestant": "fastssl", "largest": 0}
    missing |= dict.fromkeys(
        ("median", "value_error", "gradient_error", "extra_memory", "floor_fraction"), float("nan")
    )
    stage = {"device": "cuda", "started": "", "commands": [failed, absent]}
    (tmp_path / "speed.json").write_text(json.dumps(stage | {"results": [wrong, missing | {"note": "failed: y"}]}))
    assert gpu.main(["report", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "report.md").read_text()
    assert "Measured: float32 0.1 TFLOP/s; tf32 0.2" in text
    assert text.endswith(
        "## Failures: 3\n\n- speed: x: exit status 1: E: why\n- speed: nt_xent tf32 (s): wrong\n"
        "- speed: dcl 1x1 tf32: failed: y\n"
    )


@pytest.mark.parametrize(
    "tail, named",
    [
        (["[gw0] [ 1%] FAILED t.py::a", "[gw1] [ 2%] PASSED t.py::b"], ["[gw0] [ 1%] FAILED t.py::a"]),
        (["t.py::a FAILED  [ 1%]", "FAILED t.py::a - E: why", "=== 1 failed ==="], ["FAILED t.py::a - E: why"]),
        (["ERROR t.py - ImportError", "=== 1 error ==="], ["ERROR t.py - ImportError"]),
    ],
    ids=["cut off", "with a summary", "not collected"],
)
def test_tests_that_failed_are_named(tail, named):
    command = {"name": "tests", "returncode": None, "missing": False, "seconds": 1.0, "tail": tail, "note": "ended"}
    first, *others = report.failures({"correctness": {"commands": [command], "results": []}})
    assert first.startswith("correctness: tests: ended") and others == [f"correctness: {name}" for name in named]


def test_no_stage_takes_longer_than_it_may(tmp_path, monkeypatch):
    """Later commands get what is left; what was written before the end is kept."""

    def stage(device, scratch):
        write = 'echo \'{"kind": "x"}\' > %s; sleep 30'
        return [Command(name, ("sh", "-c", write % (scratch / name)), 60) for name in ("a", "b")]

    monkeypatch.setattr(gpu, "STAGES", {"it": stage})
    monkeypatch.setattr(gpu, "build", lambda device: [])
    start = time.monotonic()
    gpu.run_stage("it", "cpu", tmp_path, {}, seconds=0.5)
    assert time.monotonic() - start < 3
    it = json.loads((tmp_path / "it.json").read_text())
    assert it["results"] == [{"kind": "x"}]
    assert [c["note"] for c in it["commands"]] == ["ended after 0 s", "not started: no time left"]


def test_a_stage_that_is_cut_off_leaves_a_report_and_can_be_run_again(tmp_path):
    """By SIGTERM, in the middle of its second command, which ends with it."""
    code = """
from pathlib import Path
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.commands import Command
import os, signal, sys

def stage(device, scratch):
    it = 'echo \\'{"kind": "machine"}\\' > %s; echo begun; echo $$ > %s; sleep 60' % (scratch / "b", out / ".." / "pid")
    return [Command("a", ("true",), 60), Command("b", ("sh", "-c", it), 60), Command("c", ("true",), 60)]

out = Path(sys.argv[1])
gpu.STAGES["it"], gpu.build, gpu.report.render = stage, lambda device: [], lambda stages: f"rendered {len(stages)}"
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(gpu.main(["it", "--out", str(out)]))
"""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, out], cwd=commands.ROOT, stderr=subprocess.PIPE)
    while not (tmp_path / "pid").exists():
        time.sleep(0.1)
    process.terminate()
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    stage = report.read(out)["it"]
    assert [(c["name"], c["returncode"], c["note"]) for c in stage["commands"]] == [
        ("a", 0, ""),
        ("b", None, "cut off"),
    ]
    assert stage["results"] == [{"kind": "machine"}] and (out / "report.md").read_text() == "rendered 1"
    assert "begun" in (out / "log.txt").read_text() and len(list(out.iterdir())) == 3
    assert report.failures({"it": stage | {"results": []}}) == ["it: b: cut off"]


def test_a_full_disk_takes_nothing_that_was_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", {"it": lambda device, scratch: [Command("a", ("true",), 60)]})
    monkeypatch.setattr(gpu, "build", lambda device: [])
    (tmp_path / "it.json").write_text("before")

    def full(path, *args, **kwargs):
        path.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(gpu.Path, "write_text", full)
    gpu.run_stage("it", "cpu", tmp_path, found := {})
    monkeypatch.undo()
    assert found["it"]["commands"][0]["returncode"] == 0 and (tmp_path / "it.json").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "log.txt"]
    assert "not written: No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_fit_into_their_stages(device, tmp_path):
    for name, stage in stages.STAGES.items():
        limits = [command.seconds for command in stage(device, tmp_path)]
        assert sum(limits) <= stages.SECONDS or name in ("speed", "diagnosis")  # where the last ones can be left out
        for command in stage(device, tmp_path):
            if "-m" in command.argv:
                assert importlib.util.find_spec(command.argv[command.argv.index("-m") + 1]), command


def test_arguments_of_commands_are_known(tmp_path, monkeypatch):
    """Each module's own parser takes them, and ends there."""
    monkeypatch.setattr(machine, "require", lambda device: sys.exit("parsed"))
    for command in (c for stage in stages.STAGES.values() for c in stage("cuda", tmp_path)):
        module, *arguments = command.argv[command.argv.index("-m") + 1 :] if "-m" in command.argv else ("",)
        if module.startswith("benchmarks."):
            with pytest.raises(SystemExit, match="parsed"):
                importlib.import_module(module).main(list(map(str, arguments)))


@pytest.mark.parametrize("there", [True, False])
def test_tests_need_no_xdist(there, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda name: there or None)
    of_triton = next(c for c in stages.correctness("cuda", tmp_path) if "Triton" in c.name)
    assert of_triton.environment["TRITON_INTERPRET"] == "0" and "TRITON_CACHE_DIR" in of_triton.environment
    assert ("-n" in of_triton.argv) is there
    files = [name for name in of_triton.argv if name.endswith(".py")]
    assert "tests/gpu/triton_checks/sigmoid.py" in files and not any("common" in name for name in files)
    assert all((commands.ROOT / name).exists() for name in files)


def test_what_is_measured_is_kept_though_the_next_is_not(tmp_path, monkeypatch):
    """The machine's rates are read where they have been measured."""
    line = {"rates": {"product": {name: (1e9, "") for name in ("float32", "tf32", "bfloat16")}, "copy": 1e9}}
    (tmp_path / "rates").write_text(json.dumps(line))
    monkeypatch.setattr(machine, "measure_rates", None)
    right = measure.measure

    def fails(benchmark, size, *args):
        if size == (16, 8):
            raise RuntimeError("lost")
        return right(benchmark, size, *args)

    monkeypatch.setattr(measure, "measure", fails)
    files = "--rates", str(tmp_path / "rates"), "--results", str(tmp_path / "it")
    case = "siglip_loss", "--device", "cpu", "--dtype", "float32", "--against", "naive", "--repeats", "2"
    with pytest.raises(RuntimeError, match="lost"):
        speed.main([*case, *files, "--size", "32x8", "--size", "16x8"])
    found = stages.results_in(tmp_path)
    assert [(r["size"], r["contestant"]) for r in found if r.get("kind")] == [("32x8", "fastssl"), ("32x8", "naive")]


def test_a_call_that_is_wrong_is_found(monkeypatch):
    assert smoke.check(("nt_xent", "bfloat16"), "cpu")["note"] == ""
    tf32 = smoke.check(("nt_xent", "tf32"), "cpu", tiny=True)
    assert tf32["note"] == "" and tf32["error"] < 1e-5
    right = smoke.public

    def wrong(spec):
        return lambda *args, **kwargs: right(spec)(*args, **kwargs) * 1.2

    monkeypatch.setattr(smoke, "public", wrong)
    for precision in ("float32", "tf32", "bfloat16"):
        assert "AssertionError" in smoke.check(("nt_xent", precision), "cpu")["note"]


def test_a_call_finds_new_memory_poisoned(monkeypatch):
    right = smoke.public

    def reads_new_memory(spec):
        return lambda *args, **kwargs: right(spec)(*args, **kwargs) + torch.empty(4).isnan().all() * 1.0

    monkeypatch.setattr(smoke, "public", reads_new_memory)
    assert smoke.check(("uniformity", "float32"), "cpu")["note"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_operation_is_called_in_every_precision():
    found = smoke.cases()
    assert {name for name, _ in found} == set(OPS) and len(found) == len(set(found))
    assert ("nt_xent", "tf32") in found and ("gather_tokens", "tf32") not in found
    tiny, large = (smoke.sample_of(OPS["nt_xent"], torch.float32, "cpu", tiny) for tiny in (True, False))
    assert 0 < tiny.args[0].numel() < large.args[0].numel()


def _mishap(todo, device, tiny, results):
    """A worker that dies of "dies", is silent at "hangs", and loses the GPU at "loses"."""
    for name, precision in todo:
        if name == "dies":
            os._exit(7)
        if name == "hangs":
            time.sleep(60)
        lost = name == "loses"
        result = {"kind": "smoke", "op": name, "precision": precision, "error": 0.0, "note": "lost" * lost}
        results.send(result | {"lost": lost})
        if lost:
            return


def test_calls_survive_what_others_do(tmp_path):
    todo = [(name, "float32") for name in ("a", "dies", "b", "hangs", "loses", "c")]
    assert smoke.run(todo, "cpu", False, tmp_path / "smoke", _mishap, seconds=1.0, method="fork") == 3
    lines = [json.loads(line) for line in (tmp_path / "smoke").read_text().splitlines()]
    assert [line["op"] for line in lines] == [name for name, _ in todo]
    assert [line["note"] for line in lines] == [
        "",
        "ended its process with 7",
        "",
        "hangs: nothing for 1 s",
        "lost",
        "",
    ]


def test_hardware_counters_are_read_and_reported(tmp_path):
    """Of two launches of a kernel, weighted by their times; what a GPU does not count is left out."""
    head = "ID,Process ID,Kernel Name,Section Name,Metric Name,Metric Unit,Metric Value".split(",")
    values = {counters.TIME: ("1,000", "3,000"), "dram__bytes_read.sum": ("1,048,576", "0")}
    values["sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"] = "40.00", "80.00"
    values["dram__bytes_write.sum"] = "0", "2,097,152"
    values["lts__t_bytes.sum"] = "n/a", "n/a"
    rows = [[n, "7", "_loss", "Command line profiler metrics", metric, "", pair[n]]
            for n in (0, 1) for metric, pair in values.items()]  # fmt: skip
    table = [",".join(f'"{x}"' for x in row) for row in [head, *rows]]
    (tmp_path / "clip_loss 8x8.ncu").write_text("\n".join(["==PROF== Connected", *table, "==PROF== Disconnected"]))
    (tmp_path / "nt_xent 8x8.ncu").write_text("==ERROR== ERR_NVGPUCTRPERM\n")
    stage = {"device": "cuda", "started": "", "commands": [], "results": stages.results_in(tmp_path)}
    assert "| clip_loss | 8x8 | _loss | 2 | 0.004 ms | 70% |  |  | 3 MiB |" in report.render({"diagnosis": stage})


def test_what_is_asked_of_the_hardware(tmp_path):
    of_cuda = stages.diagnosis("cuda", tmp_path)
    assert [c.copy.name for c in of_cuda if c.copy] == [f"{op} {size}.ncu" for op, size in stages._KERNELS]
    assert all(c.argv[c.argv.index("--metrics") + 1].split(",") == list(counters.METRICS) for c in of_cuda if c.copy)


def test_a_step_is_profiled_bare(capsys):
    assert profile.main(["siglip_loss", "32x8", "bfloat16", "--device", "cpu", "--bare"]) == 0
    assert capsys.readouterr().out == ""
