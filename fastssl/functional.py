"""One function per loss or operation: the face of the package.

Every function checks its arguments before any kernel runs, follows `torch.set_float32_matmul_precision`
and autocast for the precision of its products, and sums in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl import reference
from fastssl.ops import contrastive, current_backend
from fastssl.ops._precision import accumulate_dtype, autocast_enabled, product_precision

__all__ = ["nt_xent", "similarity_logsumexp"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    r"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (arXiv:2002.05709).

    Row i of z1 and row i of z2 embed two views of one image. Each of the 2B rows of [z1; z2] must pick its
    partner among the 2B - 1 others:

        loss_i = -log( exp(<z_i, z_pos(i)> / temperature) / sum_{j != i} exp(<z_i, z_j> / temperature) )

    The 2B x 2B similarities are never stored: memory is O(B D).

    Args:
        z1: (B, D) embeddings of the first views; float32, bfloat16, float16 or float64.
        z2: (B, D) embeddings of the second views, of z1's dtype and device.
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
            A negative one is taken as it stands.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        reduction: "mean" over the 2B rows, "sum", or "none".

    Returns:
        0-d loss, or with "none" (2B,) losses, those of z1's rows first; in z1's dtype, float32 under autocast.
        The mean over an empty batch is NaN. NaN and Inf in z1 or z2 come out as NaN.

    Raises:
        TypeError: if z1 or z2 is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is zero or not finite
            (as a tensor: NaN comes out), or reduction is unknown.
    """
    _check_pair(z1, z2)
    _check_temperature(temperature)
    _check_reduction(reduction)
    if current_backend() == "reference":
        return reference.contrastive.nt_xent(
            z1, z2, temperature=temperature, normalize=normalize, reduction=reduction
        )
    if isinstance(temperature, Tensor):
        scale = temperature.to(device=z1.device, dtype=accumulate_dtype(z1.dtype)).reciprocal()
    else:
        scale = torch.full((), 1 / temperature, dtype=accumulate_dtype(z1.dtype), device=z1.device)
    loss, _, _ = contrastive.nt_xent(z1, z2, scale, normalize, product_precision(z1))
    loss = reference.contrastive.reduce(loss, reduction)
    return loss if autocast_enabled(z1) else loss.to(z1.dtype)


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
    between the forward and the backward pass, as a queue is; a second derivative needs its values and then raises.

    Args:
        x: (M, D) rows; float32, bfloat16, float16 or float64. They are not normalised here.
        y: (N, D) rows, of x's dtype and device.
        scale: multiplies the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        exclude: (M,) int64, the column to leave out of each row; -1, or any number that is no column, leaves none out.
        offset: (M,) subtracted from each row's result, which is then as accurate as the difference is small.

    Returns:
        (M,) in float32, in float64 for float64. Minus infinity where no column is left, with a gradient of zero.
        NaN where a similarity that is not left out is NaN or plus infinity.

    Raises:
        TypeError: if x, y, exclude or offset is no tensor, or scale neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, or scale is a number that is not finite.
    """
    _check_rows("x", x, "(M, D)")
    _check_rows("y", y, "(N, D)")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have the same number of features, got {tuple(x.shape)} and {tuple(y.shape)}")
    _check_alike("x", x, "y", y)
    _check_scalar("scale", scale)
    if exclude is not None:
        _check_vector("exclude", exclude, x)
        if exclude.dtype != torch.int64:
            raise ValueError(f"exclude must have dtype torch.int64, got {exclude.dtype}")
    if offset is not None:
        _check_vector("offset", offset, x)
    if current_backend() == "reference":
        return reference.contrastive.similarity_logsumexp(x, y, scale=scale, exclude=exclude, offset=offset)
    scale = torch.as_tensor(scale, dtype=accumulate_dtype(x.dtype), device=x.device)
    total, shift, _ = contrastive.similarity_logsumexp(x, y, scale, exclude, product_precision(x))
    log_total = total.where(total != 0, 1).log().where(total != 0, float("-inf"))  # the gradient of log(0) is NaN
    return log_total + (shift if offset is None else shift - offset)


def _check_pair(z1: Tensor, z2: Tensor) -> None:
    _check_rows("z1", z1, "(B, D)")
    _check_rows("z2", z2, "(B, D)")
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    _check_alike("z1", z1, "z2", z2)


def _check_rows(name: str, z: Tensor, shape: str) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(z).__name__}")
    if z.dtype not in _DTYPES:
        raise ValueError(f"{name} must have a floating-point dtype of 16, 32 or 64 bits, got {z.dtype}")
    if z.dim() != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(z.shape)}")
    if z.shape[1] == 0:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(z.shape)}")


def _check_alike(name1: str, z1: Tensor, name2: str, z2: Tensor) -> None:
    if z1.dtype != z2.dtype:
        raise ValueError(f"{name1} and {name2} must have the same dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"{name1} and {name2} must be on the same device, got {z1.device} and {z2.device}")


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(vector).__name__}")
    if vector.shape != x.shape[:1]:
        raise ValueError(f"{name} must have one element for each row of x, ({x.shape[0]},), got {tuple(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"{name} and x must be on the same device, got {vector.device} and {x.device}")


def _check_temperature(temperature: float | Tensor) -> None:
    _check_scalar("temperature", temperature)
    if not isinstance(temperature, Tensor) and temperature == 0:
        raise ValueError(f"temperature must not be zero, got {temperature}")


def _check_scalar(name: str, scalar: float | Tensor) -> None:
    if isinstance(scalar, Tensor):
        if scalar.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(scalar.shape)}")
    elif not isinstance(scalar, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(scalar).__name__}")
    elif not -math.inf < scalar < math.inf:  # torch.compile cannot trace math.isfinite of a number that varies
        raise ValueError(f"{name} must be finite, got {scalar}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
