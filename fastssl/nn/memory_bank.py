"""Queues of past keys: this package's, and lightly's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import functional
from fastssl._checks import (
    check_device,
    check_dtype,
    check_flag,
    check_memory,
    check_positive,
    check_rows,
    check_same_kind,
    check_size,
    check_tensor,
)
from fastssl.distributed import check_alike, gather_rows, world_size


class MemoryBank(nn.Module):
    """A first-in, first-out queue of keys that serve as negatives (MoCo, arXiv:1911.05722).

    An update overwrites the oldest keys in place: nothing is copied but the new keys, and nothing waits for the device.
    A queue may be updated between the forward and the backward pass of a loss that has used it, as keys need no
    gradient. It is saved in the state dict.

    A wrapping DistributedDataParallel would send the queue of process 0 to all others at every step, as it does with
    buffers: leave the queue outside of it, or give it broadcast_buffers=False.

    Attributes:
        keys: (size, dim) buffer, random unit rows at first.
        position: 0-d int64 buffer, the row that the next update writes first.

    Args:
        size: the number of keys.
        dim: the number of their features.
        gather_distributed: enter the keys of all processes, in the order of their ranks, so that every process holds
            the same queue if all were made from the same seed. All must then update with the same number of keys.
        normalize: enter keys at unit length, for encoders whose outputs are normalised by the loss.
        dtype: of the keys; None: the default dtype.
        device: of the keys; None: the default device.

    Raises:
        TypeError: if size or dim is no integer, gather_distributed or normalize no flag, or dtype none.
        ValueError: if size or dim is not positive, dtype is not one of those losses take, or device is none.

    Examples:
        >>> bank = MemoryBank(65536, 128)
        >>> query = F.normalize(model(view0), dim=1)
        >>> with torch.no_grad():
        ...     key = F.normalize(momentum_model(view1), dim=1)
        >>> loss = info_nce(query, key, negative_keys=bank.keys, temperature=0.2, normalize=False)
        >>> bank.update(key)
        >>> loss.backward()
    """

    keys: Tensor
    position: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        gather_distributed: bool = False,
        *,
        normalize: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        size, dim = check_positive("size", size), check_positive("dim", dim)
        self.gather_distributed = check_flag("gather_distributed", gather_distributed)
        self.normalize = check_flag("normalize", normalize)
        check_memory("size x dim", (size, dim), 8)
        check_dtype("dtype", dtype)
        keys = F.normalize(torch.randn(size, dim, device=check_device(device)), dim=1)
        keys = keys.to(torch.get_default_dtype() if dtype is None else dtype)
        check_rows("keys", keys, "(size, dim)")
        self.register_buffer("keys", keys)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Overwrite the oldest keys, in place; after the last row go on at the first.

        Args:
            keys: (B, dim) of any floating dtype, the last ones if there are more than the queue holds; entered as they
                are, or at unit length with `normalize`.

        Raises:
            TypeError: if keys is no tensor.
            ValueError: if keys is not of shape (B, dim), or with `gather_distributed` on every process, if they differ
                in shape, dtype or device. The queue is then unchanged.
        """
        keys = _rows_of_all_processes("keys", keys, self.keys, self.gather_distributed)
        functional.enqueue_(self.keys, self.position, keys.to(self.keys.device), self.normalize)

    def extra_repr(self) -> str:
        size, dim = self.keys.shape
        return f"{size}, {dim}, gather_distributed={self.gather_distributed}, normalize={self.normalize}"


class MemoryBankModule(nn.Module):
    """A queue of past embeddings, which takes the place of lightly's class of this name.

    At the end of the bank the rows that do not fit are dropped, and the next update begins at its first row. It is not
    saved in the state dict. `MemoryBank` drops nothing; this class is for losses that are written for lightly's.

    Attributes:
        size: as given, as a tuple.
        gather_distributed, feature_dim_first: as given.
        bank: (rows, features) float32 buffer, random unit rows at first, or empty.
        bank_ptr: (1,) int64 buffer, the row that the next update writes first.

    Args:
        size: (rows, features), or 0 for no bank.
        gather_distributed: enter the rows of all processes, which must hold the same number of them.
        feature_dim_first: whether a call returns the bank transposed.

    Raises:
        TypeError: if size is neither an integer nor a sequence of integers.
        ValueError: if size has a negative entry or is neither 0 nor a pair.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        self.size = check_bank_size("size", size)
        self.gather_distributed = check_flag("gather_distributed", gather_distributed)
        self.feature_dim_first = check_flag("feature_dim_first", feature_dim_first)
        bank = F.normalize(torch.randn(self.size), dim=-1) if len(self.size) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, output: Tensor, labels: Any = None, update: bool = False) -> tuple[Tensor, Tensor | None]:
        """The output, and a copy of the bank as it was before the update.

        Args:
            output: (B, features) embeddings.
            labels: without effect.
            update: enter output into the bank.

        Returns:
            (output, bank), the bank (features, rows), or (rows, features) without `feature_dim_first`, and None where
            there is none.

        Raises:
            TypeError, ValueError: as `update`, or if update is no flag.
        """
        update = check_flag("update", update)
        if self.size[0] == 0:
            return output, None
        bank = self.bank.clone()
        if update:
            self.update(output)
        return output, bank.T if self.feature_dim_first else bank

    @torch.no_grad()
    def update(self, output: Tensor) -> None:
        """Enter output (B, features) into the bank.

        Raises:
            TypeError: if output is no tensor.
            ValueError: if output is not of shape (B, features), or with `gather_distributed` on every process, if they
                differ in shape, dtype or device. The bank is then unchanged.
        """
        rows = _rows_of_all_processes("output", output, self.bank, self.gather_distributed).to(self.bank)
        count = rows.shape[0]
        # What is dropped becomes a copy of the last row that fits: no branch, and no wait for the device.
        source = torch.arange(count, device=rows.device).clamp(max=self.size[0] - 1 - self.bank_ptr)
        self.bank.index_copy_(0, self.bank_ptr + source, rows[source])
        end = self.bank_ptr + count
        self.bank_ptr.copy_(end.where(end < self.size[0], 0))

    def extra_repr(self) -> str:
        return f"{self.size}, gather_distributed={self.gather_distributed}, feature_dim_first={self.feature_dim_first}"


def check_bank_size(name: str, size: int | Sequence[int]) -> tuple[int, ...]:
    """lightly's: (rows, features), or (0,) for no bank."""
    sizes = tuple(check_size(name, n) for n in (size if isinstance(size, (tuple, list)) else [size]))
    check_memory(name, sizes, 4)
    if sizes != (0,) and len(sizes) != 2:
        raise ValueError(f"{name} must be a (rows, features) pair, or 0 for no bank, got {size}")
    return sizes


def _rows_of_all_processes(name: str, rows: Tensor, bank: Tensor, gather_distributed: bool) -> Tensor:
    check_tensor(name, rows)
    dim, across = bank.shape[1], gather_distributed and world_size() > 1
    if across:
        check_alike(None, {name: rows})
    check_same_kind("the bank", bank, name, rows)
    check_rows(name, rows, f"(B, {dim})")
    if rows.shape[1] != dim:
        raise ValueError(f"{name} must have shape (B, {dim}), got {tuple(rows.shape)}")
    return gather_rows(rows) if across else rows
