"""A loss of a batch that is spread over the processes of a group, none of which holds the whole batch.

Each process keeps its b rows x. Its b rows y travel: at step t, process r holds those of process r - t, while the next
ones are already on their way to it. Besides its own rows a process holds O(b D), at most two parts of the batch. How
the losses of a family use the ring is in the file of the family's name. Gradients are those of the sum of all
processes' losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.distributed.processes import ProcessGroup, check_alike, check_group
from fastssl.ops import current_backend

Tensors = tuple[Tensor, ...]


class Ring:
    """The processes of a group, each with a part of one batch, in a ring.

    All of them must make the same calls in the same order, and later the backward passes of the same losses. A process
    that does not, or dies, makes the others raise by the group's timeout. Derivatives are first derivatives.

    Args:
        group: the processes.
        tensors: by name, what a loss depends on. They must have the same shape, dtype and requires_grad on every
            process.

    Raises:
        TypeError: if group is no ProcessGroup.
        ValueError: if this process is not in the group, or on every process, if the tensors are not alike.
    """

    def __init__(self, group: ProcessGroup, **tensors: Tensor) -> None:
        check_group(group)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self._suffix = "_portable" if current_backend() == "portable" else ""
        check_alike(group, tensors)

    def op(self, name: str) -> Callable[..., Any]:
        """The operation in the backend that was chosen when the forward pass ran."""
        return getattr(torch.ops.fastssl, name + self._suffix)

    def travel(
        self,
        passengers: Tensors,
        visit: Callable[..., Tensors],
        unite: Callable[[Tensors, Tensors], Tensors] | None = None,
    ) -> Tensors:
        """Takes passengers past every process, and the results of visit(step, *passengers) back home.

        Args:
            passengers: read by every process, and changed by none.
            visit: at step 0 they are this process's own. It returns their luggage, perhaps none.
            unite: of the luggage that came along, and what a visit returned.

        Returns:
            The luggage of this process's passengers.
        """
        luggage: Tensors = ()
        for step in range(self.size):
            arrival = self._pass_on(passengers) if step + 1 < self.size else None
            share = visit(step, *passengers)
            luggage = unite(luggage, share) if luggage else share
            if arrival is not None:
                passengers = arrival()
            if luggage and self.size > 1:
                luggage = self._pass_on(luggage)()
        return luggage

    def meet(
        self, passengers: Tensors, visit: Callable[..., Tensors], unite: Callable[[Tensors, Tensors], Tensors]
    ) -> Tensors:
        """Takes passengers past half of the other processes, so that every two processes meet once, and brings home
        what became of them.

        Args:
            passengers: read by other processes, and changed by none; their rows are an even number.
            visit: of (mine, theirs, *passengers), which are another process's, where mine and theirs are slices of
                rows: all of both, but that two processes that are visited by each other share out the work. It returns
                luggage with a row for each passenger, 0 for those that it did not meet.
            unite: of the luggage that has come home, and more.

        Returns:
            The luggage of this process's passengers; none where it is alone.
        """
        luggage: Tensors = ()
        steps, rows = self.size // 2, passengers[0].shape[0]
        arrival = self._pass_on(passengers) if steps else None
        for step in range(1, steps + 1):
            passengers = arrival()
            arrival = self._pass_on(passengers) if step < steps else None
            mine = theirs = slice(0, rows)
            if 2 * step == self.size and self.rank < step:
                theirs = slice(0, rows // 2)
            elif 2 * step == self.size:
                mine = slice(rows // 2, rows)
            share = self._pass_on(visit(mine, theirs, *passengers), -step)()
            luggage = unite(luggage, share) if luggage else share
        return luggage

    def _pass_on(self, tensors: Sequence[Tensor], steps: int = 1) -> Callable[[], Tensors]:
        """Sends tensors to the next process but steps - 1, or with a negative number back as far; the function that is
        returned waits for those that come here."""
        sent = [t.contiguous() for t in tensors]
        received = tuple(torch.empty_like(t) for t in sent)
        neighbours = (dist.isend, sent, self.rank + steps), (dist.irecv, received, self.rank - steps)
        ops = [
            dist.P2POp(op, t, group=self.group, group_peer=peer % self.size)
            for op, tensors, peer in neighbours
            for t in tensors
            if t.numel()
        ]
        works = dist.batch_isend_irecv(ops) if ops else []  # there are none of an empty batch

        def wait(sent: list[Tensor] = sent) -> Tensors:  # which are kept until they have gone
            for work in works:
                work.wait()
            return received

        return wait


def check_first_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph must be False: the losses of a group have first derivatives only")


def add(first: Tensors, second: Tensors) -> Tensors:
    return tuple(a + b for a, b in zip(first, second, strict=True))
