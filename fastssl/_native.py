"""Loads the native libraries, best-effort.

Where one is missing or does not load, the reason is kept for `python -m fastssl`, and the portable code stands in.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import torch

from fastssl import ops  # noqa: F401  (defines the operations that the libraries implement)

_PACKAGE = Path(__file__).parent


def _load(name: str, package: Path) -> str | None:
    """Load the library `name` of `package`. None, or why it is not loaded."""
    record = package / "_build.json"
    build = json.loads(record.read_text()) if record.exists() else {}
    path = package / f"{name}.so"
    if name == "_C":  # speaks torch's C++ ABI, which changes between minor versions; _C_cuda keeps to the stable one
        minor = ".".join(torch.__version__.split(".")[:2])
        path = package / f"_C-torch{minor}.so"
        others = [p.stem.removeprefix("_C-torch") for p in package.glob("_C-torch*.so")]
        if others and not path.exists():
            others.sort(key=lambda version: [int(n) for n in re.findall(r"\d+", version)])
            why = f"built for torch {', '.join(others)}, and not for torch {torch.__version__}"
            warnings.warn(f"fastssl runs without its C++ kernels, which were {why}", RuntimeWarning, stacklevel=2)
            return why
    if not path.exists():
        return build.get("error" if name == "_C" else "cuda_error") or "not built"
    if name == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.ops.load_library(str(path))
        if name == "_C":
            torch.ops.fastssl_cpu.register_kernels()
    except OSError as error:
        return f"does not load: {error}"
    except (AttributeError, RuntimeError) as error:  # its kernels are those of older sources, or of newer ones
        return f"built from other sources, build it again: {' '.join(str(error).split()[:25])}"
    return None


_status = {name: _load(name, _PACKAGE) for name in ("_C", "_C_cuda")}


def status() -> dict[str, str | None]:
    """For each native library None where it is loaded, else why it is not."""
    return dict(_status)
