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

__all__ = ["nt_xent"]


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


def _check_pair(z1: Tensor, z2: Tensor) -> None:
    for name, z in (("z1", z1), ("z2", z2)):
        if not isinstance(z, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(z).__name__}")
        if not z.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {z.dtype}")
        if z.dim() != 2:
            raise ValueError(f"{name} must have shape (B, D), got {tuple(z.shape)}")
        if z.shape[1] == 0:
            raise ValueError(f"{name} must have at least one feature, got shape {tuple(z.shape)}")
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if z1.dtype != z2.dtype:
        raise ValueError(f"z1 and z2 must have the same dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z1 and z2 must be on the same device, got {z1.device} and {z2.device}")


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0:
            raise ValueError(f"temperature must be a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
    elif not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a 0-d tensor, got {type(temperature).__name__}")
    elif temperature == 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be finite and not zero, got {temperature}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
