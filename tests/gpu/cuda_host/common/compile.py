"""Compiles csrc/cuda: with the C++ compiler to run on the CPU, and with nvcc for every architecture.

`python -m tests.gpu.cuda_host.common.compile` prints what each kernel takes of each GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
TORCH = Path(torch.__file__).parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
OPERATIONS = re.findall(r'm\.impl\("(\w+)"', "".join(source.read_text() for source in SOURCES))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

_COMPILER = os.environ.get("CXX", "g++")
_HOST_OPTIONS = (
    "-std=c++20", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
    "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-isystem", str(TORCH / "include"), f"-I{HERE}", f"-I{ROOT / 'csrc' / 'cuda'}",
)  # fmt: skip


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout}")
    return done.stdout


def sanitizers() -> list[str] | None:
    """The libraries that a process must begin with to run what `host_library` compiles. None: this machine has none."""
    if not shutil.which(_COMPILER):
        return None
    libraries = [run(_COMPILER, f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    return libraries if all(os.path.isabs(path) for path in libraries) else None


def host_library(directory: Path) -> Path:
    """The kernels and their launchers as a library that runs on the CPU."""

    def compile_source(source: Path) -> Path:
        made = directory / f"{source.stem}.o"
        run(_COMPILER, *_HOST_OPTIONS, "-include", "torch_host.h", "-x", "c++", "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, (*SOURCES, HERE / "torch_cuda.cpp")))
    library = directory / "cuda_host.so"
    link = "-shared", "-Wl,-Bsymbolic", "-fsanitize=address,undefined", f"-L{TORCH / 'lib'}", "-ltorch_cpu"
    run(_COMPILER, *objects, *link, "-o", library)
    return library


class Usage(NamedTuple):
    """What a kernel takes on one architecture: registers of a thread; bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


def nvcc() -> str | None:
    places = [os.environ.get("PATH", ""), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join(map(str, places)))


def cuda_library(directory: Path) -> tuple[Path, list[Usage]]:
    """The library as users get it, built as setup.py does."""
    tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake, ninja = (shutil.which(name, path=tools) for name in ("cmake", "ninja"))
    run(
        cmake, "-S", ROOT, "-B", directory, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH_DIR={TORCH}", f"-DCMAKE_CUDA_COMPILER={nvcc()}",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    )  # fmt: skip
    log = run(cmake, "--build", directory, "--target", "_C_cuda")
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        log,
        re.DOTALL,
    )
    names = run("c++filt", input="\n".join(mangled for mangled, *_ in found)).splitlines()
    short = [re.sub(r"void |fastssl::|\(anonymous namespace\)::|c10::|\(.*", "", name) for name in names]
    return directory / "_C_cuda.so", [
        Usage(name, architecture, int(registers), int(shared or 0), int(stack), int(spills))
        for name, (_, architecture, stack, spills, registers, shared) in zip(short, found, strict=True)
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        _, usages = cuda_library(Path(directory))
    print("registers of a thread / bytes of shared memory")
    print(f"{'kernel':<40}" + "".join(f"{architecture:>12}" for architecture in ARCHITECTURES))
    for kernel in sorted({usage.kernel for usage in usages}):
        of = {usage.architecture: f"{usage.registers} / {usage.shared}" for usage in usages if usage.kernel == kernel}
        print(f"{kernel:<40}" + "".join(f"{of[architecture]:>12}" for architecture in ARCHITECTURES))


if __name__ == "__main__":
    main()
