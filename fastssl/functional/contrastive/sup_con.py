"""The contrastive loss of rows with labels."""

from __future__ import annotations

from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import finish, inverse
from fastssl._checks import check_flag, check_labels, check_reduction, check_rows, check_temperature
from fastssl.ops import contrastive, current_backend
from fastssl.ops._precision import product_precision


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
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

    Returns:
        The loss in features' dtype, float32 under autocast. The mean over an empty batch is NaN.

    Raises:
        TypeError: if features or labels is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is zero or not finite (as a
            tensor: NaN comes out), or reduction is unknown.
    """
    views = isinstance(features, Tensor) and features.dim() == 3
    check_rows("features", features, "(N, D) or (B, V, D)", 3 if views else 2)
    check_labels(labels, features, "features")
    temperature = check_temperature(temperature, features)
    normalize = check_flag("normalize", normalize)
    check_reduction(reduction)
    if current_backend() == "reference":
        return reference.contrastive.sup_con(
            features, labels, temperature=temperature, normalize=normalize, reduction=reduction
        )
    scale, precision = inverse(temperature, features), product_precision(features)
    rows = features
    if views:
        rows, labels = features.flatten(0, 1), labels.repeat_interleave(features.shape[1])
    keep = contrastive.bytes_to_keep(precision, (rows, scale), rows.shape[0])
    loss, *_ = contrastive.sup_con(rows, labels, scale, normalize, keep, precision)
    return finish(loss.view(features.shape[:-1]), reduction, features)
