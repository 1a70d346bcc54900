"""The loss of SimCLR."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import dot, finish, inverse, logsumexp, unit
from fastssl._checks import check_flag, check_group, check_pair, check_reduction, check_temperature
from fastssl._exponential_sums import joined, self_sums, sums_with_others
from fastssl.distributed import ProcessGroup, Ring
from fastssl.ops import contrastive, current_backend
from fastssl.ops._precision import product_precision


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (arXiv:2002.05709).

    Row i of z1 and row i of z2 embed two views of one image. Each of the 2B rows of [z1; z2] must pick its
    partner among the 2B - 1 others:

        loss_i = -log( exp(<z_i, z_pos(i)> / temperature) / sum_{j != i} exp(<z_i, z_j> / temperature) )

    The 2B x 2B similarities are never stored: memory is O(B D).

    Args:
        z1: (B, D) embeddings of the first views; float32, bfloat16, float16 or float64.
        z2: (B, D) embeddings of the second views, of z1's dtype and device.
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient. A negative one
            is used as it is.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        reduction: "mean" over the 2B rows, "sum", or "none".
        group: processes that each hold a part of the batch, see `clip_loss`: a row's others are those of all processes.
            The products of every two processes' rows are computed once, by one of the two.

    Returns:
        0-d loss, or with "none" (2B,) losses, those of z1's rows first; in z1's dtype, float32 under autocast. The mean
        over an empty batch is NaN. A NaN or Inf in z1 or z2 makes the loss NaN.

    Raises:
        TypeError: if z1 or z2 is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is zero or not finite
            (as a tensor: NaN comes out), or reduction is unknown, or on every process, if those of group differ in
            shapes, dtypes or requires_grad.
    """
    z1, z2 = check_pair(z1, z2)
    temperature = check_temperature(temperature, z1)
    normalize = check_flag("normalize", normalize)
    check_reduction(reduction)
    check_group(group)
    if current_backend() == "reference":
        return reference.contrastive.nt_xent(z1, z2, temperature=temperature, normalize=normalize, reduction=reduction)
    scale, precision = inverse(temperature, z1), product_precision(z1)
    if group is not None:
        ring = Ring(group, z1=z1, z2=z2, temperature=scale)
        x, y = (unit(z) if normalize else z for z in (z1, z2))
        z = torch.cat([x, y])
        sums = joined([self_sums(z, scale, precision), sums_with_others(ring, z, scale, precision)])
        return finish(logsumexp(*sums) - (dot(x, y) * scale).repeat(2), reduction, z1)
    keep = contrastive.bytes_to_keep(precision, (z1, z2, scale), 2 * z1.shape[0])
    loss, *_ = contrastive.nt_xent(z1, z2, scale, normalize, keep, precision)
    return finish(loss, reduction, z1)
