"""KoLeo (arXiv:1806.03198; DINOv2, arXiv:2304.07193; DINOv3, arXiv:2508.10104): the distances of some rows to their
nearest ones.

With z_i = x_i / max(|x_i|, eps), the `rows` rows i from `first` on, and of each the `topk` nearest rows j != i of its
group of `group_size` consecutive rows, those of the largest <z_i, z_j>,

    loss = -mean_ij log(d_ij + eps),    d_ij = |u_ij|,    u_ij = z_i - z_j + eps
    dloss/du_ij = -1 / (rows topk (d_ij + eps)) u_ij / d_ij

Which rows are nearest is a constant. Finding them takes products of all rows with all, a tile or a block at a time; the
rest is O(N topk D). The products decide in float32, whatever precision is set: a rounded search would find others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastssl.ops._op import Op, triton_launcher
from fastssl.ops._portable import add_rows_, row_blocks
from fastssl.ops._precision import accumulate_dtype, product_precision
from fastssl.ops.row_sums import sum_rows


def _fake(features: Tensor, first: int, rows: int, topk: int, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    loss = features.new_empty((), dtype=accumulate_dtype(features.dtype))
    return loss, features.new_empty((rows, topk), dtype=torch.int64)


def _unit(features: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z, and the norms of features, in the dtype of sums."""
    x = features.to(accumulate_dtype(features.dtype))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(eps), norm


def _blocks(features: Tensor, nearest: Tensor) -> list[slice]:
    """Rows of `nearest`, so that their differences are of bounded size."""
    return row_blocks(nearest.shape[0], nearest.shape[1] * features.shape[1])


def _forward(
    find: Callable[..., Tensor], features: Tensor, first: int, rows: int, topk: int, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    z, _ = _unit(features, eps)
    nearest = find(z, first, rows, topk, group_size)
    total = z.new_zeros((), dtype=torch.float64)
    for block in _blocks(z, nearest):
        total -= (_distances(z, nearest, first, block, eps)[1] + eps).log().sum(dtype=torch.float64)
    return (total / nearest.numel()).to(z.dtype), nearest


def _distances(z: Tensor, nearest: Tensor, first: int, rows: slice, eps: float) -> tuple[Tensor, Tensor]:
    """u (rows, topk, D) and d (rows, topk, 1)."""
    own = z[first + rows.start : first + rows.stop]
    u = own[:, None] - z[nearest[rows]] + eps
    return u, torch.linalg.vector_norm(u, dim=2, keepdim=True)


def _backward(
    add_rows_: Callable[..., Tensor], grad_loss: Tensor, features: Tensor, nearest: Tensor, first: int, eps: float
) -> Tensor:
    z, norm = _unit(features, eps)
    grad = torch.zeros_like(z)
    for rows in _blocks(z, nearest):
        u, d = _distances(z, nearest, first, rows, eps)
        u *= (-grad_loss / nearest.numel() / (d + eps)).where(d != 0, 0)  # a norm's gradient at 0 is 0
        u /= d.where(d != 0, 1)
        grad[first + rows.start : first + rows.stop] += u.sum(1)
        add_rows_(grad, nearest[rows].flatten(), u.flatten(0, 1).neg_())
    along = (grad * z).sum(1, keepdim=True).where(norm >= eps, 0)
    return ((grad - along * z) / norm.clamp_min(eps)).to(features.dtype)


def _share(rows: slice, grad_loss: Tensor, features: Tensor, nearest: Tensor, first: int, eps: float) -> Tensor:
    d = _distances(_unit(features, eps)[0], nearest, first, rows, eps)[1]
    return -grad_loss / nearest.numel() * (d + eps).log().sum()


def _find(z: Tensor, first: int, rows: int, topk: int, group_size: int) -> Tensor:
    left, right = _operands(z)
    nearest = z.new_empty((rows, topk), dtype=torch.int64)
    for group in range(first // group_size * group_size, first + rows, group_size) if rows else ():
        start, stop = max(first, group), min(first + rows, group + group_size)
        for block in row_blocks(stop - start, group_size):
            block = slice(start + block.start, start + block.stop)
            products = left[block] @ right[group : group + group_size].T
            products.diagonal(block.start - group).fill_(float("-inf"))
            found = products.argmax(1, keepdim=True) if topk == 1 else products.topk(topk, dim=1).indices
            nearest[block.start - first : block.stop - first] = found + group
    return nearest


_find_by_kernel = triton_launcher("koleo", "nearest_rows")


def _find_on_gpu(z: Tensor, *options: int) -> Tensor:
    return (_find if _find_by_kernel is None or z.dtype == torch.float64 else _find_by_kernel)(z, *options)


def _add_on_gpu_(sums: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    return sums.add_(sum_rows.auto(rows, ids, sums.shape[0]))


def _operands(z: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y), whose product x y^T is z z^T in float32, whatever precision is set.

    Where that would round z, three parts stand for it that no setting rounds, of 8 bits of the significand each. Their
    products that float32 can hold are summed in one, the small ones first.
    """
    if product_precision(z) in ("float32", "float64"):
        return z, z
    high = _leading_bits(z)
    middle = _leading_bits(z - high)
    low = z - high - middle
    return torch.cat([high, low, middle, high, middle, high], 1), torch.cat([low, high, middle, middle, high, high], 1)


def _leading_bits(z: Tensor) -> Tensor:
    """z truncated to what bfloat16 holds."""
    return (z.view(torch.int32) & -0x10000).view(torch.float32)


koleo_loss = Op(
    "koleo_loss(Tensor features, SymInt first, SymInt rows, SymInt topk, SymInt group_size, float eps)"
    " -> (Tensor loss, Tensor nearest)",
    backward="(Tensor grad_loss, Tensor features, Tensor nearest, SymInt first, float eps) -> Tensor grad_features",
    fake=_fake,
    portable=(partial(_forward, _find), partial(_backward, add_rows_)),
    share=_share,
    blocks=_blocks,
    cuda=(partial(_forward, _find_on_gpu), partial(_backward, _add_on_gpu_)),
)
