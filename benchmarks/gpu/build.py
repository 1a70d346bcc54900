"""Installs this tree in place, with the kernels for the machine's own GPU, unless that has been done."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from benchmarks.gpu.commands import ROOT
from benchmarks.ops import machine

_CHECK = """
import importlib, sys, torch, fastssl
from fastssl import _native
missing = {name: why for name, why in _native.status().items() if why and (name == "_C" or torch.cuda.is_available())}
importlib.import_module("fastssl.kernels")
print(missing or "built")
sys.exit(bool(missing))
"""


def _check() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _CHECK], cwd=ROOT, capture_output=True, text=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    arguments = parser.parse_args(argv)
    machine.require(arguments.device)
    if (check := _check()).returncode == 0:
        print(check.stdout, end="")
        return 0
    capability = torch.cuda.get_device_capability() if arguments.device == "cuda" else (9, 0)  # as good as any
    environment = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability), **os.environ}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", ".", "-v"]
    built = subprocess.run(pip, cwd=ROOT, env=environment)
    check = _check()
    print(check.stdout, check.stderr)
    return built.returncode or check.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
