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
from benchmarks.gpu import build, commands, profile, report, smoke, stages
from benchmarks.gpu.commands import Command
from benchmarks.ops import machine
from fastssl import _native
from fastssl.reference import OPS
from tests.benchmarks.test_benchmarks import RATES


def _run(argv: tuple[str, ...], tmp_path, seconds: float = 20.0, limit: float = 20.0) -> tuple[dict, str]:
    with (tmp_path / "log").open("w+") as log:
        result = commands.run(Command("it", argv, seconds), log, limit)
        log.seek(0)
        return result, log.read()


def test_a_command_leaves_its_output_and_status(tmp_path):
    result, log = _run(("sh", "-c", "echo out; echo err >&2; exit 3"), tmp_path)
    assert result["returncode"] == 3 and result["tail"] == ["out", "err"] and not result["missing"]
    assert log == "\n$ sh -c echo out; echo err >&2; exit 3\nout\nerr\n"


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
        "correctness": {"smoke"},
        "sanitizer": set(),
        "speed": {"speed"},
        "diagnosis": {"kernel"},
    }
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "Calls that were right: 2 of 2." in text and "## Failures: 0" in text
    assert "| siglip_loss | 32x8 | float32 |" in text and "Largest batch of siglip_loss float32, fastssl: 64x8" in text
    tools = {os.path.basename(command.argv[0]) for command in here}
    assert {"nvidia-smi", "nvcc", "ncu", "compute-sanitizer"} <= tools


@pytest.mark.parametrize("built", [True, False])
def test_what_is_not_built_is_built_for_this_gpu(built, monkeypatch):
    ran = []

    def run(argv, env=None, **_):
        ran.append((argv, env))
        found = "9.0\n" if argv[2] == build._CAPABILITY else ""
        return subprocess.CompletedProcess(argv, int(not built and len(ran) == 1), found, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.main(["--device", "cuda"]) == 0
    pips = [(argv, env) for argv, env in ran if "pip" in argv]
    assert len(pips) == (not built)
    for argv, env in pips:
        assert argv[1:4] == ["-m", "pip", "install"] and "--no-build-isolation" in argv
        assert env["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_whether_it_is_built_is_known():
    assert build._run(build._CHECK).stdout.strip() in ("built", str({"_C": _native.status()["_C"]}))


def test_stages_are_called_alone_and_reported_together(here, tmp_path, capsys):
    assert gpu.main(["environment", "--device", "cpu", "--out", str(tmp_path)]) == 0
    failed = {"name": "x", "returncode": 1, "missing": False, "seconds": 1.0, "tail": ["", "E: why", ""], "note": ""}
    absent = {**failed, "returncode": None, "missing": True, "note": "no ncu here"}
    wrong = {"kind": "smoke", "op": "nt_xent", "precision": "tf32", "sample": "s", "error": 1.0, "note": "wrong"}
    missing = {"kind": "speed", "op": "dcl", "size": "1x1", "mode": "tf32", "contestant": "fastssl", "largest": "0"}
    missing |= dict.fromkeys(("median", "value_error", "gradient_error", "extra_memory", "floor_fraction"), "nan")
    stage = {"device": "cuda", "started": "", "commands": [failed, absent]}
    (tmp_path / "speed.json").write_text(json.dumps(stage | {"results": [wrong, missing | {"note": "failed: y"}]}))
    assert gpu.main(["report", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "report.md").read_text()
    assert "Measured: float32 0.1 TFLOP/s; tf32 0.2" in text
    assert text.endswith(
        "## Failures: 3\n\n- speed: x: exit status 1: E: why\n- speed: nt_xent tf32 (s): wrong\n"
        "- speed: dcl 1x1 tf32: failed: y\n"
    )


def test_no_stage_takes_longer_than_it_may(tmp_path, monkeypatch):
    """Later commands get what is left; what was written before the end is kept."""

    def stage(device, scratch):
        write = 'echo \'{"kind": "x"}\' > %s; sleep 30'
        return [Command(name, ("sh", "-c", write % (scratch / name)), 60) for name in ("a", "b")]

    monkeypatch.setattr(gpu, "STAGES", {"it": stage})
    monkeypatch.setattr(gpu, "build", lambda device: [])
    start = time.monotonic()
    gpu.run_stage("it", "cpu", tmp_path, seconds=0.5)
    assert time.monotonic() - start < 3
    it = json.loads((tmp_path / "it.json").read_text())
    assert it["results"] == [{"kind": "x"}]
    assert [c["note"] for c in it["commands"]] == ["ended after 0 s", "not started: no time left"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_fit_into_their_stages(device, tmp_path):
    for name, stage in stages.STAGES.items():
        limits = [command.seconds for command in stage(device, tmp_path)]
        assert sum(limits) <= stages.SECONDS or name in ("speed", "diagnosis")  # where the last ones can be left out
        for command in stage(device, tmp_path):
            if "-m" in command.argv:
                assert importlib.util.find_spec(command.argv[command.argv.index("-m") + 1]), command
            if "benchmarks.ops" in command.argv:
                from benchmarks.ops.__main__ import _arguments

                arguments = list(command.argv[command.argv.index("benchmarks.ops") + 1 :])
                arguments[arguments.index("--device") + 1] = "cpu"
                assert _arguments(list(map(str, arguments)))


@pytest.mark.parametrize("there", [True, False])
def test_tests_need_no_xdist(there, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda name: there or None)
    of_triton = next(c for c in stages.correctness("cuda", tmp_path) if "Triton" in c.name)
    assert ("-n" in of_triton.argv) is there
    files = [name for name in of_triton.argv if name.endswith(".py")]
    assert "tests/gpu/triton_checks/sigmoid.py" in files and not any("common" in name for name in files)
    assert all((commands.ROOT / name).exists() for name in files)


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


def test_a_step_is_profiled_bare(capsys):
    assert profile.main(["siglip_loss", "32x8", "bfloat16", "--device", "cpu", "--bare"]) == 0
    assert capsys.readouterr().out == ""
