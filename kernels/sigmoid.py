"""The sigmoid contrastive loss (SigLIP) on the GPU.

With S = scale x y^T + bias for M rows x_i and N rows y_j, the column exclude[i] of row i left out,

    total = sum_ij softplus(S_ij),    W_ij = sigmoid(S_ij)
    dtotal/dx = scale W y,    dtotal/dy = scale W^T x,    dtotal/dscale = <x, W y>,    dtotal/dbias = sum_ij W_ij

Algorithm. There is no normaliser, so the forward pass computes the gradients too: common/accumulate.py with the weights
"sigmoid", which also gives the losses and the sums of weights.

Cost, in units U = 2 M N D floating-point operations: for rows that fit registers (D <= 128) S and W y, 2 U, then S^T
and W^T x, 2 U; for wide ones 3 U, S once for both sides (common/blocks.py). 1 U for the loss alone.

Numerics: softplus(S) = max(S, 0) + log1p(exp(-|S|)), and W comes from the same exp(-|S|): neither overflows, and both
keep their digits where S is far below 0, as most of SigLIP's entries are. So that float16 does not lose weights where
the bias makes all of them small, a row's are held relative to exp(min(max_j S_ij, 0)); those of wide rows relative to a
bound of them all, exp(min(|scale| max_i |x_i| max_j |y_j| + bias, 0)): what is 10^8 times smaller loses digits there,
and what is below e^-88 is 0. The loss is summed in float32 within a row, or a tile, and in float64 over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels.common.accumulate import accumulate, accumulate_both
from fastssl.kernels.common.collect import collect_sums
from fastssl.kernels.common.rows import pad
from fastssl.kernels.common.weights import Weights


def similarity_softplus(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None, derive: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, kept_x, kept_y, kept_scale, kept_bias) of `fastssl::similarity_softplus`; see fastssl/ops/sigmoid.py."""
    (rows, dim), columns = x.shape, y.shape[0]
    if rows == 0 or columns == 0:
        gradients = (x.new_zeros((count if derive else 0, dim), dtype=torch.float32) for count in (rows, columns))
        return x.new_zeros((), dtype=torch.float32), *gradients, scale.new_zeros(()), bias.new_zeros(())
    exclude = exclude if exclude is None else exclude.contiguous()
    by = None if exclude is None else "row"
    sizes = rows, columns
    pairs = Weights(pad(x, precision), pad(y, precision), sizes, scale, precision, "sigmoid", by, bias, exclude)
    if derive:
        sums, of_columns = accumulate_both(pairs, loss=True)
    else:
        sums = accumulate(pairs, derive=False, loss=True)
    total = sums.loss.sum(dtype=torch.float64).to(torch.float32)
    if not derive:
        gradients = (x.new_empty((0, dim), dtype=torch.float32) for _ in range(2))
        return total, *gradients, scale.new_zeros(()), bias.new_zeros(())
    collected_x = collect_sums(sums, x, scale, torch.float32, share=True)
    collected_y = collect_sums(of_columns, y, scale, torch.float32)
    grad_scale = collected_x.share.sum().to(scale.dtype)
    grad_bias = sums.total.sum(dtype=torch.float64).to(bias.dtype)
    return total, collected_x.gradient, collected_y.gradient, grad_scale, grad_bias
