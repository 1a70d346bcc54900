"""Installs this tree in place, with the kernels for the machine's own GPU, unless that has been done."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.gpu.commands import ROOT

_CHECK = """
import importlib, sys, torch, fastssl
from fastssl import _native
missing = {name: why for name, why in _native.status().items() if why and (name == "_C" or torch.cuda.is_available())}
importlib.import_module("fastssl.kernels")
print(missing or "built")
sys.exit(bool(missing))
"""
_CAPABILITY = "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))"


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    arguments = parser.parse_args(argv)
    if (check := _run(_CHECK)).returncode == 0:
        print(check.stdout, end="")
        return 0
    environment = dict(os.environ)
    if arguments.device == "cuda":
        environment.setdefault("TORCH_CUDA_ARCH_LIST", _run(_CAPABILITY).stdout.strip())
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", ".", "-v"]
    built = subprocess.run(pip, cwd=ROOT, env=environment)
    check = _run(_CHECK)
    print(check.stdout, check.stderr)
    return built.returncode or check.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
