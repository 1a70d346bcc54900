"""The contrastive loss of rows with labels."""

from __future__ import annotations

from torch import Tensor

from fastssl import distributed, reference
from fastssl._arithmetic import dot, finish, inverse, logsumexp, unit
from fastssl._checks import check_flag, check_group, check_labels, check_reduction, check_rows, check_temperature
from fastssl._exponential_sums import joined, self_sums, sums_with_others
from fastssl.distributed import ProcessGroup, Ring
from fastssl.ops import contrastive, current_backend
from fastssl.ops._precision import product_precision, widen


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Supervised contrastive learning (SupCon, arXiv:2004.11362): the paper's L_out, with the positives outside the
    log.

        loss_i = log sum_{j != i} exp(S_ij) - mean_{j in P(i)} S_ij,    S = z z^T / temperature,

    P(i) being the other rows of row i's label. A row without any has loss 0, and still counts in the mean. The N x N
    similarities are never stored: memory is O(N D).

    Args:
        features: (N, D) rows, or (B, V, D), V views of each sample; float32, bfloat16, float16 or float64.
        labels: (N,) or (B,) int64, the label of each row or sample.
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        reduction: "mean" over the rows, "sum", or "none": (N,), or (B, V) losses.
        group: as in `nt_xent`; labels are those of all processes' rows, and N (or B V) is even. Every process holds the
            labels of the whole batch, and a sum of rows for each that occurs.

    Returns:
        The loss in features' dtype, float32 under autocast. The mean over an empty batch is NaN.

    Raises:
        TypeError: if features or labels is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is zero or not finite (as a
            tensor: NaN comes out), or reduction is unknown, N is odd and there is a group, or on every process, if
            those of group differ in shapes, dtypes or requires_grad.
    """
    views = isinstance(features, Tensor) and features.dim() == 3
    check_rows("features", features, "(N, D) or (B, V, D)", 3 if views else 2)
    check_labels(labels, features, "features")
    temperature = check_temperature(temperature, features)
    normalize = check_flag("normalize", normalize)
    check_reduction(reduction)
    check_group(group)
    if current_backend() == "reference":
        return reference.contrastive.sup_con(
            features, labels, temperature=temperature, normalize=normalize, reduction=reduction
        )
    scale, precision = inverse(temperature, features), product_precision(features)
    rows = features
    if views:
        rows, labels = features.flatten(0, 1), labels.repeat_interleave(features.shape[1])
    if group is not None:
        ring = Ring(group, features=features, labels=labels, temperature=scale)
        if rows.shape[0] % 2:
            raise ValueError(f"features must have an even number of rows where there is a group, got {rows.shape[0]}")
        z = unit(rows) if normalize else rows
        sums, count = distributed.contrastive.class_sums(z, labels, group)
        loss = logsumexp(*joined([self_sums(z, scale, precision), sums_with_others(ring, z, scale, precision)]))
        loss = (loss - dot(z, sums - widen(z)) * scale / (count - 1).clamp_min(1)).where(count > 1, 0)
        return finish(loss.view(features.shape[:-1]), reduction, features)
    keep = contrastive.bytes_to_keep(precision, (rows, scale), rows.shape[0])
    loss, *_ = contrastive.sup_con(rows, labels, scale, normalize, keep, precision)
    return finish(loss.view(features.shape[:-1]), reduction, features)
