"""What Gloo takes and NCCL does not, refused: the tests have no GPU, for which the package communicates by NCCL."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
}
_COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "broadcast",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


def imitate() -> None:
    """From now on in this process: tensors must be contiguous and of NCCL's dtypes, and no process sends to itself.
    What is sent and received point to point moves as late as it may, when it is waited for."""
    for name in _COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, _checked(getattr(dist, name)))
    dist.batch_isend_irecv = _batch_isend_irecv


def _checked(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        check(*(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        return collective(*args, **kwargs)

    return call


def check(*tensors: Tensor) -> None:
    """Raises ValueError if NCCL would not take one of them."""
    for x in tensors:
        if x.dtype not in _DTYPES or not x.is_contiguous():
            raise ValueError(f"NCCL takes contiguous tensors of its dtypes, got {x.dtype}, strides {x.stride()}")


class _Late:
    """What has not begun before it is waited for. Until then nobody knows what was received."""

    def __init__(self, ops: Sequence[dist.P2POp]) -> None:
        self.ops = ops

    def wait(self) -> None:
        for work in _exchange(self.ops):
            work.wait()


_exchange = dist.batch_isend_irecv


def _batch_isend_irecv(ops: Sequence[dist.P2POp]) -> list[_Late]:
    for op in ops:
        check(op.tensor)
        if op.group_peer == dist.get_rank(op.group):
            raise ValueError("NCCL takes no messages of a process to itself")
        if op.op is dist.irecv:
            op.tensor.fill_(float("nan") if op.tensor.is_floating_point() else 0)
    return [_Late(ops)]
