"""Loads the native libraries, best-effort.

Where one is missing or does not load, the reason is kept for `python -m fastssl`, and the portable code stands in.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from fastssl import ops  # noqa: F401  (defines the operations that the libraries implement)

_PACKAGE = Path(__file__).parent


def _load(name: str, package: Path) -> str | None:
    """Load the library `name` of `package`. None, or why it is not loaded."""
    record = package / "_build.json"
    build = json.loads(record.read_text()) if record.exists() else {"torch": None, "error": None}
    path = next((p for p in (package / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES) if p.exists()), None)
    if path is None:
        return build.get("error" if name == "_C" else "cuda_error") or "not built"
    if name == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    # _C speaks torch's C++ ABI, which changes between minor versions; _C_cuda keeps to the stable one.
    if name == "_C" and _minor(build["torch"]) != _minor(torch.__version__):
        return f"built with torch {build['torch']}, which torch {torch.__version__} does not match"
    try:
        torch.ops.load_library(str(path))
        if name == "_C":
            import_module("fastssl._C").register_kernels()
    except (OSError, ImportError) as error:
        return f"does not load: {error}"
    except (AttributeError, RuntimeError) as error:  # its kernels are those of older sources, or of newer ones
        return f"built from other sources, build it again: {' '.join(str(error).split()[:25])}"
    return None


def _minor(version: str | None) -> str | None:
    """The part of a version that C++ code is tied to: "2.13" of "2.13.0+cpu"."""
    return version and ".".join(version.split(".")[:2])


_status = {name: _load(name, _PACKAGE) for name in ("_C", "_C_cuda")}


def status() -> dict[str, str | None]:
    """For each native library None where it is loaded, else why it is not."""
    return dict(_status)
