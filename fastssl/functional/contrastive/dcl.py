"""The contrastive loss without the positive in the denominator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import dot, finish, inverse, logsumexp, of_reference, unit
from fastssl._checks import check_flag, check_group, check_pair, check_reduction, check_temperature, check_weights
from fastssl._exponential_sums import joined, pair_sums, self_sums, sums_with_others
from fastssl.distributed import ProcessGroup, Ring
from fastssl.ops import contrastive, current_backend
from fastssl.ops._precision import accumulate_dtype, product_precision


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The decoupled contrastive loss (DCL, arXiv:2110.06848): NT-Xent without the positive in the denominator.

        loss_i = -w_i <z1_i, z2_i> / T + log sum_{j != i} (exp(<z1_i, z1_j> / T) + exp(<z1_i, z2_j> / T))

    and likewise for the rows of z2, T being the temperature. Memory is O(B D).

    Args:
        z1: (B, D) embeddings of the first views; float32, bfloat16, float16 or float64.
        z2: (B, D) embeddings of the second views, of z1's dtype and device.
        temperature: T, a number, or a 0-d tensor, which gets its exact gradient.
        weight_fn: (rows, partners) -> (B,) weights w of the positives, called once for each side, with its (normalised)
            rows and those of the other side; None: 1.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        reduction: "mean" over the 2B rows, "sum", or "none".
        group: as in `nt_xent`. weight_fn gets this process's rows.

    Returns:
        0-d loss, or with "none" (2B,) losses, those of z1's rows first; in z1's dtype, float32 under autocast. The mean
        over an empty batch is NaN. A single pair has no negatives: its loss is minus infinity.

    Raises:
        TypeError: if z1, z2 or what weight_fn returns is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, those of weights included, temperature is a number that is
            zero or not finite (as a tensor: NaN comes out), or reduction is unknown, or on every process, if those of
            group differ in shapes, dtypes or requires_grad.
    """
    z1, z2 = check_pair(z1, z2)
    temperature = check_temperature(temperature, z1)
    normalize = check_flag("normalize", normalize)
    if weight_fn is not None and not callable(weight_fn):
        raise TypeError(f"weight_fn must be a function or None, got {type(weight_fn).__name__}")
    weigh = None if weight_fn is None else lambda rows, partners: check_weights(weight_fn(rows, partners), rows)
    check_reduction(reduction)
    check_group(group)
    if current_backend() == "reference":
        loss = reference.contrastive.dcl(
            z1, z2, temperature=temperature, weight_fn=weigh, normalize=normalize, reduction=reduction
        )
        return of_reference(loss, z1)
    scale, precision = inverse(temperature, z1), product_precision(z1)
    if weigh is None:
        weight = z1.new_ones(2 * z1.shape[0], dtype=accumulate_dtype(z1.dtype))
    else:
        x, y = (unit(z) if normalize else z for z in (z1, z2))
        weight = torch.cat([weigh(x, y), weigh(y, x)]).to(accumulate_dtype(z1.dtype))
    if group is not None:
        ring = Ring(group, z1=z1, z2=z2, temperature=scale)
        x, y = (unit(z) if normalize else z for z in (z1, z2))
        across = pair_sums(x, y, scale, torch.arange(x.shape[0], device=x.device), precision)
        within = [self_sums(z, scale, precision) for z in (x, y)]
        sums = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in (across, within)]
        sums = joined([*sums, sums_with_others(ring, torch.cat([x, y]), scale, precision)])
        return finish(logsumexp(*sums) - weight * (dot(x, y) * scale).repeat(2), reduction, z1)
    keep = contrastive.bytes_to_keep(precision, (z1, z2, scale), 2 * z1.shape[0])
    loss, *_ = contrastive.dcl(z1, z2, weight, scale, normalize, keep, precision)
    return finish(loss, reduction, z1)
