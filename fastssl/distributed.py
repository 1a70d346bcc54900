"""What a loss needs of the other processes: their number, their rows, or the log-sum-exps over all rows.

`Ring` computes a loss of a batch that is spread over the processes of a group, without any of them holding the whole.
Each process keeps its b rows x. Its b rows y travel: at step t, process r holds those of process r - t, while the next
ones are already on their way to it. Beside its own rows a process holds O(b D), two parts of the batch at most.

    similarity_logsumexp   forward: y travels, each process sums up its rows. Backward: dx needs nothing more, see
                           fastssl.ops.contrastive; for dy = W^T x, x travels with the weights of its rows.
    pair_logsumexp         forward: y travels and takes the sums of its columns along. Backward: y travels again, with
                           the weights of its columns, and takes along its gradient.
    similarity_softplus    forward: y travels and takes along its gradient. Backward: a multiplication; where the
                           processes' losses have unequal gradients, the forward pass once more.

A log-sum-exp is a pair (total, shift), log(total) + shift; two of them become one at the larger of their shifts.
Gradients are those of the sum of all processes' losses.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fastssl.ops import current_backend

ProcessGroup = dist.ProcessGroup if dist.is_available() else type(None)
Tensors = tuple[Tensor, ...]


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.disable, which imports torch._dynamo: only where something has, else nothing is compiled."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
        return run(*args, **kwargs)

    return call


def rank() -> int:
    """This process's rank in the default group, 0 without one."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """The number of processes in the default group, 1 without one."""
    return dist.get_world_size() if _initialized() else 1


def default_group(index: int, processes: int) -> ProcessGroup:
    """The default group, if it has as many processes, and this one has that rank in it."""
    if not _initialized() or (rank(), world_size()) != (index, processes):
        raise ValueError(
            "rank and world_size must be those of torch.distributed's default group,"
            f" {(rank(), world_size()) if _initialized() else 'which there is not'}, got {(index, processes)}"
        )
    return dist.group.WORLD


def gather_rows(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The rows of x of all processes, in the order of their ranks.

    The gradient of a process's x is that of the sum of all processes' losses. All must call this, and later its
    backward pass, with an x of the same shape and dtype.

    Args:
        x: (B, ...) rows of this process.
        group: the processes; None: all of them.

    Returns:
        (processes B, ...), rows rank B to (rank + 1) B being x.
    """
    return _GatherRows.apply(x, group)


def mean_over_processes(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The mean of x over the processes, summed in float32 or float64. Its gradient is the mean of their gradients."""
    return _Mean.apply(x.to(torch.promote_types(x.dtype, torch.float32)), group).to(x.dtype)


def with_mean_gradient(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """x, with the mean over the processes of their gradients of x in place of this one's."""
    return _WithGradient.apply(x, lambda gradient: mean_over_processes(gradient, group))


def with_scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times factor."""
    return _WithGradient.apply(x, lambda gradient: gradient * factor)


class Ring:
    """The processes of a group, each with a part of one batch, in a ring.

    All of them must make the same calls in the same order, and later the backward passes of the same losses. A process
    that does not, or dies, makes the others raise by the group's timeout. Derivatives are first derivatives.

    Args:
        group: the processes.
        tensors: by name, what a loss depends on. They must have the same shape, dtype and requires_grad on every
            process.

    Raises:
        TypeError: if group is no ProcessGroup.
        ValueError: if this process is not in the group, or on every process, if the tensors are not alike.
    """

    def __init__(self, group: ProcessGroup, **tensors: Tensor) -> None:
        check_group(group)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self._suffix = "_portable" if current_backend() == "portable" else ""
        check_alike(group, tensors)

    @_uncompiled
    def similarity_logsumexp(
        self, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
    ) -> tuple[Tensor, Tensor]:
        """(total, shift) of the rows of scale x y^T, with all processes' y. exclude: columns of this process's y."""
        weigh = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale))
        return _SimilarityLogsumexp.apply(self, x, y, scale, exclude, weigh, precision)

    @_uncompiled
    def pair_logsumexp(self, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str) -> Tensors:
        """(row_total, row_shift, column_total, column_shift) of this process's x and y, with all others' y and x."""
        return _PairLogsumexp.apply(self, x, y, scale, exclude, precision)

    @_uncompiled
    def similarity_softplus(
        self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None, precision: str
    ) -> Tensor:
        """The sum of softplus(scale x y^T + bias), with all processes' y."""
        derive = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale, bias))
        return _SimilaritySoftplus.apply(self, x, y, scale, bias, exclude, derive, precision)

    def op(self, name: str) -> Callable[..., Any]:
        """The operation in the backend that was chosen when the forward pass ran."""
        return getattr(torch.ops.fastssl, name + self._suffix)

    def travel(
        self,
        passengers: Tensors,
        visit: Callable[..., Tensors],
        unite: Callable[[Tensors, Tensors], Tensors] | None = None,
    ) -> Tensors:
        """Takes passengers past every process, and what visit(step, *passengers) makes of them back home.

        Args:
            passengers: read by every process, and changed by none.
            visit: at step 0 they are this process's own. It returns their luggage, perhaps none.
            unite: of the luggage that came along, and what a visit returned.

        Returns:
            The luggage of this process's passengers.
        """
        luggage: Tensors = ()
        for step in range(self.size):
            arrival = self._pass_on(passengers) if step + 1 < self.size else None
            share = visit(step, *passengers)
            luggage = unite(luggage, share) if luggage else share
            if arrival is not None:
                passengers = arrival()
            if luggage and self.size > 1:
                luggage = self._pass_on(luggage)()
        return luggage

    def _pass_on(self, tensors: Sequence[Tensor]) -> Callable[[], Tensors]:
        """Sends tensors to the next process; what is returned waits for those of the one before."""
        sent = [t.contiguous() for t in tensors]
        received = tuple(torch.empty_like(t) for t in sent)
        neighbours = (dist.isend, sent, self.rank + 1), (dist.irecv, received, self.rank - 1)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(op, t, group=self.group, group_peer=peer % self.size)
                for op, tensors, peer in neighbours
                for t in tensors
                if t.numel()
            ]
        )

        def wait(sent: list[Tensor] = sent) -> Tensors:  # which are kept until they have gone
            for work in works:
                work.wait()
            return received

        return wait


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_gather(output: Tensor, x: Tensor, group: ProcessGroup | None) -> None:
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(output, x, group=group)


def check_group(group: Any) -> None:
    """Raises TypeError if group is no ProcessGroup, ValueError if this process has no part in it."""
    if not _initialized():
        raise ValueError(f"group must be None where torch.distributed is not initialised, got {group!r}")
    if not isinstance(group, ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"group must contain this process, got one without process {rank()}")
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


@_uncompiled
def check_alike(group: ProcessGroup, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError on every process, if the tensors differ: one exchange of a few integers, and a wait for it."""
    device = next(iter(tensors.values())).device
    mine = [int(torch.is_grad_enabled())]
    for t in tensors.values():
        mine += [t.dtype.itemsize, t.dtype.is_floating_point + 2 * (t.dtype == torch.bfloat16), int(t.requires_grad)]
        mine += t.shape
    # Tensors of another number of dimensions would make a table of another width; no loss lets them come here.
    table = torch.empty(dist.get_world_size(group) * len(mine), dtype=torch.int64, device=device)
    _all_gather(table, torch.tensor(mine, device=device), group)
    rows = table.view(-1, len(mine)).tolist()
    if any(row != mine for row in rows):
        names = " and ".join(tensors)
        start, shapes = 1, []
        for t in tensors.values():
            shapes.append([tuple(row[start + 3 : start + 3 + t.dim()]) for row in rows])
            start += 3 + t.dim()
        raise ValueError(
            f"{names} must have the same shape, dtype and requires_grad on every process of group, got "
            + " and ".join(str(s) for s in shapes)
            + f" on the processes, and here {', '.join(f'{t.dtype}, {t.requires_grad}' for t in tensors.values())}"
        )


class _GatherRows(Function):
    @staticmethod
    def forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
        output = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        _all_gather(output, x.contiguous(), group)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _SumRows.apply(grad, ctx.group), None


class _SumRows(Function):
    """The gather's transpose: the sum over processes of this process's part of x."""

    @staticmethod
    def forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
        output = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
        # PyTorch 2.13 gave it, and the gather, another name.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(output, x.contiguous(), group=group)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _GatherRows.apply(grad, ctx.group), None


class _Mean(Function):
    @staticmethod
    def forward(x: Tensor, group: ProcessGroup | None) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x / dist.get_world_size(group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Mean.apply(grad, ctx.group), None


class _WithGradient(Function):
    @staticmethod
    def forward(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.change = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.change(grad), None


class _SimilarityLogsumexp(Function):
    @staticmethod
    def forward(
        ctx: Any, ring: Ring, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, precision: str
    ) -> tuple[Tensor, Tensor]:
        sums: Tensors = ()

        def visit(step: int, y: Tensor) -> Tensors:
            nonlocal sums
            total, shift, weighted = ring.op("similarity_logsumexp")(
                x, y, scale, None if step else exclude, weigh, precision
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
        _check_first_derivative()
        x, y, scale, exclude, shift, weighted = ctx.saved_tensors
        dx = (grad_total * scale)[:, None] * weighted
        dscale = (grad_total[:, None] * weighted * x).sum(dtype=torch.float64).to(scale.dtype)
        dy = None
        if ctx.needs_input_grad[2]:
            exact, dy = y.to(shift.dtype), torch.zeros_like(y, dtype=shift.dtype)

            def visit(step: int, x: Tensor, grad_total: Tensor, shift: Tensor) -> Tensors:
                dy.add_(
                    ctx.ring.op("similarity_logsumexp_backward")(
                        grad_total, x.to(exact.dtype), exact, scale, None if step else exclude, shift, weighted, True,
                        ctx.precision,
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
            *share, column_total, column_shift = ring.op("pair_logsumexp")(
                x, y, scale, None if step else exclude, precision
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
        _check_first_derivative()
        x, y, scale, exclude, row_shift, column_shift = ctx.saved_tensors
        exact = x.to(row_shift.dtype)
        dx, dscale = torch.zeros_like(exact), torch.zeros_like(scale)

        def visit(step: int, y: Tensor, grad_column_total: Tensor, column_shift: Tensor) -> Tensors:
            x_share, y_share, scale_share = ctx.ring.op("pair_logsumexp_backward")(
                grad_row_total, grad_column_total, exact, y.to(exact.dtype), scale, None if step else exclude,
                row_shift, column_shift, ctx.precision,
            )  # fmt: skip
            dx.add_(x_share)
            dscale.add_(scale_share)
            return (y_share,)

        (dy,) = ctx.ring.travel((y, grad_column_total, column_shift), visit, _add)
        return None, dx.to(x.dtype), dy.to(y.dtype), dscale, None, None


class _SimilaritySoftplus(Function):
    @staticmethod
    def forward(
        ctx: Any,
        ring: Ring,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        exclude: Tensor | None,
        derive: bool,
        precision: str,
    ) -> Tensor:
        total, *gradients = _softplus_ring(ring, x, y, scale, bias, exclude, derive, precision)
        ctx.ring, ctx.precision = ring, precision
        ctx.save_for_backward(x, y, scale, bias, exclude, *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple:
        _check_first_derivative()
        x, y, scale, bias, exclude, *gradients = ctx.saved_tensors
        inputs = x, y, scale, bias
        dx, dy, dscale, dbias = (grad_total * g for g in gradients)
        everyone = grad_total.new_empty(ctx.ring.size)
        _all_gather(everyone, grad_total.reshape(1), ctx.ring.group)
        if any(g != grad_total.item() for g in everyone.tolist()):
            dy = _softplus_ring(ctx.ring, *inputs, exclude, True, ctx.precision, grad_total)[2]
        gradients = (g.to(t.dtype) for g, t in zip((dx, dy, dscale, dbias), inputs, strict=True))
        return None, *gradients, None, None, None


def _softplus_ring(
    ring: Ring,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    exclude: Tensor | None,
    derive: bool,
    precision: str,
    weight: Tensor | None = None,
) -> Tensors:
    """(total, dx, dy, dscale, dbias), dy being the sum of every process's, times its weight."""
    own: Tensors = ()

    def visit(step: int, y: Tensor) -> Tensors:
        nonlocal own
        total, dx, dy, dscale, dbias = ring.op("similarity_softplus")(
            x, y, scale, bias, None if step else exclude, derive, precision
        )
        share = total, dx, dscale, dbias
        own = _add(own, share) if own else share
        return (dy if weight is None else weight * dy,) if derive else ()

    luggage = ring.travel((y,), visit, _add)
    total, dx, dscale, dbias = own
    return total, dx, luggage[0] if derive else torch.empty_like(dx), dscale, dbias


def _check_first_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph must be False: the losses of a group have first derivatives only")


def _add(first: Tensors, second: Tensors) -> Tensors:
    return tuple(a + b for a, b in zip(first, second, strict=True))


def _unite_sums(first: Tensors, second: Tensors) -> Tensors:
    """(total, shift) of two sums of exponentials together; and so for a weighted sum beside them."""
    (total, shift, *weighted), (other_total, other_shift, *other_weighted) = first, second
    # Nothing has been summed up where a total is 0, and its shift says nothing.
    common = torch.maximum(shift, other_shift).where(other_total != 0, shift).where(total != 0, other_shift)
    factor, other_factor = (
        (s - common).exp().where(t != 0, 0) for t, s in ((total, shift), (other_total, other_shift))
    )
    total = total * factor + other_total * other_factor
    weighted = [a * factor[:, None] + b * other_factor[:, None] for a, b in zip(weighted, other_weighted, strict=True)]
    return total, common, *weighted
