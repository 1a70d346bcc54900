"""Log-sum-exps of similarities S = scale x y^T, and the products W y and W^T x of their gradients, on the GPU:

    similarity_logsumexp   of the rows of S                                   forward 2 U (with E y), grad_y 2 U
    pair_logsumexp         of the rows and the columns of S (CLIP)            forward 1 U, backward 4 U
    self_logsumexp         of the rows of scale z z^T, no diagonal (SupCon)   forward 1/2 U, backward 2 U

in units U = 2 M N D floating-point operations (M = N for the last); for wide rows, whose weights are stored in blocks
(common/blocks.py), 3 U and 2 U, 1 U and 3 U, 1/2 U and 1.5 U; there 1 U less in either pass, but for the forward passes
of sums alone, where products are kept (common/kept.py). With E_ij = exp(S_ij - shift_i), where shift_i is the largest
S_ij of row i, and total_i = sum_j E_ij,

    log sum_j exp(S_ij) = shift_i + log(total_i)
    grad_x = scale W y,    grad_y = scale W^T x,    W_ij = grad_total_i E_ij [+ the same of columns]

Algorithm. Sums are those of sums.py, products those of common/accumulate.py, which computes S again. The forward pass
of similarity_logsumexp has such a product too: it leaves E y, so that grad_x needs no S at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels.common.accumulate import accumulate, accumulate_both
from fastssl.kernels.common.collect import collect_sums
from fastssl.kernels.common.kept import kept_products, nothing_kept, room_for_products
from fastssl.kernels.common.rows import pad
from fastssl.kernels.common.weights import Factors, Weights
from fastssl.kernels.contrastive.sums import softmax_sums, totals_and_shifts


def similarity_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, weigh: bool, keep: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastssl::similarity_logsumexp` for CUDA tensors; see fastssl/ops/contrastive/."""
    (rows, dim), columns = x.shape, y.shape[0]
    if rows == 0 or columns == 0:
        total, shift = (x.new_zeros(rows, dtype=torch.float32) for _ in range(2))
        return total, shift, x.new_zeros((rows if weigh else 0, dim), dtype=torch.float32), nothing_kept(x, keep)
    exclude, by = excluding(exclude, "row")
    inputs = pad(x, precision), pad(y, precision), (rows, columns), scale, precision
    kept, products = room_for_products(x, keep, rows, columns, precision)
    if weigh:
        weighted, shift, total, _ = collect_sums(
            softmax_sums(*inputs, by, exclude=exclude, kept=products), x, scale, torch.float32
        )
        return total, shift, weighted, kept
    [(total, shift)] = totals_and_shifts(*inputs, by, exclude=exclude, kept=products)
    return total, shift, x.new_empty((0, dim), dtype=torch.float32), kept


def similarity_logsumexp_backward(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    shift: Tensor,
    weighted: Tensor,
    kept: Tensor,
    needs_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastssl::similarity_logsumexp_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    grad_x = ((grad_total * scale)[:, None] * weighted).to(x.dtype)
    along = (weighted * x).sum(1, dtype=torch.float64)
    grad_scale = (grad_total * along).sum().to(scale.dtype)
    rows, columns = x.shape[0], y.shape[0]
    if not needs_y or rows == 0 or columns == 0:
        return grad_x, y.new_zeros((columns if needs_y else 0, y.shape[1])), grad_scale
    exclude, by = excluding(exclude, "column")
    factors = Factors(shift.contiguous(), grad_total.contiguous())
    products = kept_products(kept, rows, columns, x.shape[1], precision)
    pairs = Weights(
        pad(y, precision), pad(x, precision), (columns, rows), scale, precision, "column", by, exclude=exclude,
        columns=factors,
    )  # fmt: skip
    G = accumulate(pairs, kept=None if products is None else products.T)
    return grad_x, collect_sums(G, y, scale, y.dtype).gradient, grad_scale


def pair_logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, keep: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals, shifts and kept of `fastssl::pair_logsumexp` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows, columns = x.shape[0], y.shape[0]
    if rows == 0 or columns == 0:
        sums = (x.new_zeros(count, dtype=torch.float32) for count in (rows, rows, columns, columns))
        return *sums, nothing_kept(x, keep)
    left, right = pad(x, precision), pad(y, precision)
    kept, products = room_for_products(x, keep, rows, columns, precision)
    if rows <= columns:
        exclude, by = excluding(exclude, "row")
        of_x, of_y = totals_and_shifts(
            left, right, (rows, columns), scale, precision, by, exclude=exclude, columns=True, kept=products
        )
    else:
        exclude, by = excluding(exclude, "column")
        of_y, of_x = totals_and_shifts(
            right,
            left,
            (columns, rows),
            scale,
            precision,
            by,
            exclude=exclude,
            columns=True,
            kept=None if products is None else products.T,
        )
    return *of_x, *of_y, kept


def pair_logsumexp_backward(
    grad_row_total: Tensor,
    grad_column_total: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    exclude: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    kept: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastssl::pair_logsumexp_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows, columns = x.shape[0], y.shape[0]
    if rows == 0 or columns == 0:
        return x.new_zeros(x.shape), y.new_zeros(y.shape), scale.new_zeros(())
    left, right = pad(x, precision), pad(y, precision)
    of_x = Factors(row_shift.contiguous(), grad_row_total.contiguous())
    of_y = Factors(column_shift.contiguous(), grad_column_total.contiguous())
    exclude, by = excluding(exclude, "row")
    pairs = Weights(
        left, right, (rows, columns), scale, precision, "both", by, exclude=exclude,
        rows=of_x, columns=of_y,
    )  # fmt: skip
    sums_x, sums_y = accumulate_both(pairs, kept=kept_products(kept, rows, columns, x.shape[1], precision))
    collected = collect_sums(sums_x, x, scale, x.dtype, share=True)
    return (
        collected.gradient,
        collect_sums(sums_y, y, scale, y.dtype).gradient,
        collected.share.sum().to(scale.dtype),
    )


def self_logsumexp(z: Tensor, scale: Tensor, keep: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(total, shift, kept) of `fastssl::self_logsumexp` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows = z.shape[0]
    if rows == 0:
        return *(z.new_zeros(0, dtype=torch.float32) for _ in range(2)), nothing_kept(z, keep)
    padded = pad(z, precision)
    kept, products = room_for_products(z, keep, rows, rows, precision)
    [sums] = totals_and_shifts(
        padded, padded, (rows, rows), scale, precision, "diagonal", symmetric=True, kept=products
    )
    return *sums, kept


def self_logsumexp_backward(
    grad_total: Tensor, z: Tensor, scale: Tensor, shift: Tensor, kept: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """(grad_z, grad_scale) of `fastssl::self_logsumexp_backward` for CUDA tensors; see fastssl/ops/contrastive/."""
    rows = z.shape[0]
    if rows == 0:
        return z.new_zeros(z.shape), scale.new_zeros(())
    padded = pad(z, precision)
    factors = Factors(shift.contiguous(), grad_total.contiguous())
    pairs = Weights(padded, padded, (rows, rows), scale, precision, "both", "diagonal", rows=factors, columns=factors)
    G = accumulate(pairs, kept=kept_products(kept, rows, rows, z.shape[1], precision))
    collected = collect_sums(G, z, scale, z.dtype, share=True)
    return collected.gradient, collected.share.sum().mul(0.5).to(scale.dtype)


def excluding(exclude: Tensor | None, by: str) -> tuple[Tensor | None, str | None]:
    """`exclude`, contiguous, and the EXCLUDE that goes with it."""
    return (None, None) if exclude is None else (exclude.contiguous(), by)
