"""Memory of large tensors, which is kept for the next ones (csrc/cpu/common/pages.cpp)."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastssl.functional import gather_tokens

if not torch._C._dispatch_has_kernel_for_dispatch_key("fastssl::gather_tokens", "CPU"):
    pytest.skip("the C++ library is not built", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("kept under Linux alone", allow_module_level=True)

from fastssl import _C

_MIB = 1 << 20


def _rows(mebibytes: int, value: float = 1) -> torch.Tensor:
    """A tensor of a kernel's, of so many MiB."""
    token = torch.full((1, 1, 1024), float(value))
    return gather_tokens(token, torch.zeros(1, 256 * mebibytes, dtype=torch.int64))


def _lazily_free() -> int:
    """Bytes that Linux may take without asking."""
    found = re.search(r"^LazyFree: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) << 10


def _faults(*mebibytes: int) -> int:
    command = """
        import resource, sys, torch
        from tests.ops.test_kept_memory import _rows
        torch.set_num_threads(1)
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [_rows(int(size)) for size in sys.argv[1:]]
            del tensors
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(command), *map(str, mebibytes)]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stdout)


def test_tensors_get_the_pages_of_those_before():
    assert _faults(48, 9, 9, 9, 9) < 12  # pages of 2 MiB would be 44, small ones 21,504


def test_what_is_kept_may_be_taken():
    _C.release_kept_memory()
    before = _lazily_free()
    rows = _rows(48), _rows(9)
    assert _lazily_free() - before < _MIB
    del rows
    assert 57 * _MIB <= _lazily_free() - before <= 58 * _MIB  # in whole pages of 2 MiB, where the system has them
    _C.release_kept_memory()
    assert _lazily_free() - before < _MIB


def test_profilers_see_tensors_come_and_go():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(2):
            _rows(48)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert [size >> 20 for size in sizes if abs(size) >= 48 * _MIB] == [48, -48, 48, -48]


def test_tensors_that_live_are_left_alone():
    """Of one size, of several, resized, and on several threads at once."""

    def check(seed: int) -> bool:
        kept = [_rows(34, seed), _rows(40, seed + 1)]
        for i in range(10):
            _rows(34 + 3 * (i % 3), -1)
        kept[0].resize_(1, 512 * 34, 1024)
        right = [(x.flatten()[: 256 * 1024] == seed + i).all() for i, x in enumerate(kept)]
        return all(right)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(8)))


def test_a_small_tensor_does_not_keep_a_large_ones_memory():
    _C.release_kept_memory()
    address = _rows(128).data_ptr()
    assert _rows(40).data_ptr() != address
    assert _rows(80).data_ptr() == address


def test_deterministic_mode_fills_new_tensors():
    address = _rows(40).data_ptr()
    torch.use_deterministic_algorithms(True)
    x = _rows(40)
    assert x.data_ptr() != address
    x.resize_(1, 512 * 40, 1024)
    assert x[:, 256 * 40 :].isnan().all() and (x[:, : 256 * 40] == 1).all()
