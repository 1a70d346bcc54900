"""Softmax contrastive losses: schemas, fake kernels, derivatives, and the portable code.

NT-Xent, with z the 2B (normalised) rows of [z1; z2], S = scale z z^T, pos(i) = (i + B) mod 2B:

    lse_i  = log sum_{j != i} exp(S_ij) = shift_i + log(total_i)
    loss_i = lse_i - S_{i, pos(i)}

The forward pass keeps the log-sum-exp as the pair (shift, total), the shift being the row's maximum or any
number near enough to it: the backward pass then divides by the very sum that the forward pass took, and a
log-sum-exp of 100, rounded to float32, costs no accuracy. Its gradient, given g_i = dL/dloss_i, with a symmetric
matrix W that is never stored:

    a_i      = g_i / total_i
    W_ij     = a_i exp(S_ij - shift_i) + a_j exp(S_ij - shift_j) - [j = pos(i)] (g_i + g_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G = W z
    dL/dscale = 1/2 sum_i <z_i, G_i>

and, where rows were normalised, z = x / |x|:   dL/dx_i = (dL/dz_i - <dL/dz_i, z_i> z_i) / |x_i|.

The other operations are log-sum-exps of the similarities of two sets of rows, S = scale x y^T, from which
`fastssl.functional` makes every other softmax contrastive loss: the positives are cheap, O(B D), and are left to
autograd. In row i the column exclude[i] is left out, most often the positive: with n_i the log-sum-exp of the
negatives, InfoNCE is softplus(n_i - S_ip), which loses nothing where a confident model makes it small.

    similarity_logsumexp   of each row of S
    pair_logsumexp         of each row and of each column of S (CLIP)
    self_logsumexp         of each row of S = scale z z^T without the diagonal (SupCon, DCL)

and clip_loss and sup_con, which do that in one operation: in a small batch the elementwise steps cost most. SupCon's
positives are the other rows of row i's label, c_i of them, and need no product either:

    loss_i = lse_i - <z_i, sum_j z_j - z_i> scale / c_i,  j of row i's label,    0 where there are none

Each gives the log-sum-exp as a pair again, total_i = sum_j E_ij, E_ij = exp(S_ij - shift_i); here shift_i is the row's
largest S_ij, which metrics read, or 0 where every column is excluded (not in self_logsumexp: any number near). What is
differentiated is total, with the shift held constant: shift + log(total) then has every derivative of the log-sum-exp.
Given the gradients g_i of the rows' totals, h_j of the columns', and W their weights, W_ij = g_i E_ij +
h_j exp(S_ij - shift'_j),

    dL/dx = scale W y,    dL/dy = scale W^T x,    dL/dscale = <x, W y>,    dL/dz = scale (W + W^T) z

Where only rows are summed, W y = g (E y): as flash attention does, the forward pass takes the weighted sum E y beside
the total (`weigh`), so the backward pass recomputes S for y alone, and reads nothing of a y without gradient: a
queue may move on between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import row_blocks, second_derivative, similarity
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights

_EPS = 1e-12  # torch.nn.functional.normalize's


def _normalized_rows(z: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """(z, norms): the rows in the dtype of sums, and the norms they were divided by (N, 1), unclamped."""
    z = z.to(accumulate_dtype(z.dtype))
    if not normalize:
        return z, None
    # Through float64, so that rows of 1e-30 or 1e30 have a norm in float32.
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
    return (z / norms.clamp_min(_EPS)).to(z.dtype), norms.to(z.dtype)


def _through_norms(gradient: Tensor, z: Tensor, norms: Tensor | None) -> Tensor:
    """The gradient of the rows that `_normalized_rows` was given, from that of z."""
    if norms is None:
        return gradient
    along = (gradient * z).sum(1, keepdim=True).where(norms > _EPS, 0)
    return (gradient - along * z) / norms.clamp_min(_EPS)


def _nt_xent_fake(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, ...]:
    return tuple(z1.new_empty(2 * z1.shape[0], dtype=accumulate_dtype(z1.dtype)) for _ in range(3))


def _nt_xent_portable(z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, precision: str) -> tuple[Tensor, ...]:
    z = round_operand(_normalized_rows(torch.cat([z1, z2]), normalize)[0], precision)
    rows = z.shape[0]
    loss, shift, total = z.new_empty(rows), z.new_empty(rows), z.new_empty(rows)
    positive = torch.arange(rows, device=z.device).roll(rows // 2)
    for block in row_blocks(rows, rows):
        S = (z[block] @ z.T).mul_(scale)
        S.diagonal(block.start).fill_(float("-inf"))
        aligned = S.gather(1, positive[block, None]).squeeze(1)
        shift[block] = S.amax(1)
        total[block] = S.sub_(shift[block, None]).exp_().sum(1)
        loss[block] = total[block].log() + (shift[block] - aligned)
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
    z, norms = _normalized_rows(torch.cat([z1, z2]), normalize)
    rounded = round_operand(z, precision)
    rows = z.shape[0]
    gradient, coefficient = torch.empty_like(z), grad_loss / total
    for block in row_blocks(rows, rows):
        S = (rounded[block] @ rounded.T).mul_(scale)
        weight = (S - shift[block, None]).exp_().mul_(coefficient[block, None])
        weight += S.sub_(shift).exp_().mul_(coefficient)
        weight.diagonal(block.start).zero_()
        gradient[block] = round_weights(weight, precision) @ rounded
    half = rows // 2
    gradient -= (grad_loss + grad_loss.roll(half))[:, None] * z.roll(half, 0)
    grad_scale = (z * gradient).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    gradient = _through_norms(gradient.mul_(scale), z, norms)
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
    grad_loss, *point = ctx.saved_tensors
    rows = grad_loss.shape[0]

    def loss(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        z1, z2, scale = point
        z = torch.cat([z1, z2])
        z = F.normalize(z, dim=1, eps=_EPS) if ctx.normalize else z
        own = torch.arange(rows, device=z.device)
        S = similarity(block, z, z, scale, own)
        aligned = S.gather(1, own.roll(rows // 2)[block, None]).squeeze(1)
        return (cotangents[0][block] * (S.logsumexp(1) - aligned)).sum()

    dtype = accumulate_dtype(point[0].dtype)
    blocks = row_blocks(rows, rows)
    return *second_derivative(loss, blocks, [grad_loss], point, directions, dtype), None, None, None, None


_backward = Op(
    "nt_xent_backward(Tensor grad_loss, Tensor z1, Tensor z2, Tensor scale, Tensor shift, Tensor total, bool normalize,"
    " str precision) -> (Tensor grad_z1, Tensor grad_z2, Tensor grad_scale)",
    fake=_nt_xent_backward_fake,
    portable=_nt_xent_backward_portable,
    setup_context=_nt_xent_backward_setup_context,
    backward=_nt_xent_double_backward,
    cuda=triton_launcher("contrastive", "nt_xent_backward"),
)

nt_xent = Op(
    "nt_xent(Tensor z1, Tensor z2, Tensor scale, bool normalize, str precision)"
    " -> (Tensor loss, Tensor shift, Tensor total)",
    fake=_nt_xent_fake,
    portable=_nt_xent_portable,
    setup_context=_nt_xent_setup_context,
    backward=_nt_xent_backward,
    backward_op=_backward,
    cuda=triton_launcher("contrastive", "nt_xent"),
)


def _sums_of_exponentials(S: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(total, shift): the sum of exp(S - shift), 0 where there is none, and the shift, the maximum, broadcast."""
    largest = S.amax(dim, keepdim=True)
    shift = largest.where(largest != float("-inf"), 0)
    return (S - shift).exp().sum(dim), shift.squeeze(dim)


def _similarity_logsumexp_fake(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    rows, dim = x.shape
    return *(x.new_empty(rows, dtype=dtype) for _ in range(2)), x.new_empty((rows if weigh else 0, dim), dtype=dtype)


def _similarity_logsumexp_portable(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (round_operand(t.to(accumulate_dtype(t.dtype)), precision) for t in (x, y))
    rows, dim = x.shape
    total, shift, weighted = x.new_zeros(rows), x.new_zeros(rows), x.new_zeros(rows if weigh else 0, dim)
    for block in row_blocks(rows, y.shape[0]):
        S = similarity(block, x, y, scale, exclude)
        total[block], shift[block] = _sums_of_exponentials(S, 1)
        if weigh:
            weighted[block] = round_weights(S.sub_(shift[block, None]).exp_(), precision) @ y
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
        for block in row_blocks(x.shape[0], y.shape[0]):
            S = similarity(block, rounded_x, rounded_y, scale, exclude)
            weight = S.sub_(shift[block, None]).exp_().mul_(grad_total[block, None])
            dy.addmm_(round_weights(weight, precision).T, rounded_x[block])
        dy *= scale
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def _similarity_logsumexp_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, ctx.y, scale, exclude, _, ctx.precision = inputs
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
    return dx, dy if needs_y else None, dscale, None, None, None


def _similarity_logsumexp_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_total, x, y, scale, exclude, shift, _, ctx.needs_y, _ = inputs
    ctx.save_for_backward(grad_total, x, y, scale, exclude, shift)


def _similarity_logsumexp_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_total, *point, exclude, shift = ctx.saved_tensors
    if not ctx.needs_y:
        directions = directions[0], torch.zeros_like(point[1]), directions[2]

    def total(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        return (cotangents[0][block] * (similarity(block, *point, exclude) - shift[block, None]).exp().sum(1)).sum()

    blocks = row_blocks(point[0].shape[0], point[1].shape[0])
    gradients = second_derivative(total, blocks, [grad_total], point, directions, shift.dtype)
    return *gradients, None, None, None, None, None


_similarity_logsumexp_backward_op = Op(
    "similarity_logsumexp_backward(Tensor grad_total, Tensor x, Tensor y, Tensor scale, Tensor? exclude, Tensor shift,"
    " Tensor weighted, bool needs_y, str precision) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_similarity_logsumexp_backward_fake,
    portable=_similarity_logsumexp_backward_portable,
    setup_context=_similarity_logsumexp_backward_setup_context,
    backward=_similarity_logsumexp_double_backward,
    cuda=triton_launcher("contrastive", "similarity_logsumexp_backward"),
)

similarity_logsumexp = Op(
    "similarity_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? exclude, bool weigh, str precision)"
    " -> (Tensor total, Tensor shift, Tensor weighted)",
    fake=_similarity_logsumexp_fake,
    portable=_similarity_logsumexp_portable,
    setup_context=_similarity_logsumexp_setup_context,
    backward=_similarity_logsumexp_backward,
    backward_op=_similarity_logsumexp_backward_op,
    cuda=triton_launcher("contrastive", "similarity_logsumexp"),
)


def _pair_logsumexp_fake(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x.dtype)
    return tuple(t.new_empty(t.shape[0], dtype=dtype) for t in (x, x, y, y))


def _pair_logsumexp_portable(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = (round_operand(t.to(accumulate_dtype(t.dtype)), precision) for t in (x, y))
    row_total, row_shift = (x.new_zeros(x.shape[0]) for _ in range(2))
    column_total, largest = y.new_zeros(y.shape[0]), y.new_full((y.shape[0],), float("-inf"))
    column_shift = torch.zeros_like(column_total)
    for block in row_blocks(x.shape[0], y.shape[0]):
        S = similarity(block, x, y, scale, exclude)
        row_total[block], row_shift[block] = _sums_of_exponentials(S, 1)
        largest = torch.maximum(largest, S.amax(0))
        shift = largest.where(largest != float("-inf"), 0)
        # The shift may fall where it was 0 because nothing had been seen: the total, 0, is then not to be moved.
        moved = column_total * (column_shift - shift).exp()
        column_total = moved.where(column_total != 0, 0) + S.sub_(shift).exp_().sum(0)
        column_shift = shift
    return row_total, row_shift, column_total, column_shift


def _pair_logsumexp_backward_fake(
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(())


def _pair_logsumexp_backward_portable(
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rounded_x, rounded_y = (round_operand(t.to(row_shift.dtype), precision) for t in (x, y))
    dx, dy = torch.zeros_like(rounded_x), torch.zeros_like(rounded_y)
    for block in row_blocks(x.shape[0], y.shape[0]):
        S = similarity(block, rounded_x, rounded_y, scale, exclude)
        weight = (S - row_shift[block, None]).exp_().mul_(grad_row_total[block, None])
        weight += S.sub_(column_shift).exp_().mul_(grad_column_total)
        weight = round_weights(weight, precision)
        dx[block] = weight @ rounded_y
        dy.addmm_(weight.T, rounded_x[block])
    dscale = (dx * x).sum(dtype=torch.float64).to(scale.dtype)
    return dx.mul_(scale).to(x.dtype), dy.mul_(scale).to(y.dtype), dscale


def _pair_logsumexp_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, y, scale, exclude, ctx.precision = inputs
    _, row_shift, _, column_shift = output
    ctx.save_for_backward(x, y, scale, exclude, row_shift, column_shift)
    ctx.mark_non_differentiable(row_shift, column_shift)


def _pair_logsumexp_backward(
    ctx: Any, backward_op: Any, grad_row_total: Tensor, _: Tensor, grad_column_total: Tensor, __: Tensor
) -> tuple:
    return *backward_op(grad_row_total, grad_column_total, *ctx.saved_tensors, ctx.precision), None, None


def _pair_logsumexp_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _pair_logsumexp_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_row_total, grad_column_total, *point, exclude, row_shift, column_shift = ctx.saved_tensors

    def total(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        S = similarity(block, *point, exclude)
        rows = cotangents[0][block] * (S - row_shift[block, None]).exp().sum(1)
        return rows.sum() + (cotangents[1] * (S - column_shift).exp()).sum()

    blocks = row_blocks(point[0].shape[0], point[1].shape[0])
    cotangents = grad_row_total, grad_column_total
    gradients = second_derivative(total, blocks, cotangents, point, directions, row_shift.dtype)
    return *gradients, None, None, None, None


_pair_logsumexp_backward_op = Op(
    "pair_logsumexp_backward(Tensor grad_row_total, Tensor grad_column_total, Tensor x, Tensor y, Tensor scale,"
    " Tensor? exclude, Tensor row_shift, Tensor column_shift, str precision)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_pair_logsumexp_backward_fake,
    portable=_pair_logsumexp_backward_portable,
    setup_context=_pair_logsumexp_backward_setup_context,
    backward=_pair_logsumexp_double_backward,
    cuda=triton_launcher("contrastive", "pair_logsumexp_backward"),
)

pair_logsumexp = Op(
    "pair_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? exclude, str precision)"
    " -> (Tensor row_total, Tensor row_shift, Tensor column_total, Tensor column_shift)",
    fake=_pair_logsumexp_fake,
    portable=_pair_logsumexp_portable,
    setup_context=_pair_logsumexp_setup_context,
    backward=_pair_logsumexp_backward,
    backward_op=_pair_logsumexp_backward_op,
    cuda=triton_launcher("contrastive", "pair_logsumexp"),
)


def _self_logsumexp_fake(z: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    return tuple(z.new_empty(z.shape[0], dtype=accumulate_dtype(z.dtype)) for _ in range(2))


def _self_logsumexp_portable(z: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    z = round_operand(z.to(accumulate_dtype(z.dtype)), precision)
    rows = z.shape[0]
    total, shift = z.new_zeros(rows), z.new_zeros(rows)
    for block in row_blocks(rows, rows):
        S = (z[block] @ z.T).mul_(scale)
        S.diagonal(block.start).fill_(float("-inf"))
        total[block], shift[block] = _sums_of_exponentials(S, 1)
    return total, shift


def _self_logsumexp_backward_fake(
    grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(())


def _self_logsumexp_backward_portable(
    grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    rounded = round_operand(z.to(shift.dtype), precision)
    gradient = torch.zeros_like(rounded)
    for block in row_blocks(z.shape[0], z.shape[0]):
        S = (rounded[block] @ rounded.T).mul_(scale)
        weight = (S - shift[block, None]).exp_().mul_(grad_total[block, None])
        weight += S.sub_(shift).exp_().mul_(grad_total)
        weight.diagonal(block.start).zero_()
        gradient[block] = round_weights(weight, precision) @ rounded
    dscale = (z * gradient).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    return gradient.mul_(scale).to(z.dtype), dscale


def _self_logsumexp_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, scale, ctx.precision = inputs
    ctx.save_for_backward(z, scale, output[1])
    ctx.mark_non_differentiable(output[1])


def _self_logsumexp_backward(ctx: Any, backward_op: Any, grad_total: Tensor, _: Tensor) -> tuple:
    return *backward_op(grad_total, *ctx.saved_tensors, ctx.precision), None


def _self_logsumexp_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _self_logsumexp_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_total, *point, shift = ctx.saved_tensors
    rows = shift.shape[0]

    def total(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        z, scale = point
        S = similarity(block, z, z, scale, torch.arange(rows, device=z.device))
        return (cotangents[0][block] * (S - shift[block, None]).exp().sum(1)).sum()

    blocks = row_blocks(rows, rows)
    return *second_derivative(total, blocks, [grad_total], point, directions, shift.dtype), None, None


_self_logsumexp_backward_op = Op(
    "self_logsumexp_backward(Tensor grad_total, Tensor z, Tensor scale, Tensor shift, str precision)"
    " -> (Tensor grad_z, Tensor grad_scale)",
    fake=_self_logsumexp_backward_fake,
    portable=_self_logsumexp_backward_portable,
    setup_context=_self_logsumexp_backward_setup_context,
    backward=_self_logsumexp_double_backward,
    cuda=triton_launcher("contrastive", "self_logsumexp_backward"),
)

self_logsumexp = Op(
    "self_logsumexp(Tensor z, Tensor scale, str precision) -> (Tensor total, Tensor shift)",
    fake=_self_logsumexp_fake,
    portable=_self_logsumexp_portable,
    setup_context=_self_logsumexp_setup_context,
    backward=_self_logsumexp_backward,
    backward_op=_self_logsumexp_backward_op,
    cuda=triton_launcher("contrastive", "self_logsumexp"),
)


def _margin(total: Tensor, shift: Tensor, positive: Tensor) -> Tensor:
    """n - positive, n the log-sum-exp of the negatives: the cross-entropy is its softplus."""
    return total.log() + (shift - positive)


def _clip_loss_fake(x: Tensor, y: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype)) for _ in range(6))


def _clip_loss(pair: Callable[..., Any], x: Tensor, y: Tensor, scale: Tensor, precision: str) -> tuple[Tensor, ...]:
    dtype, own = accumulate_dtype(x.dtype), torch.arange(x.shape[0], device=x.device)
    positive = torch.linalg.vecdot(x.to(dtype), y.to(dtype)) * scale
    sums = pair(x, y, scale, own, precision)
    margins = _margin(*sums[:2], positive), _margin(*sums[2:], positive)
    loss = -(F.logsigmoid(-margins[0]) + F.logsigmoid(-margins[1])) / 2
    return loss, positive, *sums


def _clip_loss_backward_fake(
    grad_loss: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    row_total: Tensor,
    row_shift: Tensor,
    column_total: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(())


def _clip_loss_backward(
    pair_backward: Callable[..., Any],
    grad_loss: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive: Tensor,
    row_total: Tensor,
    row_shift: Tensor,
    column_total: Tensor,
    column_shift: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, own = positive.dtype, torch.arange(x.shape[0], device=x.device)
    slopes, grad_totals = [], []
    for total, shift in ((row_total, row_shift), (column_total, column_shift)):
        slopes.append(_margin(total, shift, positive).sigmoid() * grad_loss / 2)
        grad_totals.append((slopes[-1] / total).where(total != 0, 0))
    # In the dtype of sums, where the positives' terms are still to be added.
    wide_x, wide_y = x.to(dtype), y.to(dtype)
    dx, dy, dscale = pair_backward(*grad_totals, wide_x, wide_y, scale, own, row_shift, column_shift, precision)
    weight = -(slopes[0] + slopes[1])
    dscale = dscale + (weight * torch.linalg.vecdot(wide_x, wide_y)).sum()
    weight = (weight * scale)[:, None]
    return (dx + weight * wide_y).to(x.dtype), (dy + weight * wide_x).to(y.dtype), dscale


def _clip_loss_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _clip_loss_derivative(ctx: Any, backward_op: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    return *backward_op(grad_loss, *ctx.saved_tensors, ctx.precision), None


def _clip_loss_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])


def _clip_loss_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_loss, *point = ctx.saved_tensors
    count = grad_loss.shape[0]

    def loss(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        x, y, scale = point
        target = torch.arange(count, device=x.device)[block]
        sides = [similarity(block, a, b, scale, None) for a, b in ((x, y), (y, x))]
        losses = [S.logsumexp(1) - S.gather(1, target[:, None]).squeeze(1) for S in sides]
        return (cotangents[0][block] * (losses[0] + losses[1]) / 2).sum()

    dtype = accumulate_dtype(point[0].dtype)
    gradients = second_derivative(loss, row_blocks(count, count), [grad_loss], point, directions, dtype)
    return *gradients, None, None, None, None, None, None


_clip_loss_backward_op = Op(
    "clip_loss_backward(Tensor grad_loss, Tensor x, Tensor y, Tensor scale, Tensor positive, Tensor row_total,"
    " Tensor row_shift, Tensor column_total, Tensor column_shift, str precision)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_clip_loss_backward_fake,
    portable=partial(_clip_loss_backward, _pair_logsumexp_backward_portable),
    setup_context=_clip_loss_backward_setup_context,
    backward=_clip_loss_double_backward,
    cuda=partial(_clip_loss_backward, torch.ops.fastssl.pair_logsumexp_backward),
)

clip_loss = Op(
    "clip_loss(Tensor x, Tensor y, Tensor scale, str precision) -> (Tensor loss, Tensor positive, Tensor row_total,"
    " Tensor row_shift, Tensor column_total, Tensor column_shift)",
    fake=_clip_loss_fake,
    portable=partial(_clip_loss, _pair_logsumexp_portable),
    setup_context=_clip_loss_setup_context,
    backward=_clip_loss_derivative,
    backward_op=_clip_loss_backward_op,
    cuda=partial(_clip_loss, torch.ops.fastssl.pair_logsumexp),
)


def class_sums(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x the sum of the rows of its label, in the dtype of sums, and their number."""
    labels = labels.contiguous()
    order = labels.sort().values
    first = torch.searchsorted(order, labels)
    count = torch.searchsorted(order, labels, right=True) - first
    x = x.to(accumulate_dtype(x.dtype))
    # As many sums as rows, most of them empty, so that nobody need wait for the number of labels.
    return torch.zeros_like(x).index_add(0, first, x).index_select(0, first), count


def _sup_con_fake(
    z: Tensor, labels: Tensor, scale: Tensor, normalize: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(z.new_empty(z.shape[0], dtype=accumulate_dtype(z.dtype)) for _ in range(3))


def _sup_con(
    logsumexp: Callable[..., Any], z: Tensor, labels: Tensor, scale: Tensor, normalize: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    z, _ = _normalized_rows(z, normalize)
    total, shift = logsumexp(z, scale, precision)
    sums, count = class_sums(z, labels)
    aligned = torch.linalg.vecdot(z, sums - z) / (count - 1)
    return (total.log() + (shift - aligned * scale)).where(count > 1, 0), shift, total


def _sup_con_backward_fake(
    grad_loss: Tensor,
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(())


def _sup_con_backward(
    logsumexp_backward: Callable[..., Any],
    grad_loss: Tensor,
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    rows, norms = _normalized_rows(z, normalize)
    sums, count = class_sums(rows, labels)
    grad_total, share = ((grad_loss / x).where(count > 1, 0) for x in (total, count - 1))
    gradient, dscale = logsumexp_backward(grad_total, rows, scale, shift, precision)
    share = share[:, None]
    positives = share * (sums - 2 * rows) + class_sums(share * rows, labels)[0]
    dscale = dscale - (rows * positives).sum(dtype=torch.float64).mul(0.5).to(scale.dtype)
    return _through_norms(gradient - scale * positives, rows, norms).to(z.dtype), dscale


def _sup_con_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normalize, ctx.precision = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _sup_con_derivative(ctx: Any, backward_op: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    dz, dscale = backward_op(grad_loss, *ctx.saved_tensors, ctx.normalize, ctx.precision)
    return dz, None, dscale, None, None


def _sup_con_backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, _, ctx.normalize, _ = inputs
    ctx.save_for_backward(*tensors)


def _sup_con_double_backward(ctx: Any, _: None, *directions: Tensor) -> tuple:
    grad_loss, z, labels, scale = ctx.saved_tensors
    rows = z.shape[0]

    def loss(block: slice, cotangents: Sequence[Tensor], point: Sequence[Tensor]) -> Tensor:
        z, scale = point
        z = F.normalize(z, dim=1, eps=_EPS) if ctx.normalize else z
        own = torch.arange(rows, device=z.device)
        S = similarity(block, z, z, scale, own)
        positive = (labels[block, None] == labels) & (own[block, None] != own)
        count = positive.sum(1)
        losses = S.logsumexp(1) - S.where(positive, 0).sum(1) / count.clamp_min(1)
        return (cotangents[0][block] * losses.where(count > 0, 0)).sum()

    dtype = accumulate_dtype(z.dtype)
    dgrad, dz, dscale = second_derivative(loss, row_blocks(rows, rows), [grad_loss], (z, scale), directions, dtype)
    return dgrad, dz, None, dscale, None, None, None, None


_sup_con_backward_op = Op(
    "sup_con_backward(Tensor grad_loss, Tensor z, Tensor labels, Tensor scale, Tensor shift, Tensor total,"
    " bool normalize, str precision) -> (Tensor grad_z, Tensor grad_scale)",
    fake=_sup_con_backward_fake,
    portable=partial(_sup_con_backward, _self_logsumexp_backward_portable),
    setup_context=_sup_con_backward_setup_context,
    backward=_sup_con_double_backward,
    cuda=partial(_sup_con_backward, torch.ops.fastssl.self_logsumexp_backward),
)

sup_con = Op(
    "sup_con(Tensor z, Tensor labels, Tensor scale, bool normalize, str precision)"
    " -> (Tensor loss, Tensor shift, Tensor total)",
    fake=_sup_con_fake,
    portable=partial(_sup_con, _self_logsumexp_portable),
    setup_context=_sup_con_setup_context,
    backward=_sup_con_derivative,
    backward_op=_sup_con_backward_op,
    cuda=partial(_sup_con, torch.ops.fastssl.self_logsumexp),
)
