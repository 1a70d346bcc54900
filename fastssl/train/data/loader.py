"""Batches of the data, read ahead where they are in a file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

from fastssl.train.data.cache import is_mapped


def tensors_of(data: Any) -> list[Tensor]:
    """What a tensor or a TensorDataset consists of; nothing of anything else that takes positions."""
    parts = data.tensors if isinstance(data, TensorDataset) else [data]
    return [x for x in parts if isinstance(x, Tensor)]


class Loader:
    """data[positions] of each of the positions. Where the data are in a file (`fastssl.train.data.cache.mapped`), a
    thread reads the next ones while something is done with these.

    Args:
        data: a tensor, a TensorDataset, or anything else that takes positions.
        positions: (B,) int64 each; there may be no end of them.

    Attributes:
        seconds: how long whoever goes through them has waited.
    """

    def __init__(self, data: Any, positions: Iterable[Tensor]) -> None:
        self.data, self.positions, self.seconds = data, positions, 0.0

    def __iter__(self) -> Iterator[Any]:
        if not any(map(is_mapped, tensors_of(self.data))):
            yield from self._in_turn(0, lambda positions: partial(self.data.__getitem__, positions))
            return
        with ThreadPoolExecutor(1, "loader") as pool:
            yield from self._in_turn(1, lambda positions: pool.submit(self.data.__getitem__, positions).result)

    def _in_turn(self, ahead: int, ask: Callable[[Tensor], Callable[[], Any]]) -> Iterator[Any]:
        asked: deque[Callable[[], Any]] = deque()
        for positions in self.positions:
            asked.append(ask(positions))
            if len(asked) > ahead:
                yield self._wait(asked.popleft())
        while asked:
            yield self._wait(asked.popleft())

    def _wait(self, answer: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        examples = answer()
        self.seconds += time.perf_counter() - began
        return examples
