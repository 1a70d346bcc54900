"""How unevenly directions are spread."""

from __future__ import annotations

from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import as_scalar, finish, of_reference, unit
from fastssl._checks import check_holds, check_rows, check_scalar
from fastssl._exponential_sums import self_sums
from fastssl.ops import current_backend
from fastssl.ops._precision import product_precision


def uniformity(x: Tensor, *, t: float | Tensor = 2.0) -> Tensor:
    r"""How unevenly directions are spread over the sphere (arXiv:2005.10242): the logarithm of the mean potential.

        log mean_{i != j} exp(-t |z_i - z_j|^2),    |z_i - z_j|^2 = 2 - 2 <z_i, z_j>,    z_i = x_i / |x_i|

    It is 0 where all rows point in the same direction, and falls as they spread out. The N x N distances are never
    stored: memory is O(N D).

    Args:
        x: (N, D) rows, each divided by its Euclidean norm, as `torch.nn.functional.normalize` does; float32, bfloat16,
            float16 or float64. A row of zeros counts as orthogonal to all.
        t: multiplies the squared distances: a number, or a 0-d tensor, which gets its exact gradient.

    Returns:
        0-d, in x's dtype, float32 under autocast. NaN for fewer than two rows.

    Raises:
        TypeError: if x is no tensor, or t neither number nor tensor.
        ValueError: if x has another shape or dtype, or t is a number that is not finite.
    """
    check_rows("x", x, "(N, D)")
    t = check_scalar("t", t, x)
    if not isinstance(t, Tensor):
        check_holds("2 t", 2 * t, t, x)
    if current_backend() == "reference":
        return of_reference(reference.uniformity.uniformity(x, t=t), x)
    scale = 2 * as_scalar(t, x)
    total, shift = self_sums(unit(x), scale, product_precision(x))
    potential = (total / (x.shape[0] - 1)).log() + (shift - scale)  # the logarithm of each row's mean
    peak = potential.detach().logsumexp(0)
    return finish((potential - peak).exp().mean().log() + peak, "none", x)
