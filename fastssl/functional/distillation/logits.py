"""Logits of views, and the loss of their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastssl._arithmetic import as_scalar, finish, needs_gradient
from fastssl._checks import DTYPES, check_compatible, check_rows, check_same_device, check_tensor, check_tensors
from fastssl.ops import distillation
from fastssl.ops._precision import accumulate_dtype


def check_views(name: str, views: Tensor | Sequence[Tensor], shape: str = "B, K") -> list[tuple[str, Tensor]]:
    """Rows (V, B, K) of one or several views each, with their names."""
    if isinstance(views, Tensor):
        check_rows(name, views, f"(V, {shape})", 3)
        return [(name, views)]
    found = [(f"{name}[{i}]", x) for i, x in enumerate(check_tensors(name, views))]
    if not found:
        raise ValueError(f"{name} must have at least one view, got an empty list")
    for name_x, x in found:
        check_rows(name_x, x, f"({shape}) or (V, {shape})", 3 if x.dim() == 3 else 2)
    return [(name_x, x if x.dim() == 3 else x[None]) for name_x, x in found]


def check_rows_alike(views: Sequence[tuple[str, Tensor]]) -> None:
    """All of the first one's number of rows, number of prototypes, device and dtype."""
    name1, x1 = views[0]
    for name2, x2 in views[1:]:
        if x1.shape[-2:] != x2.shape[-2:]:
            shapes = f"{tuple(x1.shape[-2:])} and {tuple(x2.shape[-2:])}"
            raise ValueError(f"{name1} and {name2} must have as many rows and prototypes, got {shapes}")
        check_compatible(name1, x1, name2, x2)


def check_pairs_of_views(names: str, student_views: int, teacher_views: int) -> int:
    """How many pairs of a teacher's and a student's view of unlike numbers there are."""
    pairs = student_views * teacher_views - min(student_views, teacher_views)
    if pairs == 0:
        found = f"{student_views} and {teacher_views}"
        raise ValueError(f"{names} must have at least two views, of unlike numbers, got {found}")
    return pairs


def check_center(center: Tensor | None, x: Tensor, name_x: str) -> Tensor | None:
    """(K,), a constant in the dtype of sums."""
    if center is None:
        return None
    columns = x.shape[-1]
    check_tensor("center", center)
    if center.dtype not in DTYPES:
        raise ValueError(f"center must have a floating-point dtype of 16, 32 or 64 bits, got {center.dtype}")
    if center.shape not in ((columns,), (1, columns)):
        raise ValueError(f"center must have shape ({columns},) or (1, {columns}), got {tuple(center.shape)}")
    check_same_device("center", center, name_x, x)
    return center.detach().reshape(-1).to(accumulate_dtype(x.dtype))


def check_weights(weights: Tensor, x: Tensor, name_x: str) -> None:
    """One for each of the rows (..., N, D)."""
    check_tensor("weights", weights)
    if weights.dtype not in DTYPES:
        raise ValueError(f"weights must have a floating-point dtype of 16, 32 or 64 bits, got {weights.dtype}")
    if weights.shape != x.shape[-2:-1]:
        raise ValueError(f"weights must have shape ({x.shape[-2]},), one for each row, got {tuple(weights.shape)}")
    check_same_device("weights", weights, name_x, x)


def loss_of_rows(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    *,
    unlike_views: bool,
    pairs: int,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    first, dtype = student[0], accumulate_dtype(student[0].dtype)
    if isinstance(student_temperature, Tensor) and needs_gradient(student_temperature):
        divisor = as_scalar(student_temperature, first)
        student, student_temperature = [x.to(dtype) / divisor for x in student], 1.0
    teacher = [x.detach() for x in teacher]
    temperatures = detached(student_temperature, teacher_temperature)

    def loss_of(weight: Tensor | None, derive: bool) -> Tensor:
        arguments = student, teacher, center, weight, *temperatures, unlike_views, derive
        return distillation.distillation_loss(*arguments)[0]

    return reduced(loss_of, first, first.shape[1], student, pairs=pairs, weights=weights, reduction=reduction)


def detached(*numbers: float | Tensor) -> list[float | Tensor]:
    return [x.detach() if isinstance(x, Tensor) else x for x in numbers]


def reduced(
    loss_of: Callable[[Tensor | None, bool], Tensor],
    x: Tensor,
    rows: int,
    inputs: Sequence[Tensor],
    *,
    pairs: int,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """The mean over as many pairs of views as are to be compared, times weights, reduced over the rows.

    With "mean" and "sum" the gradient of `inputs` is taken in the forward pass, while a row is in the cache. It is left
    to the backward pass where that would not use it, see `_derivative.py`, and in float16, which may not hold it before
    a loss scale multiplies it.

    Args:
        loss_of: (weight, derive) -> each row's loss, summed over the pairs; with a weight of each, their weighted sum.
    """
    if reduction == "none" or (weights is not None and needs_gradient(weights)):
        loss = loss_of(None, False)
        loss = loss / pairs if weights is None else loss * (weights / pairs)
        return finish(loss, reduction, x)
    dtype = accumulate_dtype(x.dtype)
    weight = x.new_ones(rows, dtype=dtype) if weights is None else weights.detach().to(dtype)
    weight = weight / (pairs * rows if reduction == "mean" else pairs)
    derive = needs_gradient(*inputs) and not _traced() and all(z.dtype != torch.float16 for z in inputs)
    loss = loss_of(weight, derive)
    return finish(loss if rows or reduction == "sum" else loss * math.nan, "none", x)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
