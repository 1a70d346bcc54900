"""Losses of logits that are features times a wide matrix, on the GPU, without the logits as a whole.

    S = X W^T,    G = dloss/dS,    dX = G W,    dW = G^T X

for features X (V, N, D) of V views, and a matrix W (K, D) of prototypes or of a vocabulary's words.

Algorithm. Rows are taken in blocks, the same rows of all views together. PyTorch's product (cuBLAS) writes a block's
logits into a workspace; a kernel of the family takes the losses of its rows, and puts G in the logits' place; two more
products multiply it. Rows of the workspace are padded, so that they are aligned for tensor cores whatever K is.

Cost. With U = 2 V N K D floating-point operations, 3 U with gradients, U without. Of memory, `WORKSPACE` bytes, as many
rows as they hold; dW in float32, to which each block adds, which reads and writes 8 K D bytes; and operands that have
not the dtype of the products once more in it.

Numerics. Operands, logits and G have the dtype of the products, sums and dW are float32. G may be too small for
float16: it is multiplied by a power of two, the `gain`, for which it is at most `PEAK`, and the gradients are divided
by it. Without tensor cores' help (float32), and in TF32, cuBLAS follows `torch.set_float32_matmul_precision` itself.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastssl.kernels.common import blocks
from fastssl.kernels.common.launch import DTYPES, PEAK

WORKSPACE = 1 << 28  # bytes for logits
ALIGNED = 64  # rows of the workspace are padded to a multiple of this


def row_blocks(rows: int, row_bytes: int) -> list[slice]:
    """Blocks of about as many rows each, whose logits fit the workspace."""
    most = max(WORKSPACE // row_bytes, 1)
    size = triton.cdiv(rows, triton.cdiv(rows, most)) if rows else 1
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def product(left: Tensor, right: Tensor) -> Tensor:
    """In float32, in which cuBLAS adds up the products of any dtype."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=torch.float32)


def gain_for(largest: Tensor) -> Tensor:
    """The power of two that makes `largest` (0-d) about `PEAK`, and not more."""
    exponent = torch.frexp(largest.nan_to_num(1.0)).exponent.clamp(min=-100)
    return torch.ldexp(PEAK.value * torch.ones_like(largest), -exponent)


class Logits:
    """Those of features (V, N, D) and a matrix (K, D), some rows at a time."""

    def __init__(self, features: Tensor, matrix: Tensor, precision: str) -> None:
        self.features, self.matrix = (x.to(DTYPES[precision]) for x in (features, matrix))
        self._padded = triton.cdiv(len(matrix), ALIGNED) * ALIGNED
        self._workspace = self.features.new_empty(0)

    @property
    def row_bytes(self) -> int:
        """Of the logits of one row of all views."""
        return len(self.features) * self._padded * self.features.element_size()

    def rows(self, rows: slice) -> Tensor:
        """The features of some rows of all views, as a matrix."""
        return self.features[:, rows].flatten(0, 1)

    def __call__(self, rows: slice) -> Tensor:
        """Logits (V, n, K) of some rows, whose place is that of the last ones. The first block must be the largest."""
        x = self.rows(rows)
        if not self._workspace.numel():
            self._workspace = x.new_empty(len(x), self._padded)
        out = self._workspace[: len(x), : len(self.matrix)]
        torch.mm(x, self.matrix.mT, out=out)
        return out.unflatten(0, (len(self.features), -1))


class Gradients:
    """dX and dW, times `scale` (0-d), of features (V, N, D) and a matrix (K, D), in their dtypes; None for one of which
    no gradient is wanted."""

    def __init__(
        self,
        logits: Logits,
        features: Tensor,
        matrix: Tensor,
        scale: Tensor,
        of_features: bool = True,
        of_matrix: bool = True,
    ) -> None:
        self._logits, self._scale, self._dtype = logits, scale, matrix.dtype
        self._of_features = self._of_matrix = None
        if of_features:
            self._of_features = torch.empty_like(features, memory_format=torch.contiguous_format)
        if of_matrix:
            self._of_matrix = torch.empty_like(matrix, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._first = True

    def add(self, rows: slice, weights: Tensor) -> None:
        """What G (V, n, K) of some rows adds."""
        weights = weights.flatten(0, 1)
        if self._of_features is not None:
            of_rows = product(weights, self._logits.matrix) * self._scale
            self._of_features[:, rows] = of_rows.unflatten(0, (len(self._of_features), -1))
        if self._of_matrix is not None:
            blocks.add_product(self._of_matrix, weights.mT, self._logits.rows(rows), self._first)
        self._first = False

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        of_matrix = self._of_matrix
        if of_matrix is not None and self._first:
            of_matrix.zero_()
        return self._of_features, None if of_matrix is None else of_matrix.mul_(self._scale).to(self._dtype)
