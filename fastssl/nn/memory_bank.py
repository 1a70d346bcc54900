"""A queue of past embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import gather_rows, world_size


class MemoryBank(nn.Module):
    """A first-in, first-out queue of embeddings that serve as negatives (MoCo, arXiv:1911.05722).

    Attributes:
        bank: float32 buffer of shape `size`, random unit rows at first; not part of the state dict.
        bank_ptr: (1,) int64 buffer, the row that the next update writes first; not part of the state dict.

    Args:
        size: (rows, features), or 0 for no bank.
        gather_distributed: enter the rows of all processes, so that every process holds the same queue.

    Raises:
        ValueError: if size has a negative entry, or is neither 0 nor a pair.
    """

    def __init__(self, size: int | Sequence[int] = 0, gather_distributed: bool = False) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(n < 0 for n in self.size):
            raise ValueError(f"memory_bank_size must not be negative, got {size}")
        if self.size != (0,) and len(self.size) != 2:
            raise ValueError(f"memory_bank_size must be a (rows, features) pair, or 0 for no bank, got {size}")
        self.gather_distributed = gather_distributed
        bank = F.normalize(torch.randn(self.size), dim=-1) if len(self.size) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Overwrite the oldest rows of the bank, in place.

        At the end of the bank the rows that do not fit are dropped, and the next update begins at its first row.

        Args:
            rows: (B, features), of any floating dtype.
        """
        if self.gather_distributed and world_size() > 1:
            rows = gather_rows(rows)
        rows = rows.to(self.bank)
        count = rows.shape[0]
        # What is dropped becomes a copy of the last row that fits: no branch, and no wait for the device.
        source = torch.arange(count, device=rows.device).clamp(max=self.size[0] - 1 - self.bank_ptr)
        self.bank.index_copy_(0, self.bank_ptr + source, rows[source])
        end = self.bank_ptr + count
        self.bank_ptr.copy_(end.where(end < self.size[0], 0))
