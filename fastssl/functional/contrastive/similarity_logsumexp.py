"""The log-sum-exp that softmax contrastive losses are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import as_scalar, kept, logsumexp
from fastssl._checks import DTYPES, check_alike, check_features, check_rows, check_scalar, check_vector
from fastssl._exponential_sums import row_sums
from fastssl.ops import current_backend
from fastssl.ops._precision import accumulate_dtype, product_precision


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    r"""Log-sum-exp of the similarities of each row of x with all rows of y, as softmax contrastive losses need it.

        lse_i = log sum_{j != exclude[i]} exp(scale <x_i, y_j>) - offset_i

    Against a queue of negatives (MoCo, arXiv:1911.05722), with `pos` the scaled similarities of the positive pairs,
    InfoNCE is `softplus(similarity_logsumexp(x, queue, scale=s, offset=pos))`; against a batch that holds the
    positives, it is `similarity_logsumexp(x, y, scale=s, offset=pos)`.

    The M x N similarities are never stored: memory is O((M + N) D). A y that needs no gradient may be overwritten
    between the forward and the backward pass, as a queue is; a second derivative, which needs the old values, then
    raises.

    Args:
        x: (M, D) rows; float32, bfloat16, float16 or float64. They are not normalised here.
        y: (N, D) rows, of x's dtype and device.
        scale: multiplies the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        exclude: (M,) int64, the column to leave out of each row; -1, or any other number that is not a column, leaves
            none out.
        offset: (M,), floating-point, subtracted from each row's result. No accuracy is lost where the difference is
            small.

    Returns:
        (M,) in float32, or in float64 for float64. Minus infinity where no column is left, with a gradient of zero. NaN
        where a similarity that is not left out is NaN or plus infinity.

    Raises:
        TypeError: if x, y, exclude or offset is no tensor, or scale neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, or scale is a number that is not finite.
    """
    check_rows("x", x, "(M, D)")
    check_rows("y", y, "(N, D)")
    check_features("x", x, "y", y)
    x, y = check_alike("x", x, "y", y)
    scale = check_scalar("scale", scale, x)
    if exclude is not None:
        check_vector("exclude", exclude, x, (torch.int64,))
    if offset is not None:
        check_vector("offset", offset, x, DTYPES)
        offset = offset.to(accumulate_dtype(x.dtype))
    if current_backend() == "reference":
        return reference.contrastive.similarity_logsumexp(x, kept(y), scale=scale, exclude=exclude, offset=offset)
    lse = logsumexp(*row_sums(x, y, as_scalar(scale, x), exclude, product_precision(x)))
    return lse if offset is None else lse - offset
