"""Ctrl-C and SIGTERM, with which schedulers end what they have started, wait until a step is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from fastssl.distributed import world_size


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """In this block the signals do nothing; it gets a function that returns the number of one that came, or else 0.

    A second Ctrl-C interrupts at once. Not so in several processes, to which torchrun sends again what the terminal has
    sent them already. Outside the main thread nothing changes.
    """
    received = 0

    def handle(number: int, _: Any) -> None:
        nonlocal received
        received = max(received, number)
        if number == signal.SIGINT and world_size() == 1:
            signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:  # too late for the block to see it
        end(received)


def end(number: int) -> NoReturn:
    """As the signal would have ended the process."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
