"""`python -m fastssl`: what was built, what was found, what was not and why, and what runs where."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import torch

import fastssl
from fastssl import _native

_REMEDY = (
    "have torch, a C++20 compiler and Python's headers (on Debian: apt install g++ python3-dev),"
    " then install fastssl-kernels again"
)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cpu_library() -> list[tuple[str, str]]:
    reason = _native.status()["_C"]
    if reason:
        return [("C++ library", f"not loaded: {reason}"), ("to get it", _REMEDY)]
    from fastssl import _C

    return [
        ("C++ library", f"loaded, built by {_C.compiler} with torch {_C.torch_version}"),
        ("instruction sets built", ", ".join(_C.built_isas())),
        ("of these, on this CPU", ", ".join(_C.available_isas())),
        ("in use", _C.current_isa()),
        ("threads", str(torch.get_num_threads() if _C.openmp else "1: built without GCC's OpenMP")),
    ]


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_devices() -> str:
    if torch.version.cuda is None:
        return "none: this torch was built without CUDA"
    return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none found"


def _kernels() -> list[tuple[str, str]]:
    """For each operation what computes it, as PyTorch's dispatcher has it."""
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastssl::"))
    return [
        (name.removeprefix("fastssl::"), f"CPU {_kernel(name, 'CPU')}, CUDA {_kernel(name, 'CUDA')}")
        for name in names
        if not re.search("_portable_?$", name)
    ]


def _kernel(name: str, key: str) -> str:
    registered = re.search(f"^{key}: registered at (.*)", torch._C._dispatch_dump(name), re.MULTILINE)
    if registered is None:
        return "portable PyTorch"
    return "C++" if registered[1].startswith("csrc/") else "Triton"


def main() -> None:
    """Print the report."""
    cuda_library = _native.status()["_C_cuda"]
    report = {
        f"fastssl {fastssl.__version__}": [
            ("location", str(Path(fastssl.__file__).parent)),
            ("torch", torch.__version__),
            ("Python", platform.python_version()),
            ("system", platform.platform()),
        ],
        "CPU": [("model", _cpu_name()), *_cpu_library()],
        "CUDA": [
            ("devices", _cuda_devices()),
            ("Triton", _triton()),
            ("CUDA library", f"not loaded: {cuda_library}" if cuda_library else "loaded"),
        ],
        "What runs (float64 and other devices: portable PyTorch)": _kernels(),
    }
    width = max(len(label) for rows in report.values() for label, _ in rows) + 2
    for title, rows in report.items():
        print(title)
        for label, value in rows:
            print(f"  {label:<{width}}{value}")


if __name__ == "__main__":
    main()
