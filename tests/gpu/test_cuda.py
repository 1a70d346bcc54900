"""The CUDA library, on any machine: its kernels run on the CPU, its code for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastssl import _native
from tests.gpu.cuda_host.common.compile import (
    ARCHITECTURES,
    OPERATIONS,
    SOURCES,
    cuda_library,
    host_library,
    nvcc,
    run,
    sanitizers,
)

ROOT = Path(__file__).parents[2]
FAMILIES = [source.stem for source in SOURCES]  # each has its tests in cuda_host/<family>.py
SANITIZERS = sanitizers()
pytestmark = pytest.mark.xdist_group("cuda")  # which compiles once
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc not found")


def _run_kernels(family: str, **environment: str) -> None:
    tests = f"tests/gpu/cuda_host/{family}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider", "-pno:faulthandler", tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled_for_the_cpu(tmp_path_factory):
    return host_library(tmp_path_factory.mktemp("cuda_host"))


@pytest.mark.skipif(SANITIZERS is None, reason="no g++ with AddressSanitizer and UBSan")
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_on_the_cpu(family, compiled_for_the_cpu):
    _run_kernels(
        family,
        FASTSSL_CUDA_HOST=str(compiled_for_the_cpu),
        LD_PRELOAD=" ".join(SANITIZERS),
        ASAN_OPTIONS="detect_leaks=0",  # Python and torch free little of what they hold at exit
        OMP_NUM_THREADS="1",
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_on_the_gpu(family):
    _run_kernels(family, CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return cuda_library(tmp_path_factory.mktemp("cuda"))


@needs_nvcc
def test_every_kernel_fits_every_architecture(compiled):
    _, usages = compiled
    assert len(usages) == len({usage.kernel for usage in usages}) * len(ARCHITECTURES)
    assert {usage.architecture for usage in usages} == set(ARCHITECTURES)
    for usage in usages:
        assert usage.stack == usage.spills == 0, usage
        assert usage.registers <= 64 and usage.shared <= 48 << 10, usage


def _operations_on_cuda(library: str, *before: str) -> str:
    """Those of `library` for which it brings a kernel, in a fresh process that loads it beside this torch."""
    code = "\n".join(
        [
            "import ctypes, torch, fastssl",
            *before,
            f"torch.ops.load_library({library!r})",
            f"names = {OPERATIONS!r}",
            "dumps = [torch._C._dispatch_dump(f'fastssl::{name}') for name in names]",
            "print(*(name for name, dump in zip(names, dumps) if '\\nCUDA: registered at csrc/cuda/' in dump))",
        ]
    )
    printed = run(sys.executable, "-W", "ignore", "-c", code, cwd=ROOT)  # with a warning where a library is installed
    return printed.splitlines()[-1].split()


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: tested below")
def test_loads_beside_a_torch_without_cuda_but_for_the_stream(compiled, tmp_path):
    """Of what it asks of torch, only the current stream is in torch's library for CUDA: here something else has it."""
    source, stand_in = tmp_path / "stream.c", tmp_path / "stream.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }")
    run(os.environ.get("CC", "gcc"), "-shared", "-fPIC", source, "-o", stand_in)
    library, _ = compiled
    assert _operations_on_cuda(str(library), f"ctypes.CDLL({str(stand_in)!r}, ctypes.RTLD_GLOBAL)") == OPERATIONS


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_loads_beside_a_torch_with_cuda(compiled):
    library, _ = compiled
    assert _operations_on_cuda(str(library)) == OPERATIONS


@needs_nvcc
def test_library_holds_no_path_of_the_machine_that_built_it(compiled):
    contents = compiled[0].read_bytes()
    for path in (ROOT, Path(torch.__file__).parent, sys.prefix):
        assert os.fsencode(path) not in contents


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_does_not_load_it(tmp_path):
    (tmp_path / "_C_cuda.so").touch()
    assert _native._load("_C_cuda", tmp_path) == f"torch {torch.__version__} was built without CUDA"
