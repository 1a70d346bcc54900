"""Runs CMake for the native code. Where that cannot be built, fastssl installs without it and records why.

The C++ kernels are built for the torch that fastssl will run with, or for each of the torch packages whose directories
match the pattern FASTSSL_TORCH: a wheel then serves these minor versions, and requires one of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
REQUIRE = os.environ.get("FASTSSL_BUILD") == "require"
TORCH = os.environ.get("FASTSSL_TORCH", "")
_FIND_TORCH = "import os, torch; print(os.path.dirname(torch.__file__))"


class BuildError(Exception):
    """Why there is no native code, in words for the person who installs."""


def minor_of(torch: Path) -> int:
    """The x of 2.x, the version of the torch package in a directory."""
    version = re.search(r"__version__ = '(.*)'", (torch / "version.py").read_text())[1]
    numbers = tuple(map(int, version.split(".")[:2]))
    if numbers < (2, 10):
        raise BuildError(f"torch must be 2.10 or newer, got {version}")
    return numbers[1]


def find_torches(pattern: str = TORCH) -> list[Path]:
    """The directories of the torch packages to build for, the oldest version first."""
    directories = [Path(directory).resolve() for directory in glob(pattern)] if pattern else [find_torch()]
    if not directories:
        raise BuildError(f"FASTSSL_TORCH must match torch packages, got {pattern}")
    return sorted(directories, key=minor_of)


def find_torch() -> Path:
    """The directory of the torch that fastssl will run with.

    pip builds in an isolated environment, made with PYTHONPATH, that hides it: there this looks around it.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    for environment in (os.environ, {k: v for k, v in os.environ.items() if k not in hidden}):
        found = subprocess.run(
            [sys.executable, "-c", _FIND_TORCH], capture_output=True, text=True, env=environment, cwd=sys.prefix
        )
        if found.returncode == 0:
            return Path(found.stdout.strip().splitlines()[-1])
    reason = (found.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise BuildError(f"no torch to build against when fastssl was installed ({reason})")


def requirement(pattern: str = TORCH) -> str:
    """What the sources require, or a wheel for the torch packages that match the pattern."""
    if not pattern:
        return "torch>=2.10"
    minors = [minor_of(torch) for torch in find_torches(pattern)]
    return f"torch>=2.{minors[0]},<2.{minors[-1] + 1}"


def description(project: str) -> str:
    """README.md as an index shows it: its links lead to the Source that pyproject.toml names, where it names one."""
    text = (ROOT / "README.md").read_text()
    source = re.search(r'^Source = "(.+?)/?"$', project, re.MULTILINE)
    if source is None:
        return text
    relative = r"(!?)(\[[^]]*\]\()(?!https?:|#)"
    return re.sub(relative, lambda m: f"{m[0]}{source[1]}/{'raw' if m[1] else 'blob'}/HEAD/", text)


def run(*command: str) -> None:
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"}
    )
    print(done.stdout, flush=True)
    if done.returncode:
        cmake_error = r"^CMake Error.*\n((?:\s+.*\n)+)"  # its message is the indented lines below
        compiler_error = r"^(.*\berror: .*)$"
        found = re.search(f"{cmake_error}|{compiler_error}", done.stdout, re.MULTILINE)
        message = " ".join((found[1] or found[2]).split()) if found else f"exit status {done.returncode}"
        raise BuildError(f"{Path(command[0]).name} failed: {message}")


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if path is None:
        raise BuildError(f"{name} not found")
    return path


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, as CMake has it, or what lies where it usually does."""
    places = [os.environ.get("PATH", ""), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join(map(str, places)))


def cuda_architectures(wanted: str) -> str:
    """TORCH_CUDA_ARCH_LIST, such as "8.0 9.0+PTX", as CMake has it: "80-real;90"."""
    found = []
    for name in filter(None, re.split(r"[\s;,]+", wanted)):
        parts = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if parts is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST must have versions such as 9.0 or 9.0+PTX, got {name}")
        found.append(parts[1] + parts[2] + ("" if parts[3] else "-real"))
    return ";".join(found)


class BuildNative(build_ext):
    def run(self) -> None:
        package = ROOT / "fastssl" if self.inplace else Path(self.build_lib).resolve() / "fastssl"
        package.mkdir(parents=True, exist_ok=True)
        for library in package.glob("_C*.so"):
            library.unlink()  # an old one must not outlive a failed build
        record = {"error": None, "cuda_error": None}
        torches: list[Path] = []
        try:
            torches = find_torches()
            build = self.compile("_C", torches)
            for torch in torches:
                shutil.copy2(build / f"_C-torch2.{minor_of(torch)}.so", package)
        except BuildError as error:
            if REQUIRE:
                raise
            record["error"] = str(error)
            print(f"fastssl: installing without its C++ kernels: {error}", file=sys.stderr, flush=True)
        nvcc = find_nvcc()
        if nvcc is None:
            record["cuda_error"] = "no nvcc when fastssl was installed"
        elif not torches:
            record["cuda_error"] = record["error"]
        else:
            try:
                architectures = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
                options = f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFASTSSL_CUDA_ARCHITECTURES={architectures}"
                shutil.copy2(self.compile("_C_cuda", torches[-1:], *options) / "_C_cuda.so", package)
            except BuildError as error:
                if REQUIRE:
                    raise
                record["cuda_error"] = str(error)
                print(f"fastssl: installing without its CUDA kernels: {error}", file=sys.stderr, flush=True)
        (package / "_build.json").write_text(json.dumps(record))

    def compile(self, target: str, torches: list[Path], *options: str) -> Path:
        # setuptools gives editable builds a temporary directory; here they keep theirs, to compile only what changed.
        build = (ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp)).resolve() / target
        cmake, ninja = tool("cmake"), tool("ninja")
        run(
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DTORCH_DIR={';'.join(map(str, torches))}",
            f"-DCMAKE_CXX_FLAGS={os.environ.get('CXXFLAGS', '')}",  # CMake itself reads it only once per directory
            *options,
        )  # fmt: skip
        run(cmake, "--build", str(build), "--target", target)
        return build

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class TagWheel(bdist_wheel):
    """The native code depends on the machine, and on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    install_requires=[requirement()],
    long_description=description((ROOT / "pyproject.toml").read_text()),
    long_description_content_type="text/markdown",
    packages=[
        *find_packages(include=["fastssl", "fastssl.*"], exclude=["fastssl.kernels*"]),
        "fastssl.kernels",
        *(f"fastssl.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastssl": "fastssl", "fastssl.kernels": "kernels"},
    ext_modules=[Extension("fastssl._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": TagWheel},
)
