"""A queue of past keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import functional
from fastssl.distributed import gather_rows, world_size


class MemoryBank(nn.Module):
    """A first-in, first-out queue of keys that serve as negatives (MoCo, arXiv:1911.05722).

    An update overwrites the oldest keys in place: nothing is copied but the new keys, and nobody waits for the device.
    The queue that a loss has seen may be updated before the loss's backward pass, as keys need no gradient. It is
    saved in the state dict.

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
        TypeError: if size or dim is no int.
        ValueError: if size or dim is less than 1.

    Example:
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
        for name, count in (("size", size), ("dim", dim)):
            if not isinstance(count, int):
                raise TypeError(f"{name} must be an int, got {type(count).__name__}")
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.gather_distributed, self.normalize = gather_distributed, normalize
        keys = F.normalize(torch.randn(size, dim, device=device), dim=1).to(dtype or torch.get_default_dtype())
        self.register_buffer("keys", keys)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Overwrite the oldest keys, in place; beyond the end go on at the beginning.

        Args:
            keys: (B, dim) of any floating dtype, the last ones if there are more than the queue holds; entered as they
                are, or at unit length with `normalize`.

        Raises:
            ValueError: if keys is not of shape (B, dim).
        """
        dim = self.keys.shape[1]
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must have shape (B, {dim}), got {tuple(keys.shape)}")
        if self.gather_distributed and world_size() > 1:
            keys = gather_rows(keys)
        functional.enqueue_(self.keys, self.position, keys.to(self.keys.device), self.normalize)

    def extra_repr(self) -> str:
        size, dim = self.keys.shape
        return f"{size}, {dim}, gather_distributed={self.gather_distributed}, normalize={self.normalize}"
