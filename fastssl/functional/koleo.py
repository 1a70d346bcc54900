"""Features keep away from their nearest neighbours."""

from __future__ import annotations

from torch import Tensor

from fastssl import distributed, reference
from fastssl._arithmetic import finish, of_reference
from fastssl._checks import check_eps, check_group, check_holds, check_positive, check_rows
from fastssl.distributed import ProcessGroup
from fastssl.ops import current_backend, koleo


def koleo_loss(
    features: Tensor,
    *,
    eps: float = 1e-8,
    topk: int = 1,
    group_size: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""KoLeo (arXiv:1806.03198), as in DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104).

        -mean_{i, j} log(|z_i - z_j + eps| + eps),    z_i = x_i / max(|x_i|, eps)

    over all rows i and the `topk` rows j != i of the largest `<z_i, z_j>`. It falls as features spread out. The
    gradient flows to both ends of each distance; which rows are nearest is a constant. The N x N similarities are never
    stored: memory is O(N D). They are compared in float32 (float64 for float64), whatever
    `torch.set_float32_matmul_precision` and autocast say: a rounded search would find other neighbours.

    Args:
        features: (N, D) rows; float32, bfloat16, float16 or float64.
        eps: added to the distances, and to their coordinates; the least length that a row is divided by. With 0, equal
            rows have an infinite loss, and no gradient.
        topk: neighbours of each row, from 1 to below the number of rows in a group.
        group_size: rows of a group, which divides N: neighbours are only those of the same group of consecutive rows.
            None: all rows are one group.
        group: processes that each hold some rows of one batch, as many as they like; N are those of all, in the order
            of their ranks, and each process holds them while this runs. The loss is that of this process's rows, the
            gradient that of the sum of all processes' losses.

    Returns:
        0-d, in features' dtype, float32 under autocast. NaN for no rows. Which of equally near rows are taken is
        unspecified; with topk=1 it is the first.

    Raises:
        TypeError: if features is no tensor, eps no number, or topk or group_size no integer.
        ValueError: if features has another shape or dtype, eps is negative or not finite, group_size is not positive or
            does not divide N, or a group has no more than topk rows; or on every process, if those of group differ in
            D, dtype, device or requires_grad.
    """
    check_rows("features", features, "(N, D)")
    eps, topk = check_eps(eps), check_positive("topk", topk)
    check_holds("eps", eps, eps, features)
    if group_size is not None:
        group_size = check_positive("group_size", group_size)
    check_group(group)
    x, first = features, 0
    if group is not None:
        x, first = distributed.koleo.gather_unlike_rows("features", features, group)
    count = x.shape[0]
    size = group_size or max(count, 1)
    if count % size:
        raise ValueError(f"group_size must divide the number of rows of features, {count}, got {size}")
    if topk >= size and count:
        raise ValueError(f"topk must be below the number of rows among which neighbours are, {size}, got {topk}")
    if current_backend() == "reference":
        loss = reference.koleo.koleo_loss(features, eps=eps, topk=topk, group_size=group_size)
        return of_reference(loss, features)
    loss, _ = koleo.koleo_loss(x, first, features.shape[0], topk, size, eps)
    return finish(loss, "none", features)
