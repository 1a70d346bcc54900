"""What is random in the views of a batch: numbers of each example's own."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fastssl.distributed import sum_over_processes, world_size
from fastssl.train.device import move

T = TypeVar("T", Tensor, tuple[Tensor, ...])


class Draw:
    """Random numbers for some rows of a batch: those that these rows have when the whole batch is drawn.

    A process that has a share of a batch makes the views of its share alone, and they are what one process would have
    made of these examples. What costs time is what is made of the numbers; the numbers themselves, few for an example,
    are drawn for the whole batch, on the CPU, so that every device and every number of processes has the same.

    Args:
        generator: from which they are drawn, alike in all processes.
        examples: of the whole batch.
        rows: which of them are here, (rows,) int64 on the CPU; None: all.
        device: where the numbers are to be.
    """

    def __init__(
        self,
        generator: torch.Generator,
        examples: int,
        rows: Tensor | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self.generator, self.examples, self.rows, self.device = generator, examples, rows, device

    @classmethod
    def of(cls, draw: Draw | torch.Generator, batch: Tensor) -> Draw:
        """The draw itself; or that of a whole batch from a generator."""
        return draw if isinstance(draw, cls) else cls(draw, len(batch), device=batch.device)

    def uniform(self, *shape: int) -> Tensor:
        """(rows, *shape) numbers from 0 to 1."""
        numbers = torch.rand(self.examples, *shape, generator=self.generator, device=self.generator.device)
        return self.own(numbers)

    def own(self, drawn: T) -> T:
        """Of what has a row for each example of the whole batch, or several such, the rows that are here."""
        if isinstance(drawn, tuple):
            return tuple(self.own(x) for x in drawn)
        return move(drawn if self.rows is None else drawn[move(self.rows, drawn.device)], self.device)

    def placed(self, x: Tensor) -> Tensor:
        """Of a batch's rows those that are here -> as many as the whole batch has, with 0 in the places of others: for
        what draws numbers for each row of its input."""
        if self.rows is None:
            return x
        return x.new_zeros(self.examples, *x.shape[1:]).index_copy(0, move(self.rows, x.device), x)

    def whole(self, x: Tensor) -> Tensor:
        """Of a batch's rows those that are here -> all of them. Processes that share a batch exchange theirs."""
        return self.placed(x) if world_size() == 1 else sum_over_processes(self.placed(x))
