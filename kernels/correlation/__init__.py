"""Barlow Twins and VICReg on the GPU: sums of squares of D x D matrices, and their gradients, without those matrices.

For N rows of D features let A be the centred columns of z (VICReg) or the standardised ones (Barlow Twins), of both
views A and B, and let

    C = A^T B / N        (Barlow Twins; D x D)         redundancy = sum_{i != j} C_ij^2
    C = A^T A / M        (VICReg, M = N - 1 or N)      covariance = sum_{i != j} C_ij^2 / D, of each view

fastssl/ops/correlation.py has the whole losses. With W = C but W_ii = 0 the gradients are

    Barlow Twins:  dA = 2 lambda / N B W^T,  dB = 2 lambda / N A W           VICReg:  dA = 4 nu / (D M) A W

and the derivative of the standardisation, r = 1 / sqrt(var + eps), turns g = dA into

    Barlow Twins:  dz = r (g - mean g - A sum_n(g A) / (N or N - 1))         VICReg:  dz = g - mean g

Algorithm
  1. columns.py sums, over slots of rows, what means, variances and the diagonal of C need; from these barlow_twins.py
     and vicreg.py compute, for each column, those statistics, its part of the loss that needs no product, and the
     factor of the diagonal's part of the gradient. products.py rounds A to the dtype of the products, once, and hands
     it to cuBLAS: nothing of these products can be fused but what is done with each number of the result.
  2. dual.py, where N is well below D, or else primal.py: the sums of squares, and the products of the gradients.
  3. derivatives.py applies the derivative of the standardisation, and adds the parts that need no product.

Cost: products of 2 N N D (dual) or 2 N D D (primal) floating-point operations; dual.py and primal.py say how many.
Everything else is O(N D).

No atomics: every word is written by one program, so these kernels give the same bits every time, and so does cuBLAS
under `torch.use_deterministic_algorithms`.

Memory: for each view N D elements of the products' dtype. dual: 2 N N floats for each view, and N D for each view in
the backward pass. primal: N D floats for each view, PANEL D for a panel of C, and its weights.

Numerics: the diagonals of C (primal) and of the Gram matrices (backward) are left out of rounded weights. Squares are
summed in float32 within a tile and in float64 across tiles. Weights and Gram matrices are scaled so that their largest
possible entry is 2^13, so that float16 holds small ones; for float16 VICReg's columns are scaled, too, by a power of
two near the largest deviation.
"""

from fastssl.kernels.correlation.barlow_twins import barlow_twins, barlow_twins_backward
from fastssl.kernels.correlation.vicreg import (
    variance_covariance,
    variance_covariance_backward,
    vicreg,
    vicreg_backward,
)

__all__ = [
    "barlow_twins",
    "barlow_twins_backward",
    "variance_covariance",
    "variance_covariance_backward",
    "vicreg",
    "vicreg_backward",
]
