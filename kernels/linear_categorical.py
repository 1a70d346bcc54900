"""Drawing a class of each row from the softmax of a linear layer's logits on the GPU.

With L = X W^T for rows X (N, D) and a matrix W (V, D), and a bias b,

    s = scale (L + b),    id = argmax_k s_k + g_k,    g_k = -log(-log(1 - u_k))

u_k of row i is uniform and follows from a seed and the position i V + k, as everywhere
(fastssl/ops/linear_categorical.py).

Algorithm. A block of rows at a time: PyTorch's product gives float32 logits; one program takes one row, and keeps, for
each of the lanes that walk along it, the best class so far.

Cost. With U = 2 N V D floating-point operations, U. Of memory, each logit is written once and read once. There are no
atomics: of two that are equal, the first is drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common import logits
from fastssl.kernels.common.launch import DTYPES, OPTIONS

BLOCK = 1024  # logits at a time
WARPS = 8


@triton.jit
def _uniform(seed, position):
    """Above 0, at most 1: SplitMix64's number at a position (fastssl/ops/_random.py)."""
    x = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 1).to(tl.int64).to(tl.float32) + 0.5) * 1.0842021724855044e-19  # 2^-63


@triton.jit
def _gumbel(u):
    rest = 1.0 - tl.minimum(u, 0.99999994)
    exponential = tl.where(rest == 1.0, u, tl.log(rest) * (u / tl.where(rest == 1.0, -1.0, rest - 1.0)))
    return -tl.log(exponential)


@triton.jit
def draw(logits, bias, scale, seed, ids, first, V, logits_row, BLOCK: tl.constexpr):
    """The class of one row, -1 if a logit is NaN or none is above minus infinity. first: the number of row 0."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    block = tl.arange(0, BLOCK)
    rate, start = tl.load(scale), tl.load(seed)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    found = tl.zeros((BLOCK,), tl.int32) + V
    wrong = tl.zeros((BLOCK,), tl.int32)
    for column in range(0, V, BLOCK):
        columns = column + block
        s = tl.load(logits + columns, mask=columns < V, other=float("-inf"))
        if bias is not None:
            s += tl.load(bias + columns, mask=columns < V, other=0.0)
        s = tl.where(columns < V, s * rate + _gumbel(_uniform(start, (first + row) * V + columns)), float("-inf"))
        wrong |= (s != s).to(tl.int32)
        better = s > best
        best = tl.where(better, s, best)
        found = tl.where(better, columns, found)
    top = tl.max(best, 0)
    id = tl.min(tl.where(best == top, found, V), 0)
    none = (tl.max(wrong, 0) > 0) | (top == float("-inf"))
    tl.store(ids + row, tl.where(none, -1, id).to(tl.int64))


def linear_categorical(
    seed: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor, scale: Tensor, precision: str
) -> Tensor:
    classes = len(linear_weight)
    x, w = (z.to(DTYPES[precision]) for z in (input, linear_weight))
    bias = linear_bias.float().contiguous() if len(linear_bias) else None
    scale, ids = scale.float(), input.new_empty(len(input), dtype=torch.int64)
    for rows in logits.row_blocks(len(input), 4 * classes):
        L = logits.product(x[rows], w.mT)
        draw[(len(L),)](
            L, bias, scale, seed, ids[rows], rows.start, classes, L.stride(0),
            BLOCK=min(triton.next_power_of_2(classes), BLOCK), num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return ids
