"""MoCo: momentum contrast for unsupervised visual representation learning (arXiv:1911.05722)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._arithmetic import unit
from fastssl._meter import available_memory
from fastssl.distributed import ProcessGroup
from fastssl.functional import info_nce
from fastssl.nn import EMA, MemoryBank
from fastssl.train.two_views import TwoViews


class MoCoV1(TwoViews):
    """A query finds the key of the same image among a queue of past keys; a slowly moving teacher makes the keys.

    Keys are normalised by the statistics of their batch, as queries are, whatever the number of processes. In the paper
    each GPU has statistics of its own, and batches are shuffled among GPUs, so that the statistics do not tell which
    key belongs to which query.

    Args:
        temperature: of InfoNCE.
        momentum: of the teacher; the paper's 0.999 is for longer runs.
        queue: number of keys.
    """

    head = (128,)

    def __init__(self, *, temperature: float = 0.07, momentum: float = 0.97, queue: int = 4096) -> None:
        super().__init__(*self.head)
        if 2 * 4 * 128 * queue > available_memory():  # twice, while it is being made
            raise ValueError(f"queue must fit into memory, got {queue} keys of 512 bytes")
        self.temperature = temperature
        self.teacher = EMA(self.student, momentum, update_buffers=False).train()
        self.queue = MemoryBank(queue, 128)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        query = unit(self.student(view1))
        with torch.no_grad():
            key = unit(self.teacher(view2))
        return query, key

    def loss(self, query: Tensor, key: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return info_nce(query, key, self.queue.keys, temperature=self.temperature, normalize=False)

    def after_step(self, query: Tensor, key: Tensor) -> None:
        self.teacher.update(self.student)
        self.queue.update(key)
