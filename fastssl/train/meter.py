"""How long a block of code takes and how much memory it adds."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from types import TracebackType

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Context manager: wall time of its block and, on Linux if asked, the peak of the process's resident memory.

    Resident memory counts everything, whoever allocated it: tensors, a kernel's scratch, a library's buffers.
    On entry the C allocator hands its free pages back (malloc_trim), so that memory which the block reuses
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
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR_REFS.write_text("5")
            self.before = _status("VmRSS")
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        if self.memory:
            self.peak = _status("VmHWM")

    @property
    def extra(self) -> int | None:
        return None if self.peak is None else self.peak - self.before


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def available_memory() -> int:
    """Bytes that this process can still take: what the machine has available, within the container's limit."""
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0])
    for limit in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and limit.read_text().strip() != "max":
            available = min(available, int(limit.read_text()) - _status("VmRSS"))
    return available
