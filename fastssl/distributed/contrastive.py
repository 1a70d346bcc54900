"""The log-sum-exps over the rows of all processes.

    similarity_logsumexp   forward: y travels, each process sums up its rows. Backward: dx needs nothing more, see
                           fastssl.ops.contrastive; for dy = W^T x, x travels with the weights of its rows.
    pair_logsumexp         forward: y travels and takes the sums of its columns along. Backward: y travels again, with
                           the weights of its columns, and takes along its gradient.

    others_logsumexp       of a set's similarities with itself, those between processes. Every two processes meet once:
                           z travels half of the way, and takes the sums of its columns along, and then its gradient.

A log-sum-exp is a pair (total, shift), log(total) + shift; two of them become one at the larger of their shifts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastssl.distributed.processes import ProcessGroup, gather_rows, shared, sum_of_parts, uncompiled
from fastssl.distributed.ring import Ring, Tensors, add, check_first_derivative
from fastssl.ops._precision import accumulate_dtype
from fastssl.ops.contrastive import nothing_kept
from fastssl.ops.row_sums import sum_rows, take_rows

_KEEP = 0  # bytes of exponentials from one pass for the other: a process would keep those of every step


@uncompiled
def similarity_logsumexp(
    ring: Ring, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """(total, shift) of the rows of scale x y^T, with all processes' y. exclude: columns of this process's y."""
    weigh = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale))
    return _SimilarityLogsumexp.apply(ring, x, y, scale, exclude, weigh, precision)


@uncompiled
def pair_logsumexp(ring: Ring, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str) -> Tensors:
    """(row_total, row_shift, column_total, column_shift) of this process's x and y, with all others' y and x."""
    return _PairLogsumexp.apply(ring, x, y, scale, exclude, precision)


@uncompiled
def others_logsumexp(ring: Ring, z: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(total, shift) of the rows of scale z z^T, with all other processes' z. z has an even number of rows."""
    return _OthersLogsumexp.apply(ring, z, scale, precision)


def class_sums(x: Tensor, labels: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """For each row of x the sum of the rows of its label, of all processes, in the dtype of sums, and their number."""
    names, places, counts = gather_rows(labels, group).unique(return_inverse=True, return_counts=True)
    own = places.view(group.size(), -1)[group.rank()]
    sums = shared(sum_of_parts(sum_rows(x, own, len(names)), group), group)
    return take_rows(sums, own), counts[own]


class _SimilarityLogsumexp(Function):
    @staticmethod
    def forward(
        ctx: Any, ring: Ring, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, precision: str
    ) -> tuple[Tensor, Tensor]:
        sums: Tensors = ()

        def visit(step: int, y: Tensor) -> Tensors:
            nonlocal sums
            total, shift, weighted, _ = ring.op("similarity_logsumexp")(
                x, y, scale, None if step else exclude, weigh, _KEEP, precision
            )
            share = (total, shift, weighted) if weigh else (total, shift)
            sums = _unite_sums(sums, share) if sums else share
            return ()

        ring.travel((y,), visit)
        total, shift, *weighted = sums
        ctx.ring, ctx.precision = ring, precision
        ctx.save_for_backward(x, y if y.requires_grad else None, scale, exclude, shift, *weighted)
        ctx.mark_non_differentiable(shift)
        return total, shift

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple:
        check_first_derivative()
        x, y, scale, exclude, shift, weighted = ctx.saved_tensors
        dx = (grad_total * scale)[:, None] * weighted
        dscale = (grad_total[:, None] * weighted * x).sum(dtype=torch.float64).to(scale.dtype)
        dy = None
        if ctx.needs_input_grad[2]:
            exact, dy = y.to(shift.dtype), torch.zeros_like(y, dtype=shift.dtype)

            def visit(step: int, x: Tensor, grad_total: Tensor, shift: Tensor) -> Tensors:
                dy.add_(
                    ctx.ring.op("similarity_logsumexp_backward")(
                        grad_total, x.to(exact.dtype), exact, scale, None if step else exclude, shift, weighted,
                        nothing_kept(x, _KEEP), True, ctx.precision,
                    )[1]
                )  # fmt: skip
                return ()

            ctx.ring.travel((x, grad_total, shift), visit)
            dy = dy.to(y.dtype)
        return None, dx.to(x.dtype), dy, dscale, None, None, None


class _PairLogsumexp(Function):
    @staticmethod
    def forward(
        ctx: Any, ring: Ring, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
    ) -> Tensors:
        rows: Tensors = ()

        def visit(step: int, y: Tensor) -> Tensors:
            nonlocal rows
            *share, column_total, column_shift, _ = ring.op("pair_logsumexp")(
                x, y, scale, None if step else exclude, _KEEP, precision
            )
            rows = _unite_sums(rows, share) if rows else tuple(share)
            return column_total, column_shift

        columns = ring.travel((y,), visit, _unite_sums)
        ctx.ring, ctx.precision = ring, precision
        ctx.save_for_backward(x, y, scale, exclude, rows[1], columns[1])
        ctx.mark_non_differentiable(rows[1], columns[1])
        return *rows, *columns

    @staticmethod
    def backward(ctx: Any, grad_row_total: Tensor, _: Tensor, grad_column_total: Tensor, __: Tensor) -> tuple:
        check_first_derivative()
        x, y, scale, exclude, row_shift, column_shift = ctx.saved_tensors
        exact = x.to(row_shift.dtype)
        dx, dscale = torch.zeros_like(exact), torch.zeros_like(scale)

        def visit(step: int, y: Tensor, grad_column_total: Tensor, column_shift: Tensor) -> Tensors:
            x_share, y_share, scale_share = ctx.ring.op("pair_logsumexp_backward")(
                grad_row_total, grad_column_total, exact, y.to(exact.dtype), scale, None if step else exclude,
                row_shift, column_shift, nothing_kept(x, _KEEP), ctx.precision,
            )  # fmt: skip
            dx.add_(x_share)
            dscale.add_(scale_share)
            return (y_share,)

        (dy,) = ctx.ring.travel((y, grad_column_total, column_shift), visit, add)
        return None, dx.to(x.dtype), dy.to(y.dtype), dscale, None, None


class _OthersLogsumexp(Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, z: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0], dtype=accumulate_dtype(z.dtype))
        sums = total, torch.zeros_like(total)

        def visit(mine: slice, theirs: slice, other: Tensor) -> Tensors:
            nonlocal sums
            *of_rows, column_total, column_shift, _ = ring.op("pair_logsumexp")(
                z[mine], other[theirs], scale, None, _KEEP, precision
            )
            sums = _unite_sums(sums, tuple(_placed(x, mine, total) for x in of_rows))
            return tuple(_placed(x, theirs, total) for x in (column_total, column_shift))

        luggage = ring.meet((z,), visit, _unite_sums)
        sums = _unite_sums(sums, luggage) if luggage else sums
        ctx.ring, ctx.precision = ring, precision
        ctx.save_for_backward(z, scale, sums[1])
        ctx.mark_non_differentiable(sums[1])
        return sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple:
        check_first_derivative()
        z, scale, shift = ctx.saved_tensors
        exact = z.to(shift.dtype)
        dz, dscale = torch.zeros_like(exact), torch.zeros_like(scale)

        def visit(mine: slice, theirs: slice, other: Tensor, its_grad_total: Tensor, its_shift: Tensor) -> Tensors:
            x = exact[mine]
            x_share, y_share, scale_share = ctx.ring.op("pair_logsumexp_backward")(
                grad_total[mine].contiguous(), its_grad_total[theirs], x, other[theirs].to(exact.dtype), scale, None,
                shift[mine], its_shift[theirs], nothing_kept(x, _KEEP), ctx.precision,
            )  # fmt: skip
            dz[mine].add_(x_share)
            dscale.add_(scale_share)
            return (_placed(y_share, theirs, exact),)

        for share in ctx.ring.meet((z, grad_total, shift), visit, add):
            dz.add_(share)
        return None, dz.to(z.dtype), dscale, None


def _placed(x: Tensor, rows: slice, like: Tensor) -> Tensor:
    """x, in those rows of zeros."""
    if x.shape == like.shape:
        return x
    whole = torch.zeros_like(like, dtype=x.dtype)
    whole[rows] = x
    return whole


def _unite_sums(first: Tensors, second: Tensors) -> Tensors:
    """(total, shift) of two sums of exponentials together, and likewise a weighted sum beside them."""
    (total, shift, *weighted), (other_total, other_shift, *other_weighted) = first, second
    # Nothing has been summed where a total is 0; its shift then has no meaning.
    common = torch.maximum(shift, other_shift).where(other_total != 0, shift).where(total != 0, other_shift)
    factor, other_factor = (
        (s - common).exp().where(t != 0, 0) for t, s in ((total, shift), (other_total, other_shift))
    )
    total = total * factor + other_total * other_factor
    weighted = [a * factor[:, None] + b * other_factor[:, None] for a, b in zip(weighted, other_weighted, strict=True)]
    return total, common, *weighted
