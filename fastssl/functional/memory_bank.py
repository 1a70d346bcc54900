"""A queue of past keys."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import reference
from fastssl._checks import check_flag, check_not_negated, check_rows, check_same_device, check_tensor
from fastssl.ops import current_backend, memory_bank


@torch.no_grad()
def enqueue_(keys: Tensor, position: Tensor, new_keys: Tensor, normalize: bool = False) -> None:
    """Overwrite the oldest keys of a queue in place: MoCo's dictionary (arXiv:1911.05722).

    After the last row it goes on at the first, and never waits for the device. `fastssl.nn.MemoryBank` is such a queue.

    Args:
        keys: (K, D) ring buffer; float32, bfloat16, float16 or float64; changed.
        position: 0-d int64, the row that is written first, taken modulo K; moved on by B, modulo K.
        new_keys: (B, D), of any of those dtypes, converted to that of keys; if B > K only the last K of them are
            entered.
        normalize: enter new keys at unit length, x / max(|x|, 1e-12), computed in float32 (float64 for float64).

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if shapes, dtypes or devices do not fit, keys has no rows, or rows that share memory.
    """
    check_rows("keys", keys, "(K, D)")
    check_rows("new_keys", new_keys, "(B, D)")
    if keys.shape[0] == 0:
        raise ValueError(f"keys must have at least one row, got shape {tuple(keys.shape)}")
    (rows, dim), (row, column) = keys.shape, keys.stride()
    repeated = (rows > 1 and row == 0) or (dim > 1 and column == 0)
    if repeated or (rows > 1 < dim and row <= (dim - 1) * column and column <= (rows - 1) * row):
        raise ValueError(f"keys must have no two elements in one place, got strides {keys.stride()}")
    if new_keys.shape[1] != keys.shape[1]:
        raise ValueError(f"new_keys must have shape (B, {keys.shape[1]}), as keys has it, got {tuple(new_keys.shape)}")
    check_tensor("position", position)
    if position.dim() or position.dtype != torch.int64:
        raise ValueError(f"position must be 0-d int64, got {position.dtype} of shape {tuple(position.shape)}")
    check_not_negated("position", position)
    check_same_device("keys", keys, "position", position)
    check_same_device("keys", keys, "new_keys", new_keys)
    normalize = check_flag("normalize", normalize)
    if current_backend() == "reference":
        reference.memory_bank.enqueue_(keys, position, new_keys, normalize)
        return
    memory_bank.enqueue_(keys, position, new_keys, normalize)
    torch.autograd.graph.increment_version((keys, position))
