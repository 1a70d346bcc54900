"""How long a block of code takes, how much memory it adds, how much is left, and how these are written."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from types import TracebackType

import torch

_CGROUP = Path("/sys/fs/cgroup")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Meter:
    """Context manager: wall time of its block and, on Linux if asked, the peak of the process's resident memory.

    Resident memory counts everything, whoever allocated it: tensors, a kernel's scratch, a library's buffers.
    On entry the C allocator and fastssl's kernels hand their free pages back, so that memory which the block reuses
    counts as memory which it needs, and the kernel's high-water mark (VmHWM) is reset. That slows the block:
    do not compare the times of blocks whose memory was measured. Linux counts resident pages per thread and adds
    them up late, so the result is good to about 1 MiB.

    Attributes:
        seconds: wall time.
        before: resident bytes on entry; None where memory was not asked for or cannot be measured.
        peak: highest resident bytes in the block, or None.
        extra: peak - before, or None.
    """

    def __init__(self, memory: bool = False) -> None:
        self.memory = memory and sys.platform == "linux" and os.access(_CLEAR_REFS, os.W_OK)
        self.before: int | None = None
        self.peak: int | None = None

    def __enter__(self) -> Meter:
        if self.memory:
            if hasattr(torch.ops.fastssl_cpu, "release_kept_memory"):  # the C++ library is loaded
                torch.ops.fastssl_cpu.release_kept_memory()
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR_REFS.write_text("5")
            self.before = own_memory("VmRSS")
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        if self.memory:
            self.peak = own_memory("VmHWM")

    @property
    def extra(self) -> int | None:
        return None if self.peak is None else self.peak - self.before


class CudaMeter:
    """The same of a block's work on a GPU, whose times the host does not wait for; memory is that of PyTorch's
    allocator.

    Args:
        memory: whether to measure memory, which takes no time; not in a block within one in which it is.
        device: the GPU.

    Attributes:
        seconds: between the beginning and the end of the work. Reading it waits for the end.
        before, peak, extra: as in `Meter`, of what is allocated.
    """

    def __init__(self, memory: bool, device: torch.device) -> None:
        self.memory, self._device = memory, device
        self.before: int | None = None
        self.peak: int | None = None

    def __enter__(self) -> CudaMeter:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.memory:
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
        self._start.record(torch.cuda.current_stream(self._device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.record(torch.cuda.current_stream(self._device))
        if self.memory:
            self.peak = torch.cuda.max_memory_allocated(self._device)

    @property
    def seconds(self) -> float:
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    extra = Meter.extra


def meter(memory: bool, device: torch.device) -> Meter | CudaMeter:
    """Of what is done on that device."""
    return CudaMeter(memory, device) if device.type == "cuda" else Meter(memory)


def own_memory(field: str) -> int:
    """Bytes in a field of /proc/self/status, such as VmRSS (Linux)."""
    return _kibibytes(Path("/proc/self/status"), field)


def available_memory() -> int:
    """Bytes that this process can still take: what the machine has available, within its control group's limit."""
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = [_kibibytes(Path("/proc/meminfo"), "MemAvailable")]
    for group, limit, used, cache in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        if (group / limit).exists() and (group / limit).read_text().strip() != "max":
            # Files' cached pages count as used, and are given up when memory runs short.
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / used).read_text()) - int(statistics[cache])
            available.append(int((group / limit).read_text()) - taken)
    return max(0, min(available))


def _kibibytes(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def format_seconds(seconds: float) -> str:
    """In seconds or milliseconds."""
    return f"{seconds:,.2f} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def format_bytes(size: float) -> str:
    """In GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
