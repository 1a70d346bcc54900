"""The log-sum-exps of similarities with chosen rows on the GPU: S_ik = scale <x_i, y_j>, j = ids[i, k], of (normalised)
rows of Y, and none where that is negative. rows_i = log sum_k exp(S_ik).

Algorithm. Reading rows takes all the time; a matrix product would be one for each row. One kernel takes dot products,
of a row with some of those that it chooses; the next takes their exponentials. The third adds up weighted rows of a
matrix, a list of them for each row of its result: the gradient of x_i is such a sum, of the rows that it chooses, and
the gradient of y_j one of the rows that choose it, which a stable sort lists. What is left is done row by row: factors
that a list shares, and the way back through the norms. There are no atomics: the bits are the same in every run.

Cost. 2 M K D multiplications and additions forward, half as many backward, and as many bytes read, from the
second-level cache where Y fits into it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl._norms import EPS
from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.tiles import finite

BK, BD = 32, 64  # rows and features at a time
BLOCK = 512  # similarities, or features of one row, at a time
WARPS = 4
_EPS = tl.constexpr(EPS)


@triton.jit
def selected_dots(x, y, ids, divisor, scale, out, K, D, x_row, y_row, BK: tl.constexpr, BD: tl.constexpr):
    """out (M, K), contiguous as ids are: similarities, minus infinity where there is no row. divisor (N,) or None."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    j = tl.load(ids + row * K + k, mask=k < K, other=-1)
    block = tl.arange(0, BD)
    total = tl.zeros((BK, BD), tl.float32)
    for start in range(0, D, BD):
        d = start + block
        of_x = tl.load(x + row * x_row + d, mask=d < D, other=0.0).to(tl.float32)
        some = (j >= 0)[:, None] & (d < D)[None, :]
        total += of_x[None, :] * tl.load(y + j[:, None] * y_row + d[None, :], mask=some, other=0.0).to(tl.float32)
    S = tl.sum(total, 1)
    if divisor is not None:
        S /= tl.load(divisor + j, mask=j >= 0, other=1.0)
    tl.store(out + row * K + k, tl.where(j >= 0, S * tl.load(scale), float("-inf")), mask=k < K)


@triton.jit
def exponentials(S, ids, divisor, total, shift, weights, K, BLOCK: tl.constexpr):
    """exp(S - shift) in the place of S, shift the largest S of a row, and its sum, where there is none 0. weights, if
    wanted: the exponentials, divided by `divisor` of the rows that they are of, if there."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + block
        top = tl.maximum(top, tl.load(S + row * K + k, mask=k < K, other=float("-inf")))
    highest = finite(tl.max(top, 0))
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + block
        e = tl.exp(tl.load(S + row * K + k, mask=k < K, other=float("-inf")) - highest)
        acc += e
        tl.store(S + row * K + k, e, mask=k < K)
        if weights is not None:
            if divisor is not None:
                j = tl.load(ids + row * K + k, mask=k < K, other=-1)
                e /= tl.load(divisor + j, mask=j >= 0, other=1.0)
            tl.store(weights + row * K + k, e, mask=k < K)
    of_row = tl.sum(acc, 0)
    tl.store(total + row, of_row)
    tl.store(shift + row, tl.where(of_row == of_row, highest, of_row))


@triton.jit
def weighted_sums(
    z, ids, weights, factor, order, first, out, K, D, z_row,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[i] = sum of weights[n] z[ids[n]] over the K places n of row i, those without a row left out. Or, with
    `order`, over the places from order[first[i]] to before order[first[i + 1]], of factor[n // K] weights[n] z[n // K].
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin, end = i * K, (i + 1) * K
    if order is not None:
        begin, end = tl.load(first + i), tl.load(first + i + 1)
    total = tl.zeros((BD,), tl.float32)
    for start in range(begin, end, BK):
        n = start + tl.arange(0, BK)
        inside = n < end
        if order is not None:
            n = tl.load(order + n, mask=inside, other=0)
            row = n // K
        else:
            row = tl.load(ids + n, mask=inside, other=-1)
            inside = row >= 0
        weight = tl.load(weights + n, mask=inside, other=0.0)
        if order is not None:
            weight *= tl.load(factor + row, mask=inside, other=0.0)
        mask = inside[:, None] & (d < D)[None, :]
        of_rows = tl.load(z + row[:, None] * z_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * of_rows, 0)
    tl.store(out + i * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def scale_rows(x, weighted, gradient, scale, out, factor, share, D, x_row, BLOCK: tl.constexpr):
    """The gradient of x_i, factor_i weighted_i with factor_i = scale gradient_i; and of scale, the share of row i."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(gradient + row)
    of_row = g * tl.load(scale)
    along = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        w = tl.load(weighted + row * D + d, mask=d < D, other=0.0)
        tl.store(out + row * D + d, (of_row * w).to(out.dtype.element_ty), mask=d < D)
        along += tl.load(x + row * x_row + d, mask=d < D, other=0.0).to(tl.float64) * (g * w)
    tl.store(factor + row, of_row)
    tl.store(share + row, tl.sum(along, 0))


@triton.jit
def through_norms(y, gradient, norms, first, out, D, y_row, BLOCK: tl.constexpr):
    """The gradient of y_j from that of y_j / |y_j|; 0, whatever y_j is, where nothing names row j."""
    row = tl.program_id(0).to(tl.int64)
    named = tl.load(first + row + 1) > tl.load(first + row)
    norm = tl.load(norms + row)
    divisor = tl.where(norm < _EPS, _EPS, norm)  # NaN remains
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        z = tl.load(y + row * y_row + d, mask=d < D, other=0.0).to(tl.float32) / divisor
        along += z * tl.load(gradient + row * D + d, mask=d < D, other=0.0)
    total = tl.where(norm > _EPS, tl.sum(along, 0), 0.0)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        z = tl.load(y + row * y_row + d, mask=d < D, other=0.0).to(tl.float32) / divisor
        g = (tl.load(gradient + row * D + d, mask=d < D, other=0.0) - total * z) / divisor
        tl.store(out + row * D + d, tl.where(named, g, 0.0).to(out.dtype.element_ty), mask=d < D)


def selected_logsumexp(
    x: Tensor, y: Tensor, ids: Tensor, scale: Tensor, normalize: bool, weigh: bool
) -> tuple[Tensor, ...]:
    x, y, ids = _dense(x), _dense(y), ids.contiguous()
    (rows, dim), count = x.shape, ids.shape[1]
    torch._assert_async((ids < len(y)).all(), "negative_ids are out of range")
    norms = x.new_empty(0, dtype=torch.float32)
    if normalize:  # through float64, so that rows of 1e-30 or 1e30 have a norm
        norms = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64).float()
    divisor = norms.clamp_min(EPS) if normalize else None
    S = x.new_empty((rows, count), dtype=torch.float32)
    if S.numel():
        selected_dots[(rows, triton.cdiv(count, BK))](
            x, y, ids, divisor, scale.float(), S, count, dim, x.stride(0), y.stride(0), BK=BK, BD=BD, num_warps=WARPS,
            **OPTIONS,
        )  # fmt: skip
    total, shift = (S.new_empty(rows) for _ in range(2))
    weights = torch.empty_like(S) if weigh else None
    if rows:
        exponentials[(rows,)](S, ids, divisor, total, shift, weights, count, BLOCK=BLOCK, num_warps=WARPS, **OPTIONS)
    if weights is None:
        return total, shift, S.new_empty((0, dim)), S.new_empty((0, count)), norms
    weighted = S.new_empty((rows, dim))
    _sum(y, ids, weights, (None, None, None), weighted, count)
    return total, shift, weighted, S, norms


def selected_logsumexp_backward(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    weighted: Tensor,
    exponentials: Tensor,
    norms: Tensor,
    needs_y: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, dim), count, choices = x.shape, len(y), ids.shape[1]
    x, grad_total = _dense(x), grad_total.contiguous()
    grad_x, factor = x.new_empty((rows, dim)), torch.empty_like(grad_total)
    share = grad_total.new_empty(rows, dtype=torch.float64)
    if rows:
        scale_rows[(rows,)](
            x, weighted, grad_total, scale.float(), grad_x, factor, share, dim, x.stride(0), BLOCK=BLOCK,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    grad_scale = share.sum().to(scale.dtype)
    if not needs_y:
        return grad_x, y.new_empty((0, dim)), grad_scale
    named, order = ids.flatten().sort(stable=True)
    first = torch.searchsorted(named, torch.arange(count + 1, device=y.device))  # what names none comes before
    grad_y = y.new_empty((count, dim), dtype=torch.float32 if normalize else y.dtype)
    _sum(x, None, exponentials, (factor, order, first), grad_y, choices)
    if not normalize or not count:
        return grad_x, grad_y.to(y.dtype), grad_scale
    y, of_unit, grad_y = _dense(y), grad_y, y.new_empty((count, dim))
    through_norms[(count,)](y, of_unit, norms, first, grad_y, dim, y.stride(0), BLOCK=BLOCK, num_warps=WARPS, **OPTIONS)
    return grad_x, grad_y, grad_scale


def _dense(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 else z.contiguous()


def _sum(z: Tensor, ids: Tensor | None, weights: Tensor, listed: tuple, out: Tensor, choices: int) -> None:
    """`weighted_sums`; `listed`: its factor, order and first."""
    lists, dim = out.shape
    if out.numel():
        weighted_sums[(lists, triton.cdiv(dim, BD))](
            z, ids, weights, *listed, out, choices, dim, z.stride(0), BK=BK, BD=BD, num_warps=WARPS, **OPTIONS
        )
