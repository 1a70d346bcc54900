"""The native library: how it is loaded, how its absence is reported, and which instruction set it uses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastssl
from fastssl import _native
from fastssl.reference import OPS
from fastssl.reference import contrastive as reference
from tests.accuracy import tensors_of
from tests.recorder import recorded_calls

PACKAGE = Path(fastssl.__file__).parent
LIBRARY = f"_C-torch{'.'.join(torch.__version__.split('.')[:2])}.so"
WHY_NOT = _native.status()["_C"]
AUTOGRAD = [
    spec
    for spec in OPS.values()
    if hasattr(torch.ops.fastssl, f"{spec.op}_backward")
    and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastssl::{spec.op}", "AutogradCPU")
]
needs_library = pytest.mark.skipif(WHY_NOT is not None, reason=f"the C++ library is not loaded: {WHY_NOT}")


def isas() -> list[str]:
    if WHY_NOT:
        return []
    from fastssl import _C

    return _C.available_isas()


def python(*arguments: str, cwd: Path = PACKAGE.parent, **environment: str) -> str:
    """What a fresh interpreter prints, which imports the fastssl that lies in `cwd`."""
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package(directory: Path, *, error: str | None = None, **libraries: bytes) -> Path:
    (directory / "_build.json").write_text(json.dumps({"error": error}))
    for name, contents in libraries.items():
        (directory / name).write_bytes(contents)
    return directory


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({"error": "cmake not found"}, "cmake not found"),
        ({}, "not built"),
        ({LIBRARY: b"no library"}, "does not load: .*_C-torch.*.so"),
    ],
)
def test_a_library_that_cannot_be_loaded_leaves_a_reason(tmp_path, contents, reason):
    assert re.search(reason, _native._load("_C", package(tmp_path, **contents)))


def test_a_library_for_other_versions_of_torch_is_left_alone_and_not_silently(tmp_path):
    package(tmp_path, **{"_C-torch1.13.so": b"", "_C-torch1.9.so": b""})
    with pytest.warns(
        RuntimeWarning, match="without its C.. kernels, which were built for torch 1.9, 1.13, and not for"
    ):
        reason = _native._load("_C", tmp_path)
    assert reason == f"built for torch 1.9, 1.13, and not for torch {torch.__version__}"


def test_reason_without_a_build_record(tmp_path):
    assert _native._load("_C", tmp_path) == "not built"
    assert _native._load("_C_cuda", package(tmp_path, error="no torch")) == "not built"


def test_import_survives_a_corrupt_library(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "fastssl", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    package(copy, **{LIBRARY: b"no library"})
    code = "import torch, fastssl; z = torch.eye(4); print(fastssl.functional.nt_xent(z, z).item())"
    loss = float(python("-c", code, cwd=tmp_path))
    z = torch.eye(4)
    assert loss == pytest.approx(reference.nt_xent(z, z, temperature=0.5).item(), rel=1e-6)
    report = python("-m", "fastssl", cwd=tmp_path)
    assert "not loaded: does not load:" in report
    assert "CPU portable PyTorch" in report


@needs_library
def test_import_survives_a_library_of_other_sources(tmp_path):
    """As one that was not built again after an operation got another argument."""
    copy = shutil.copytree(PACKAGE, tmp_path / "fastssl", ignore=shutil.ignore_patterns("__pycache__"))
    source = copy / "ops" / "memory_bank.py"
    source.write_text(source.read_text().replace("bool normalize)", "bool normalize, bool another=False)"))
    code = "import torch, fastssl; z = torch.eye(4); print(fastssl.functional.nt_xent(z, z).item())"
    z = torch.eye(4)
    assert float(python("-c", code, cwd=tmp_path)) == pytest.approx(reference.nt_xent(z, z).item(), rel=1e-6)
    report = python("-m", "fastssl", cwd=tmp_path)
    assert re.search("not loaded: built from other sources, build it again: .*fastssl::enqueue_", report)
    assert "CPU portable PyTorch" in report


@needs_library
def test_every_operation_with_a_kernel_says_so():
    report = python("-m", "fastssl")
    rows = [line.split() for line in report.splitlines()]
    assert ["nt_xent", "CPU", "C++,", "CUDA"] in [row[:4] for row in rows]


@needs_library
@pytest.mark.parametrize("spec", AUTOGRAD, ids=lambda spec: spec.name)
@pytest.mark.parametrize("some", [slice(None), slice(1), slice(1, 2), slice(2, None)])
def test_autograd_is_the_portable_variants(spec, some):
    """Which outputs are differentiable, and the gradients of all tensors, or of some, where the others ask for none."""
    sample = next(sample for sample in spec.samples(torch.float32, "cpu") if len(sample.args[0]) > 2)
    call = next(args for op, args in recorded_calls(spec, sample) if op._opname == spec.op)
    results = []
    for name in (spec.op, f"{spec.op}_portable"):
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
        schema, backward = (getattr(torch.ops.fastssl, n).default._schema for n in (spec.op, f"{spec.op}_backward"))
        gradients = {result.name for result in backward.returns}
        named = zip((argument.name for argument in schema.arguments), arguments, strict=True)
        leaves = [x.requires_grad_() for n, x in named if f"grad_{n}" in gradients][some]
        for x in (x for x in arguments if isinstance(x, torch.Tensor) and all(x is not y for y in leaves)):
            x.requires_grad_(False)
        outputs = tensors_of(getattr(torch.ops.fastssl, name)(*arguments))
        differentiable = [x.requires_grad for x in outputs]
        assert any(differentiable) == bool(leaves)
        value = sum((i + 1) * x.where(x > 0, 1).log().sum() for i, x in enumerate(outputs) if x.requires_grad)
        results.append((differentiable, torch.autograd.grad(value, leaves) if leaves else ()))
    assert results[0][0] == results[1][0]
    for gradient, expected in zip(*(gradients for _, gradients in results), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_import_brings_no_inputs_of_tests():
    code = "import sys, fastssl.nn, fastssl.optim; print([m for m in sys.modules if 'samples' in m])"
    assert python("-c", code) == "[]"


def _is_left_to_python(name: str) -> bool:
    """Whether it takes lists of tensors, or gradients in the forward pass."""
    forward, backward = (getattr(torch.ops.fastssl, n).default._schema for n in (name, f"{name}_backward"))
    arguments = {argument.name for argument in backward.arguments}
    taken = any(output.name.startswith("kept_") and output.name not in arguments for output in forward.returns)
    return taken or "Tensor[]" in str(forward)


@needs_library
def test_autograd_knows_every_operation_with_a_backward_operation():
    names = {n.removeprefix("fastssl::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastssl::")}
    expected = {name for name in names if f"{name}_backward" in names and not _is_left_to_python(name)}
    assert "nt_xent" in expected and "prototype_distillation_loss" not in expected
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {name for name in names if has_kernel(f"fastssl::{name}", "AutogradCPU")} == expected


def test_import_leaves_the_compiler_alone():
    """torch._dynamo takes longer to import than all else."""
    assert python("-c", "import sys, fastssl; print('torch._dynamo' in sys.modules)") == "False"


@needs_library
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_aten_cpu_capability_is_obeyed(capability):
    best_within = {"default": ["default"], "avx2": ["default", "avx2"]}.get(capability, isas())
    expected = [isa for isa in isas() if isa in best_within][-1]
    if capability not in isas():
        pytest.skip(f"this CPU, or this build, has no {capability}")
    code = "import fastssl; from fastssl import _C; print(_C.current_isa())"
    assert python("-c", code, ATEN_CPU_CAPABILITY=capability) == expected


@needs_library
def test_instruction_sets_are_nested():
    from fastssl import _C

    built, available = _C.built_isas(), _C.available_isas()
    assert available == [isa for isa in built if isa in available]
    assert available[0] == "default"
    with pytest.raises(ValueError, match="name must be .* got 'mmx'"):
        _C.set_current_isa("mmx")
    for isa in set(built) - set(available):
        with pytest.raises(ValueError, match=f"got '{isa}'"):
            _C.set_current_isa(isa)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("built", [(), ("AVX2", "AVX512", "AVX512_BF16")], ids=["on Arm", "on x86-64"])
def test_tables_are_chosen_among_the_instruction_sets_that_are_built(tmp_path, built):
    source = tmp_path / "tables.cpp"
    tables = "".join(f"namespace {isa} {{ const double table = 1; }}" for isa in ("baseline", *map(str.lower, built)))
    function = "double chosen() { return FASTSSL_TABLE_IN_USE(table); }"
    source.write_text(f'#include "common/isa.h"\nnamespace fastssl {{ {tables} {function} }}\n')
    definitions = [f"-DFASTSSL_HAVE_{isa}" for isa in built]
    include = Path(__file__).parents[2] / "csrc" / "cpu"
    command = ["c++", "-std=c++20", "-fsyntax-only", f"-I{include}", *definitions, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_no_second_openmp_runtime():
    code = """
import re, torch
def runtimes():
    torch.randn(512, 512).softmax(1)
    return sorted(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read())))
before = runtimes()
import fastssl
z = torch.randn(512, 64)
fastssl.functional.nt_xent(z, z)
print(before == runtimes(), len(before))
"""
    assert python("-c", code) == "True 1"


@needs_library
def test_library_serves_every_python():
    assert not re.search(rb"\0_?Py[A-Z]?\w*_[A-Z]\w+\0", (PACKAGE / LIBRARY).read_bytes()), "symbols of Python's"


@needs_library
def test_library_holds_no_path_of_the_machine_that_built_it():
    contents = (PACKAGE / LIBRARY).read_bytes()
    for path in (Path(__file__).parents[2], Path(torch.__file__).parent, sys.prefix):
        assert os.fsencode(path) not in contents
