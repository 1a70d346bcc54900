"""Shared by several of the operations: what is kept, sums of exponentials, cross-entropies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.ops._backend import current_backend
from fastssl.ops._precision import device_type_of


def bytes_to_keep(precision: str, inputs: Sequence[Tensor], rows: int, columns: int | None = None) -> int:
    """How many bytes a forward pass is to keep for its backward pass, the argument `keep` of the operations: at most
    four times those of the inputs. On a CPU as many as the exponentials of all rows x columns similarities take; on a
    GPU all products <x_i, y_j> in float32, or if that is too much none.

    0 where no gradient of the inputs is wanted, and where no kernel would keep anything: on a GPU that goes by the cost
    of a product, see kernels/common/kept.py.

    Args:
        precision: that of products. Where it is bfloat16, exponentials are kept in bfloat16, else in float32.
        columns: None: similarities of the rows with themselves, of which half are enough on a CPU.
    """
    x = inputs[0]
    if x.dtype == torch.float64 or current_backend() != "auto" or not _has_kernel(device_type_of(x)):
        return 0
    bound, wanted = 0, False
    for z in inputs:  # plainly: in a small batch, generators and `torch.sym_min` cost more than all else here
        bound += 4 * z.numel() * z.element_size()
        wanted = wanted or z.requires_grad
    if not wanted or not torch.is_grad_enabled():
        return 0
    if x.is_cuda:
        if precision != "float32" and not (precision == "tf32" and x.shape[1] >= 512):
            return 0
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes longer to import than fastssl

        needed = 4 * _padded(rows, 128) * _padded(rows if columns is None else columns, 128)
        return needed if guard_or_false(needed <= bound) else 0
    height, width = _padded(rows), _padded(rows if columns is None else columns)
    count = height * width
    if columns is None:  # the tiles on the diagonal, of up to 256 rows, are whole
        count = _smaller(count, height * (width + 256) // 2)
    needed = count * (2 if precision == "bfloat16" else 4) + 4 * height + 128
    return _smaller(needed, bound)


def _smaller(a: int, b: int) -> int:
    """Of sizes that may be symbols, of which Python's `min` would ask which one it is."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _padded(rows: int, multiple: int = 32) -> int:
    """Tiles have multiples of 32 rows, on a GPU of 128."""
    return (rows + multiple - 1) // multiple * multiple


def _has_kernel(device_type: str) -> bool:
    """Whether the device has kernels of its own: without the C++ library, or without Triton, portable code runs."""
    if device_type not in _found:
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
        _found[device_type] = key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATION, key)
    return _found[device_type]


_OPERATION = "fastssl::pair_logsumexp"
_found: dict[str, bool] = {}
_has_kernel._dynamo_marked_constant = True  # see ops/_precision.py


def nothing_kept(x: Tensor, keep: int) -> Tensor:
    """What code that keeps nothing returns as `kept`."""
    return x.new_zeros(keep, dtype=torch.uint8)


def sums_of_exponentials(S: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(total, shift): the sum of exp(S - shift), 0 where there is none, and the shift, the maximum, broadcast."""
    largest = S.amax(dim, keepdim=True)
    shift = largest.where(largest != float("-inf"), 0)
    return (S - shift).exp().sum(dim), shift.squeeze(dim)


def margin(total: Tensor, shift: Tensor, positive: Tensor) -> Tensor:
    """n - positive, n the log-sum-exp of the negatives: the cross-entropy is its softplus. NaN where positive is
    infinite."""
    return total.log() + (shift - positive) + 0 * positive
