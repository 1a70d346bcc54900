"""What the tests share: every operation's samples, every kernel that this machine can run, and comparisons."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

import fastssl
from benchmarks.ops import peers
from fastssl import _native
from fastssl.patch import PEERS
from fastssl.reference import OPS
from tests.accuracy import dtype_of
from tests.devices import DEVICES, MadeOn, device_param

if _native.status()["_C"] is None:
    from fastssl import _C

    INSTRUCTION_SETS = _C.available_isas()
else:
    INSTRUCTION_SETS = []

PORTABLE = pytest.param("portable", marks=pytest.mark.unsanitized)


def pytest_terminal_summary(terminalreporter):
    if DEVICES == ("cpu",):
        terminalreporter.write_line("The tests for a GPU did not run: PyTorch finds none.", yellow=True)
    missing = [name for name in PEERS if name != "dinov2" and find_spec(name) is None]  # which no index has
    if missing:
        terminalreporter.write_line(f"The tests beside {', '.join(missing)} did not run: not installed.", yellow=True)


def pytest_collection_modifyitems(config, items):
    """Drops the repetitions of one and the same test: an operation without C++ knows no instruction sets, nor does one
    that multiplies matrices of float64, which the portable code does, nor a GPU."""

    def repeats(item: pytest.Item) -> bool:
        params = getattr(item, "callspec", None) and item.callspec.params or {}
        name = params["spec"].name if "spec" in params else params.get("name")
        native = torch._C._dispatch_has_kernel_for_dispatch_key
        if params.get("kernels") in KERNELS[1:] and ("sample" in params or "device" in params):
            on_gpu = item.get_closest_marker("gpu") is not None
            if on_gpu != (params["kernels"] == ON_GPU):
                return True
        if params.get("kernels") not in INSTRUCTION_SETS or name not in OPS:
            return False
        if not OPS[name].op or not native(f"fastssl::{OPS[name].op}", "CPU"):
            return True
        double = "sample" in params and dtype_of(params["sample"]) == torch.float64
        return double and OPS[name].multiplies is not None

    config.hook.pytest_deselected(items=[item for item in items if repeats(item)])
    items[:] = [item for item in items if not repeats(item)]


@pytest.fixture(params=["auto", PORTABLE])
def backend(request):
    """Runs the test with the kernels that users get, and with the portable code."""
    with fastssl.use_backend(request.param):
        yield request.param


ON_GPU = "auto on a GPU"
KERNELS = [PORTABLE, *(INSTRUCTION_SETS or ["auto"]), *([ON_GPU] if len(DEVICES) > 1 else [])]


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Runs the test with the portable code, with every instruction set of the C++ library that this CPU has, and with
    the kernels for a GPU if there is one."""
    if request.param not in INSTRUCTION_SETS:
        with fastssl.use_backend("auto" if request.param == ON_GPU else request.param):
            yield request.param
        return
    before = _C.current_isa()
    _C.set_current_isa(request.param)
    yield request.param
    _C.set_current_isa(before)


@pytest.fixture(autouse=True)
def _global_settings():
    """Leaves PyTorch's global settings as they were."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[device_param(device) for device in DEVICES])
def device(request):
    """Runs the test on every device, where tensors and modules are made unless it says otherwise."""
    with nullcontext() if request.param == "cpu" else MadeOn(request.param):
        yield request.param


@pytest.fixture
def medium():
    """Products of float32 tensors in bfloat16."""
    torch.set_float32_matmul_precision("medium")


def _peer(name: str):
    """A fixture: what `peers` returns by that name."""

    @pytest.fixture(scope="session", name=name)
    def load():
        if name == "transformers" and sys.version_info < (3, 11):
            pytest.skip("the versions of transformers that are supported want Python 3.11")
        try:
            return getattr(peers, name)()
        except ImportError as error:
            pytest.skip(str(error))

    return load


lightly, lightly_nt_xent_loss, open_clip, open_clip_transformer, timm = map(
    _peer, ("lightly", "lightly_nt_xent_loss", "open_clip", "open_clip_transformer", "timm")
)
sentence_transformers, transformers = map(_peer, ("sentence_transformers", "transformers"))
