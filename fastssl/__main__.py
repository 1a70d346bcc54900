"""`python -m fastssl`: what was built, what was found, what was not and why, and what runs where; with `check`, whether
it is right; with `bench`, how fast."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import sys
from pathlib import Path

import torch

import fastssl
from fastssl import _native

_REMEDY = "have torch and a C++20 compiler (on Debian: apt install g++), then install fastssl-kernels again"


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
    return "C++" if "csrc/" in registered[1] else "Triton"


def report() -> None:
    """Print what was built and found, and what runs where."""
    cuda_library = _native.status()["_C_cuda"]
    parts = {
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
    width = max(len(label) for rows in parts.values() for label, _ in rows) + 2
    for title, rows in parts.items():
        print(title)
        for label, value in rows:
            print(f"  {label:<{width}}{value}")


def check(device: str) -> bool:
    """Print for each operation how many of its samples are as right as in eager PyTorch. Returns whether all are."""
    from fastssl._smoke import smoke

    failed = []
    for name, passed, wrong in smoke(device):
        print(f"{'FAILED' if wrong else 'ok':<8}{name:<29}{passed} right" + f", then {wrong}" * bool(wrong), flush=True)
        failed += [name] * bool(wrong)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "All operations are right.")
    return not failed


def bench(operations: list[str], folder: Path) -> bool:
    """Measure operations beside eager PyTorch, where the benchmarks are. Returns whether all results were right."""
    source = Path(fastssl.__file__).parents[1]  # of an editable installation
    if (source / "benchmarks" / "ops").is_dir():
        sys.path.insert(0, str(source))
    if importlib.util.find_spec("benchmarks") is None or importlib.util.find_spec("benchmarks.ops") is None:
        sys.exit(
            "The benchmarks are not installed with the package: they lie in the folder benchmarks/ of its source, where"
            " this command finds them, and `make bench` runs all."
        )
    if missing := [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]:
        sys.exit(f'{" and ".join(missing)} not found: pip install "fastssl-kernels[bench]"')
    from rich.console import Console

    from benchmarks.ops import quick, registry

    known = {name for b in registry.load().values() for name in (b.family, b.op, b.name)}
    if unknown := set(operations) - known:
        sys.exit(f"operation must be one of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    return quick.bench(operations, folder, Console())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastssl", description="What was built, and what runs where.")
    commands = parser.add_subparsers(dest="command", metavar="{check,bench}")
    command = commands.add_parser("check", help="a few calls of every operation against float64")
    command.add_argument("--device", default="cpu", help="that of the inputs (default: cpu)")
    command = commands.add_parser("bench", help="a minute of every operation beside eager PyTorch: a table, and a plot")
    command.add_argument("operation", nargs="*", help="operations or families (default: all)")
    command.add_argument("--output", type=Path, default=Path("results"), help="folder of the plot (default: results)")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        try:
            torch.zeros((), device=arguments.device).item()
        except (RuntimeError, AssertionError):  # the latter without CUDA
            parser.error(f"--device must be one that PyTorch finds, and has numbers, got {arguments.device}")
        return int(not check(arguments.device))
    if arguments.command == "bench":
        return int(not bench(arguments.operation, arguments.output))
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
