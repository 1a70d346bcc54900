"""Drawing a class of each row from the softmax of a linear layer's logits: schema, fake kernel, portable code.

Of rows x (N, D), a weight (V, D), a bias b (V,) or (0,):

    s_i = scale (W x_i + b),    id_i = argmax_k s_ik + g_ik,    g_ik = -log(-log(1 - u_ik))

u_ik are uniform: g is Gumbel's distribution, and class k the largest with the probability softmax(s_i)_k. Which u_ik is
drawn follows from a seed and the position i V + k alone (`_random.py`): every device draws the same ids, but where
rounding decides. Of u, what is close to 0 counts, where g is large: float32 holds it to 24 digits there.

A block of rows at a time: their logits are never stored as a whole. It costs one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype, round_operand
from fastssl.ops._random import numbers_at


def _fake(
    seed: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor, scale: Tensor, precision: str
) -> Tensor:
    return input.new_empty(input.shape[:1], dtype=torch.int64)


def _gumbel(seed: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    u = numbers_at(seed, positions).to(dtype).add_(0.5).mul_(2**-63)
    return u.clamp_(max=1 - torch.finfo(dtype).eps / 2).neg_().log1p_().neg_().log_().neg_()


def _portable(
    seed: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor, scale: Tensor, precision: str
) -> Tensor:
    dtype, classes = accumulate_dtype(input.dtype), len(linear_weight)
    w, bias = round_operand(linear_weight.to(dtype), precision), linear_bias.to(dtype)
    ids = input.new_empty(len(input), dtype=torch.int64)
    row, column = (torch.arange(count, device=seed.device) for count in (len(input), classes))
    for rows in row_blocks(len(input), classes):
        S = round_operand(input[rows].to(dtype), precision) @ w.T
        if len(bias):
            S += bias
        S.mul_(scale.to(dtype)).add_(_gumbel(seed, row[rows, None] * classes + column, dtype))
        largest, found = S.max(1)
        ids[rows] = found.where(largest > float("-inf"), -1)  # NaN, which `max` hands on, is not either
    return ids


linear_categorical = Op(
    "linear_categorical(Tensor seed, Tensor input, Tensor linear_weight, Tensor linear_bias, Tensor scale,"
    " str precision) -> Tensor ids",
    fake=_fake,
    portable=_portable,
    triton="linear_categorical",
)
