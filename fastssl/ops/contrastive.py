"""Softmax contrastive losses: schemas, fake kernels, derivatives, and the portable code.

NT-Xent, with z the 2B (normalised) rows of [z1; z2], S = scale z z^T, pos(i) = (i + B) mod 2B:

    lse_i  = log sum_{j != i} exp(S_ij) = shift_i + log(total_i)
    loss_i = lse_i - S_{i, pos(i)}

The forward pass keeps the log-sum-exp as the pair (shift, total), the shift being the row's maximum or any
number near enough to it: the backward pass then divides by the very sum that the forward pass took, and a
log-sum-exp of 100, rounded to float32, costs no accuracy. Its gradient, given g_i = dL/dloss_i. The matrix W is symmetric and never stored:

    a_i      = g_i / total_i
    W_ij     = a_i exp(S_ij - shift_i) + a_j exp(S_ij - shift_j) - [j = pos(i)] (g_i + g_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G = W z
    dL/dscale = 1/2 sum_i <z_i, G_i>

and, where rows were normalised, z = x / |x|:   dL/dx_i = (dL/dz_i - <dL/dz_i, z_i> z_i) / |x_i|.

The log-sum-exp of one set of rows against another, for what is not symmetric (other ranks' rows, a queue), with
S = scale x y^T and the column exclude[i] of row i left out:

    lse_i      = log sum_{j != exclude[i]} exp(S_ij) = shift_i + log(total_i)
    weighted_i = sum_j E_ij y_j,    E_ij = exp(S_ij - shift_i)

What is differentiated is total, with the shift held constant: shift + log(total) then has every derivative of the
log-sum-exp. As flash attention does, the forward pass takes the weighted sum beside the total. Given g_i = dL/dtotal_i,

    dL/dx_i  = scale g_i weighted_i,    dL/dscale = sum_i g_i <x_i, weighted_i>,    dL/dy = scale E^T (g x)

so the backward pass recomputes S for y alone, and reads nothing of a y without gradient: a queue may move on
between the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._precision import accumulate_dtype, round_operand

_EPS = 1e-12  # torch.nn.functional.normalize's
_BLOCK_ELEMENTS = 1 << 22  # of S at a time: 16 MiB in float32


def _cuda(name: str):
    """The Triton launcher `name`, imported at its first call; None where Triton is not installed."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return None

    def launch(*args: Any) -> Any:
        from fastssl.kernels import contrastive

        if args[-1] == "float64":
            return getattr(torch.ops.fastssl, f"{name}_portable")(*args)
        return getattr(contrastive, name)(*args)

    return launch


def _normalized_rows(z1: Tensor, z2: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """(z, norms): the 2B rows in the dtype of sums, and the norms they were divided by (2B, 1), unclamped."""
    z = torch.cat([z1, z2]).to(accumulate_dtype(z1.dtype))
    if not normalize:
        return z, None
    # Through float64, so that rows of 1e-30 or 1e30 have a norm in float32.
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
    return (z / norms.clamp_min(_EPS)).to(z.dtype), norms.to(z.dtype)


def _blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Consecutive (start, stop) that cut the rows of a matrix into pieces of bounded size."""
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _nt_xent_fake(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, ...]:
    return tuple(z1.new_empty(2 * z1.shape[0], dtype=accumulate_dtype(z1.dtype)) for _ in range(3))


def _nt_xent_portable(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, ...]:
    z = round_operand(_normalized_rows(z1, z2, normalize)[0], precision)
    rows = z.shape[0]
    loss, shift, total = z.new_empty(rows), z.new_empty(rows), z.new_empty(rows)
    positive = torch.arange(rows, device=z.device).roll(rows // 2)
    for start, stop in _blocks(rows, rows):
        similarity = (z[start:stop] @ z.T).mul_(scale)
        similarity.diagonal(start).fill_(float("-inf"))
        aligned = similarity.gather(1, positive[start:stop, None]).squeeze(1)
        shift[start:stop] = similarity.amax(1)
        total[start:stop] = similarity.sub_(shift[start:stop, None]).exp_().sum(1)
        loss[start:stop] = total[start:stop].log() + (shift[start:stop] - aligned)
    return loss, shift, total


def _nt_xent_backward_fake(
    grad_loss: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return z1.new_empty(z1.shape), z2.new_empty(z2.shape), scale.new_empty(())


def _nt_xent_backward_portable(
    grad_loss: Tensor,
    z1: Tensor,
    z2: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    z, norms = _normalized_rows(z1, z2, normalize)
    rounded = round_operand(z, precision)
    rows = z.shape[0]
    gradient, coefficient = torch.empty_like(z), grad_loss / total
    for start, stop in _blocks(rows, rows):
        similarity = (rounded[start:stop] @ rounded.T).mul_(scale)
        weight = (similarity - shift[start:stop, None]).exp_().mul_(coefficient[start:stop, None])
        weight += similarity.sub_(shift).exp_().mul_(coefficient)
        weight.diagonal(start).zero_()
        gradient[start:stop] = round_operand(weight, precision) @ rounded
    half = rows // 2
    gradient -= (grad_loss + grad_loss.roll(half))[:, None] * z.roll(half, 0)
    grad_scale = (z * gradient).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    gradient *= scale
    if norms is not None:
        along = (gradient * z).sum(1, keepdim=True).where(norms > _EPS, 0)
        gradient = (gradient - along * z) / norms.clamp_min(_EPS)
    dz1, dz2 = gradient.to(z1.dtype).split(half) if half else (z1.clone(), z2.clone())
    return dz1.clone(), dz2.clone(), grad_scale


def _nt_xent_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z1, z2, scale, ctx.normalize, ctx.precision = inputs
    _, shift, total = output
    ctx.save_for_backward(z1, z2, scale, shift, total)
    ctx.mark_non_differentiable(shift, total)


def _nt_xent_backward(ctx: Any, backward_op: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    return *backward_op(grad_loss, *ctx.saved_tensors, ctx.normalize, ctx.precision), None, None


def _nt_xent_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_loss, z1, z2, scale, _, _, ctx.normalize, _ = inputs
    ctx.save_for_backward(grad_loss, z1, z2, scale)


def _nt_xent_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    """Second derivatives: the gradient of the loss's directional derivative, one block of rows at a time.

    The first derivative's cotangents u are a direction in the space of (z1, z2, scale), and
    <u, dL/d(z1, z2, scale)> is the derivative of L along u, a sum over rows of the loss.
    """
    grad_loss, *point = ctx.saved_tensors
    rows, dtype = grad_loss.shape[0], accumulate_dtype(point[0].dtype)
    total = [torch.zeros_like(x, dtype=dtype) for x in (grad_loss, *point)]
    for start, stop in _blocks(rows, rows):

        def loss(z1: Tensor, z2: Tensor, scale: Tensor, grad_loss: Tensor) -> Tensor:
            z = torch.cat([z1, z2])
            z = F.normalize(z, dim=1, eps=_EPS) if ctx.normalize else z
            similarity = z[start:stop] @ z.T * scale
            column = torch.arange(rows, device=z.device)
            row = column[start:stop, None]
            lse = similarity.masked_fill(column == row, float("-inf")).logsumexp(1)
            return (grad_loss[start:stop] * (lse - similarity.gather(1, (row + rows // 2) % rows).squeeze(1))).sum()

        def along(grad_loss: Tensor, *point: Tensor) -> Tensor:
            return torch.func.jvp(lambda *p: loss(*p, grad_loss), point, tuple(u.to(dtype) for u in directions))[1]

        inputs = (grad_loss, *(x.to(dtype).contiguous() for x in point))  # jvp refuses expanded tensors
        total = [t + g for t, g in zip(total, torch.func.grad(along, argnums=(0, 1, 2, 3))(*inputs), strict=True)]
    dg, dz1, dz2, dscale = (t.to(x.dtype) for t, x in zip(total, (grad_loss, *point), strict=True))
    return dg, dz1, dz2, dscale, None, None, None, None


_backward = Op(
    "nt_xent_backward(Tensor grad_loss, Tensor z1, Tensor z2, Tensor scale, Tensor shift, Tensor total, bool normalize,"
    " str precision) -> (Tensor, Tensor, Tensor)",
    fake=_nt_xent_backward_fake,
    portable=_nt_xent_backward_portable,
    setup_context=_nt_xent_backward_setup_context,
    backward=_nt_xent_double_backward,
    cuda=_cuda("nt_xent_backward"),
)

nt_xent = Op(
    "nt_xent(Tensor z1, Tensor z2, Tensor scale, bool normalize, str precision)"
    " -> (Tensor loss, Tensor shift, Tensor total)",
    fake=_nt_xent_fake,
    portable=_nt_xent_portable,
    setup_context=_nt_xent_setup_context,
    backward=_nt_xent_backward,
    backward_op=_backward,
    cuda=_cuda("nt_xent"),
)


def _row_blocks(x: Tensor, y: Tensor) -> list[slice]:
    """The rows of x in blocks whose similarities with all of y are of bounded size."""
    return [slice(*block) for block in _blocks(x.shape[0], y.shape[0])] if y.shape[0] else []


def _similarity(rows: slice, x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None) -> Tensor:
    """S[rows], minus infinity where a column is excluded."""
    similarity = x[rows] @ y.T * scale
    if exclude is None:
        return similarity
    return similarity.masked_fill(torch.arange(y.shape[0], device=y.device) == exclude[rows, None], float("-inf"))


def _similarity_logsumexp_fake(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    row = x.new_empty(x.shape[0], dtype=dtype)
    return row, torch.empty_like(row), x.new_empty(x.shape, dtype=dtype)


def _similarity_logsumexp_portable(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (round_operand(t.to(accumulate_dtype(t.dtype)), precision) for t in (x, y))
    total, shift, weighted = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0]), x.new_zeros(x.shape)
    for rows in _row_blocks(x, y):
        similarity = _similarity(rows, x, y, scale, exclude)
        largest = similarity.amax(1)
        shift[rows] = largest.where(largest != float("-inf"), 0)  # where every column is excluded
        weight = similarity.sub_(shift[rows, None]).exp_()
        total[rows] = weight.sum(1)
        weighted[rows] = round_operand(weight, precision) @ y
    return total, shift, weighted


def _similarity_logsumexp_backward_fake(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    shift: Tensor,
    weighted: Tensor,
    needs_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty((y.shape[0] if needs_y else 0, y.shape[1])), scale.new_empty(())


def _similarity_logsumexp_backward_portable(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    shift: Tensor,
    weighted: Tensor,
    needs_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = (grad_total * scale)[:, None] * weighted
    dscale = (grad_total[:, None] * weighted * x).sum(dtype=torch.float64).to(scale.dtype)
    dy = weighted.new_zeros((y.shape[0] if needs_y else 0, y.shape[1]))
    if needs_y:
        rounded_x, rounded_y = (round_operand(t.to(dy.dtype), precision) for t in (x, y))
        for rows in _row_blocks(x, y):
            similarity = _similarity(rows, rounded_x, rounded_y, scale, exclude)
            weight = similarity.sub_(shift[rows, None]).exp_().mul_(grad_total[rows, None])
            dy.addmm_(round_operand(weight, precision).T, rounded_x[rows])
        dy *= scale
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def _similarity_logsumexp_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, ctx.y, scale, exclude, ctx.precision = inputs
    _, shift, weighted = output
    # save_for_backward would refuse to go on once y has been overwritten, which harms nothing if y needs no gradient.
    ctx.y_version = ctx.y._version
    ctx.save_for_backward(x, scale, exclude, shift, weighted)
    ctx.mark_non_differentiable(shift, weighted)


def _similarity_logsumexp_backward(ctx: Any, backward_op: Any, grad_total: Tensor, *_: Tensor) -> tuple:
    x, scale, exclude, shift, weighted = ctx.saved_tensors
    needs_y = ctx.needs_input_grad[1]
    if (needs_y or torch.is_grad_enabled()) and ctx.y._version != ctx.y_version:
        what = "its gradient" if needs_y else "a second derivative"
        raise RuntimeError(
            f"y was modified in place after the forward pass, and {what} needs its values:"
            f" it is at version {ctx.y._version}, expected {ctx.y_version}"
        )
    dx, dy, dscale = backward_op(grad_total, x, ctx.y, scale, exclude, shift, weighted, needs_y, ctx.precision)
    return dx, dy if needs_y else None, dscale, None, None


def _similarity_logsumexp_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_total, x, y, scale, exclude, shift, _, ctx.needs_y, _ = inputs
    ctx.save_for_backward(grad_total, x, y, scale, exclude, shift)


def _similarity_logsumexp_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    """Second derivatives, as NT-Xent's."""
    grad_total, x, y, scale, exclude, shift = ctx.saved_tensors
    inputs, dtype = (grad_total, x, y, scale), shift.dtype
    direction_x, direction_y, direction_scale = (u.to(dtype) for u in directions)
    directions = direction_x, direction_y if ctx.needs_y else torch.zeros_like(y, dtype=dtype), direction_scale
    sums = [torch.zeros_like(t, dtype=dtype) for t in inputs]

    def total(rows: slice, x: Tensor, y: Tensor, scale: Tensor, grad_total: Tensor) -> Tensor:
        similarity = _similarity(rows, x, y, scale, exclude)
        return (grad_total[rows] * (similarity - shift[rows, None]).exp().sum(1)).sum()

    def along(rows: slice, grad_total: Tensor, *point: Tensor) -> Tensor:
        return torch.func.jvp(lambda *p: total(rows, *p, grad_total), point, directions)[1]

    for rows in _row_blocks(x, y):
        gradient = torch.func.grad(partial(along, rows), argnums=(0, 1, 2, 3))
        gradients = gradient(*(t.to(dtype).contiguous() for t in inputs))
        sums = [s + g for s, g in zip(sums, gradients, strict=True)]
    return *(s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)), None, None, None, None, None


_similarity_logsumexp_backward_op = Op(
    "similarity_logsumexp_backward(Tensor grad_total, Tensor x, Tensor y, Tensor scale, Tensor? exclude, Tensor shift,"
    " Tensor weighted, bool needs_y, str precision) -> (Tensor, Tensor, Tensor)",
    fake=_similarity_logsumexp_backward_fake,
    portable=_similarity_logsumexp_backward_portable,
    setup_context=_similarity_logsumexp_backward_setup_context,
    backward=_similarity_logsumexp_double_backward,
)

similarity_logsumexp = Op(
    "similarity_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? exclude, str precision)"
    " -> (Tensor total, Tensor shift, Tensor weighted)",
    fake=_similarity_logsumexp_fake,
    portable=_similarity_logsumexp_portable,
    setup_context=_similarity_logsumexp_setup_context,
    backward=_similarity_logsumexp_backward,
    backward_op=_similarity_logsumexp_backward_op,
)
