"""The log-sum-exps of similarities with chosen rows on the GPU: S_ik = scale <x_i, y_j>, j = ids[i, k], of (normalised)
rows of Y, and none where that is negative. rows_i = log sum_k exp(S_ik).

Algorithm. Reading rows takes all the time; a matrix product would be one for each row. One kernel takes dot products,
of a row with some of those that it chooses; the next takes their exponentials. The third adds up rows of a matrix, from
lists of weighted rows, one list for each row of its result: the gradient of x_i is such a sum, of the rows that it
chooses, and the gradient of y_j one of the rows that choose it, which a stable sort lists. There are no atomics: the
bits are the same in every run.

Cost. 2 M K D multiplications and additions forward, half as many backward, and as many bytes read, from the
second-level cache where Y fits into it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl._norms import EPS, through_norms
from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.tiles import finite

BK, BD = 32, 64  # rows and features at a time
BLOCK = 512  # similarities at a time
WARPS = 4


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
def weighted_sums(z, rows, weights, first, out, count, D, z_row, out_row, BK: tl.constexpr, BD: tl.constexpr):
    """out[i] = sum of weights[n] z[rows[n]] for n from first[i] to below first[i + 1], but those with rows[n] < 0.
    Without `first`, each list has `count` members."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin, end = i * count, (i + 1) * count
    if first is not None:
        begin, end = tl.load(first + i), tl.load(first + i + 1)
    total = tl.zeros((BD,), tl.float32)
    for start in range(begin, end, BK):
        n = start + tl.arange(0, BK)
        row = tl.load(rows + n, mask=n < end, other=-1)
        weight = tl.load(weights + n, mask=n < end, other=0.0)
        some = (row >= 0)[:, None] & (d < D)[None, :]
        of_rows = tl.load(z + row[:, None] * z_row + d[None, :], mask=some, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(row >= 0, weight, 0.0)[:, None] * of_rows, 0)
    tl.store(out + i * out_row + d, total, mask=d < D)


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
    return total, shift, _sums(y, ids, weights, None, rows), S, norms


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
    factor = grad_total * scale
    grad_x = (factor[:, None] * weighted).to(x.dtype)
    grad_scale = (grad_total[:, None] * weighted * x).sum(dtype=torch.float64).to(scale.dtype)
    if not needs_y:
        return grad_x, y.new_empty((0, y.shape[1])), grad_scale
    count = len(y)
    named, order = ids.flatten().sort(stable=True)
    first = torch.searchsorted(named, torch.arange(count + 1, device=y.device))  # what names none comes before
    weights = (factor[:, None] * exponentials).flatten()[order]
    grad_y = _sums(_dense(x), order // max(ids.shape[1], 1), weights, first, count)
    if normalize:
        divisor = norms[:, None].clamp_min(EPS)
        grad_y = through_norms(grad_y, y.float() / divisor, norms[:, None])
        grad_y = grad_y.where((first.diff() > 0)[:, None], 0)  # not NaN, whatever a row is that nothing names
    return grad_x, grad_y.to(y.dtype), grad_scale


def _dense(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 else z.contiguous()


def _sums(z: Tensor, rows: Tensor, weights: Tensor, first: Tensor | None, lists: int) -> Tensor:
    """(lists, D) float32; see `weighted_sums`."""
    out = z.new_empty((lists, z.shape[1]), dtype=torch.float32)
    if out.numel():
        weighted_sums[(len(out), triton.cdiv(z.shape[1], BD))](
            z, rows, weights, first, out, rows.shape[-1], z.shape[1], z.stride(0), out.stride(0), BK=BK, BD=BD,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return out
