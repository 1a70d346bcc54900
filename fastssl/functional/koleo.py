"""Features keep away from their nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import as_scalar, finish, of_reference, without_autocast
from fastssl._checks import check_eps, check_holds, check_positive, check_rows
from fastssl.ops import current_backend
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype, product_precision

_COLUMNS = 1 << 14  # that a block of products has at least: with fewer, its rows are too many for caches


def koleo_loss(features: Tensor, *, eps: float = 1e-8, topk: int = 1, group_size: int | None = None) -> Tensor:
    r"""KoLeo (arXiv:1806.03198), as in DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104).

        -mean_{i, j} log(|z_i - z_j + eps| + eps),    z_i = x_i / max(|x_i|, eps)

    over all rows i and the `topk` rows j != i of the largest <z_i, z_j>. It falls as features spread out. The gradient
    flows to both ends of each distance; which rows are nearest is a constant. The N x N similarities are never stored:
    memory is O(N D topk) and one block. They are computed in float32 (float64 for float64), whatever
    `torch.set_float32_matmul_precision` and autocast say: a rounded search would find other neighbours.

    Args:
        features: (N, D) rows; float32, bfloat16, float16 or float64.
        eps: added to the distances, and to their coordinates; the least length that a row is divided by. With 0, equal
            rows have an infinite loss, and no gradient.
        topk: neighbours of each row, from 1 to below the number of rows in a group.
        group_size: rows of a group, which divides N: neighbours are only those of the same group of consecutive rows.
            None: all rows are one group.

    Returns:
        0-d, in features' dtype, float32 under autocast. NaN for no rows. Which of equally near rows are taken is
        unspecified; on the CPU it is the first with topk=1.

    Raises:
        TypeError: if features is no tensor, eps no number, or topk or group_size no integer.
        ValueError: if features has another shape or dtype, eps is negative or not finite, group_size is not positive or
            does not divide N, or a group has no more than topk rows.
    """
    check_rows("features", features, "(N, D)")
    eps, topk = check_eps(eps), check_positive("topk", topk)
    check_holds("eps", eps, eps, features)
    rows = features.shape[0]
    size = rows
    if group_size is not None:
        group_size = size = check_positive("group_size", group_size)
        if rows % size:
            raise ValueError(f"group_size must divide the number of rows of features, {rows}, got {size}")
    if topk >= size and rows:
        raise ValueError(f"topk must be below the number of rows among which neighbours are, {size}, got {topk}")
    if current_backend() == "reference":
        loss = reference.koleo.koleo_loss(features, eps=eps, topk=topk, group_size=group_size)
        return of_reference(loss, features)
    x, least = features.to(accumulate_dtype(features.dtype)).contiguous(), as_scalar(eps, features)
    z = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(least)
    # The gradient of `embedding` is summed in the same order in every run, which that of z[nearest] is not.
    neighbours = F.embedding(_nearest(z.detach(), topk, size), z)
    distance = torch.linalg.vector_norm(z[:, None] - neighbours + least, dim=2)
    return finish(-(distance + least).log().mean(), "none", features)


@torch.no_grad()
def _nearest(z: Tensor, k: int, size: int) -> Tensor:
    """(N, k) rows of the same group of `size` with the largest products with each row, itself apart.

    The products are symmetric: those of a block of rows with the rows from its first on serve both.
    """
    left, right = _operands(z)
    values = z.new_full((z.shape[0], k), float("-inf"))  # what a row's product with itself counts as, too
    indices = torch.zeros_like(values, dtype=torch.int64)

    def merge(first: int, products: Tensor, column: int) -> None:
        rows = slice(first, first + products.shape[0])
        found = _largest(products, min(k, products.shape[1]))
        best = _largest(torch.cat([values[rows], found[0]], 1), k)
        values[rows] = best[0]
        indices[rows] = torch.cat([indices[rows], found[1] + column], 1).gather(1, best[1])

    for group in range(0, z.shape[0], max(size, 1)):
        for block in row_blocks(size, max(size, _COLUMNS)):
            first, middle, last = group + block.start, group + block.stop, group + size
            with without_autocast(z):
                products = left[first:middle] @ right[first:last].T
            products.diagonal().fill_(float("-inf"))
            merge(first, products, first)
            if middle < last:
                merge(middle, products[:, middle - first :].T, first)
    return indices


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`, and for one the first of equal ones."""
    return x.max(1, keepdim=True) if k == 1 else x.topk(k, dim=1)


def _operands(z: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y), whose product x y^T is z z^T in float32, whatever precision is set.

    Where that would round z, three parts stand for it that no setting rounds, of 8 bits of the significand each. Their
    products that float32 can hold are summed in one, the small ones first.
    """
    with without_autocast(z):
        if product_precision(z) in ("float32", "float64"):
            return z, z
    high = _leading_bits(z)
    middle = _leading_bits(z - high)
    low = z - high - middle
    return torch.cat([high, low, middle, high, middle, high], 1), torch.cat([low, high, middle, middle, high, high], 1)


def _leading_bits(z: Tensor) -> Tensor:
    """What bfloat16 holds of z. A compiler takes a conversion there and back for nothing."""
    return (z.view(torch.int32) & -0x10000).view(torch.float32)
