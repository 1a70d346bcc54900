"""DINO's and iBOT's loss on the GPU (arXiv:2104.14294, arXiv:2111.07832).

With a student's logits s, the logits t_1 ... t_T of the teacher's views, a center c and the temperatures ts and tt,

    P_t = softmax((t - c) / tt),  q = softmax(s / ts),  m the number of views that teach this one
    loss = m log sum_k exp((s_k - M) / ts) + sum_t sum_k P_tk (M - s_k) / ts,    M = max_k s_k
    dloss/ds = (m q - sum_t P_t) / ts

Algorithm. One program takes one row of one of the student's views, and walks along its K prototypes twice. First it
sums, relative to the maxima so far, the exponentials of the student's row and of each teacher's row, and for each
teacher the products of its exponentials with M - s; a new maximum rescales these sums, as in flash attention. They give
the loss. Then it writes the gradient times `weight`, the factor of the row's loss. The programs of all views of a row
follow each other, so that they share the teacher's rows in the second-level cache.

Cost. Two exponentials for each entry of a student's row, and two for each entry of each teacher's row that teaches it.
Of global memory, the logits of both sides are read once (twice where rows in flight do not fit the second-level cache)
and the student's gradients written once; nothing else grows with K. There are no atomics: the bits are the same in
every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.tiles import finite
from fastssl.kernels.distillation.logits import inverse, load, load_centred, with_dense_rows

BLOCK = 1024  # prototypes at a time
WARPS = 8


@triton.jit
def _raise(top, x):
    """The maximum of `top` and x; what to subtract now, and what was subtracted before, both finite."""
    highest = tl.maximum(top, tl.max(x, 0))
    new = finite(highest)
    return highest, new, tl.where(top == float("-inf"), new, top)


@triton.jit(do_not_specialize=["rows", "first_view"])
def distill(
    student, teacher, center, weight, loss, gradient, student_scale, teacher_scale, rows, K, first_view,
    student_view, student_row, teacher_view, teacher_row, gradient_view, gradient_row,
    UNLIKE: tl.constexpr, T: tl.constexpr, TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row of one view, and its gradient times weight[row]; `loss` or `gradient` may be None.

    student (V, N, K) is the student's views from first_view on, teacher (T, N, K) all of the teacher's; TEACHERS is a
    power of two.
    """
    views = tl.num_programs(0) // rows  # of one row, one after the other
    row = (tl.program_id(0) // views).to(tl.int64)
    view = (tl.program_id(0) % views).to(tl.int64)
    student += view * student_view + row * student_row
    teacher_view = tl.cast(teacher_view, tl.int64)
    teacher += row * teacher_row
    number = view + first_view
    block = tl.arange(0, BLOCK)
    teachers = tl.arange(0, TEACHERS)
    teaches = (teachers < T) & ((teachers != number) == UNLIKE)

    # Sums relative to the maxima so far: the student's, and those of the teacher's views.
    top = float("-inf")
    total = 0.0
    tops = tl.full((TEACHERS,), float("-inf"), tl.float32)
    totals = tl.zeros((TEACHERS,), tl.float32)
    dots = tl.zeros((TEACHERS,), tl.float32)  # sums of a teacher's exponentials times top - s
    for start in range(0, K, BLOCK):
        columns = start + block
        s = load(student, columns, K)
        top, new, old = _raise(top, s)
        total = total * tl.exp((old - new) * student_scale) + tl.sum(tl.exp((s - new) * student_scale), 0)
        dots += totals * (new - old)
        below = tl.where(columns < K, new - s, 0.0)
        for t in tl.static_range(T):
            if (number != t) == UNLIKE:
                here = teachers == t
                x = load_centred(teacher + t * teacher_view, center, columns, K)
                highest, new_t, old_t = _raise(tl.max(tl.where(here, tops, float("-inf")), 0), x)
                e = tl.exp((x - new_t) * teacher_scale)
                shrink = tl.exp((old_t - new_t) * teacher_scale)
                tops = tl.where(here, highest, tops)
                totals = tl.where(here, totals * shrink + tl.sum(e, 0), totals)
                dots = tl.where(here, dots * shrink + tl.sum(e * below, 0), dots)
    count = tl.sum(teaches.to(tl.float32), 0)
    if loss is not None:
        taught = tl.sum(tl.where(teaches, dots / totals, 0.0), 0) * student_scale
        tl.store(loss + view * rows + row, count * tl.log(total) + taught)
    if gradient is not None:
        factor = tl.load(weight + row) * student_scale
        of_teachers = factor / totals
        gradient += view * gradient_view + row * gradient_row
        new = finite(top)
        for start in range(0, K, BLOCK):
            columns = start + block
            g = tl.exp((load(student, columns, K) - new) * student_scale) * (factor * count / total)
            for t in tl.static_range(T):
                if (number != t) == UNLIKE:
                    here = teachers == t
                    x = load_centred(teacher + t * teacher_view, center, columns, K)
                    new_t = finite(tl.max(tl.where(here, tops, float("-inf")), 0))
                    g -= tl.exp((x - new_t) * teacher_scale) * tl.sum(tl.where(here, of_teachers, 0.0), 0)
            tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < K)


def distillation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    derive: bool,
) -> tuple[Tensor, list[Tensor]]:
    first = student[0]
    losses = first.new_empty((sum(len(x) for x in student), first.shape[1]), dtype=torch.float32)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in student] if derive else []
    _launch(student, teacher, center, weight, losses, gradients, student_temperature, teacher_temperature, unlike_views)
    loss = losses.sum(0)
    return loss if weight is None else (loss * weight).sum(), gradients


def distillation_loss_backward(
    grad_loss: Tensor,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
) -> list[Tensor]:
    weight = grad_loss if weight is None else grad_loss * weight
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in student]
    _launch(student, teacher, center, weight, None, gradients, student_temperature, teacher_temperature, unlike_views)
    return gradients


def _launch(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor | None,
    weight: Tensor | None,
    losses: Tensor | None,
    gradients: Sequence[Tensor],
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
) -> None:
    # The teacher has few views: one kernel reads all of them, through one pointer.
    teachers = with_dense_rows(teacher[0] if len(teacher) == 1 else torch.cat(list(teacher)))
    numbers = student_temperature, teacher_temperature, unlike_views
    first_view = 0
    for i, x in enumerate(student):
        of_views = None if losses is None else losses[first_view:]
        gradient = gradients[i] if gradients else None
        launch(with_dense_rows(x), teachers, center, weight, of_views, gradient, *numbers, first_view)
        first_view += len(x)


def launch(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    losses: Tensor | None,
    gradient: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    unlike_views: bool,
    first_view: int = 0,
) -> None:
    """Writes `losses` (V, N) of views (V, N, K) of the student, and their `gradient` (V, N, K), which may be the
    student's logits; or one of them. Rows are dense."""
    views, rows, columns = student.shape
    if views == 0 or rows == 0:
        return
    center, weight = (x if x is None else x.contiguous() for x in (center, weight))
    gradient_strides = (0, 0) if gradient is None else gradient.stride()[:2]
    distill[(views * rows,)](
        student, teacher, center, weight, losses, gradient, inverse(student_temperature),
        inverse(teacher_temperature), rows, columns, first_view,
        *student.stride()[:2], *teacher.stride()[:2], *gradient_strides, UNLIKE=unlike_views, T=len(teacher),
        TEACHERS=triton.next_power_of_2(len(teacher)), BLOCK=min(triton.next_power_of_2(columns), BLOCK),
        num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
