"""The output `kept`: what a forward pass leaves for the backward pass, all products <x_i, y_j> or nothing.

Where N rows are few, N x N numbers are O(N D), and the backward pass may read a product instead of computing it again.
It pays where a product is slow. Per product, in picoseconds, at what an H100 reaches (60 TFLOP/s in float32 without
tensor cores, 400 in TF32, 800 in bfloat16; 3 TB/s):

                                                             float32    TF32    bfloat16
    computed again for D = 128                                   4.3     0.6         0.3
    computed again for D = 512                                  17       2.6         1.3
    written as float32, and read by as many passes:  one         2.7     2.7         2.7
                                                     two (CLIP)  4       4           4

(of which two compute the product twice). So float32 products are kept at any D, those of TF32 from D = 512 on. Short
ones are not: even bfloat16 exponentials, half the bytes, would pay only from D = 400 or so on, and within the bound, N
at most 8 D, all passes together take some ten microseconds there, as much as a few launches.

In float32 nothing is lost: both passes see the same bits. `bytes_to_keep` in fastssl/ops/contrastive/ has the bound.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastssl.kernels.common.launch import ROWS, is_wide


def nothing_kept(x: Tensor, keep: int) -> Tensor:
    """The output `kept` of an operation that keeps nothing: zeros, as many bytes as its caller allows."""
    return x.new_zeros(keep, dtype=torch.uint8)


def kept_products(kept: Tensor, rows: int, columns: int, dim: int, precision: str) -> Tensor | None:
    """The products in `kept`, for one pass to write and the other to read: rows x columns, padded to multiples of
    `ROWS`; None if `kept` is too small for them, or the kernels of these products keep none."""
    height, width = (triton.cdiv(count, ROWS) * ROWS for count in (rows, columns))
    size = 4 * height * width
    if kept.numel() < size or not is_wide(dim, precision):
        return None
    return kept[:size].view(torch.float32).view(height, width)


def room_for_products(x: Tensor, keep: int, rows: int, columns: int, precision: str) -> tuple[Tensor, Tensor | None]:
    """The output `kept`, and `kept_products` of it for the forward pass to write."""
    kept = x.new_empty(keep, dtype=torch.uint8)
    products = kept_products(kept, rows, columns, x.shape[1], precision)
    if products is None:
        return nothing_kept(x, keep), None
    kept[4 * products.numel() :].zero_()
    return kept, products
