"""A teacher's logits, whose rows are one batch whatever tensors they come in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastssl import distributed
from fastssl._checks import check_group, check_rows, check_same_device, check_tensors
from fastssl.distributed import ProcessGroup


def check_teacher_logits(logits: Tensor | Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Matrices (N, K) of one K, dtype and device, on every process of group."""
    views = [("teacher_logits", logits)]
    if not isinstance(logits, Tensor):
        views = [(f"teacher_logits[{i}]", x) for i, x in enumerate(check_tensors("teacher_logits", logits))]
        if not views:
            raise ValueError("teacher_logits must have at least one tensor, got an empty list")
    (first, like), *others = views
    for name, x in views:
        check_rows(name, x, "(N, K) or (V, B, K)", 3 if isinstance(x, Tensor) and x.dim() == 3 else 2)
    for name, x in others:
        if x.shape[-1] != like.shape[-1]:
            shapes = f"{tuple(like.shape)} and {tuple(x.shape)}"
            raise ValueError(f"{first} and {name} must have the same number of prototypes, got {shapes}")
        check_same_device(first, like, name, x)
        if x.dtype != like.dtype:
            raise ValueError(f"{first} and {name} must have the same dtype, got {like.dtype} and {x.dtype}")
    check_group(group)
    if group is not None:
        distributed.check_alike(group, {"a row of teacher_logits": like.detach().new_empty(like.shape[-1])})
    matrices = []
    for _, x in views:
        matrices += [x] if x.dim() == 2 else x.unbind()
    return [x.detach() for x in matrices] or [like.new_empty(0, like.shape[-1])]


def rows_of(matrices: Sequence[Tensor]) -> int:
    return sum(x.shape[0] for x in matrices)
