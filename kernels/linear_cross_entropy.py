"""The cross-entropy of a linear layer's logits on the GPU.

With L = X W^T for rows X (N, D) and a matrix W (V, D), a bias b, a label y, class weights w and smoothing u, a vector,

    s = scale L + b,    lse = log sum_k exp(s_k)
    loss = p (lse - s_y) + sum_k u_k (lse - s_k),    p = (1 - smoothing) w_y
    G_k = dloss/ds_k = (p + sum u) exp(s_k - lse) - u_k - [k = y] p
    dX = scale G W,    dW = scale G^T X,    db = sum of G's rows,    dscale = <X, dX> / scale

Algorithm. A block of rows at a time, as common/logits.py says: a product gives the logits, the kernel here the losses
and, in the place of the logits, G, which is multiplied twice more. One program takes one row, and walks along its V
logits twice: it sums exponentials relative to the largest logit so far, then writes G. The label's element comes from
the loss, in which 1 - exp(s_y - lse) has not been rounded. Rows without a label take part as zeros, because nothing
waits for the GPU to say which they are.

Cost. With U = 2 N V D floating-point operations, 3 U with gradients, 2 U with one of dX and dW, U without. Of memory,
each logit is written once and read once (twice where rows in flight do not fit the second-level cache), and G is
written once and read twice. There are no atomics: the bits are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl._norms import normalized_rows, through_norms
from fastssl.kernels.common.launch import OPTIONS
from fastssl.kernels.common.logits import Gradients, Logits, gain_for, row_blocks
from fastssl.kernels.common.tiles import finite

BLOCK = 1024  # logits at a time
WARPS = 8


@triton.jit
def _logits(logits, bias, columns, V, scale):
    s = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32) * scale
    if bias is not None:
        s += tl.load(bias + columns, mask=columns < V, other=0.0)
    return s


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0."""
    return tl.where(x > -0.1, x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))), tl.exp(x) - 1)


@triton.jit
def cross_entropy(
    logits, bias, uniform, label, label_weight, factor, scales, loss, gradient, V, logits_row, gradient_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row, and its G times factor[row]; `loss` or `gradient` may be None.

    label (N,), negative where there is none; None: the loss is the log-sum-exp. scales: of the logits, and the sum of
    uniform (V,), which may be None as bias may.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    block = tl.arange(0, BLOCK)
    scale, spread = tl.load(scales), tl.load(scales + 1)
    y = row * 0
    known = True
    p = 1.0
    s_y = 0.0
    u_y = 0.0
    if label is not None:  # before the walks, the second of which writes here
        y = tl.load(label + row)
        known = y >= 0
        y = tl.maximum(y, 0)
        p = tl.load(label_weight + row)
        s_y = tl.load(logits + y).to(tl.float32) * scale
        if bias is not None:
            s_y += tl.load(bias + y)
        if uniform is not None:
            u_y = tl.load(uniform + y)
    top = float("-inf")
    total = 0.0
    far, weight = 0.0, 0.0  # sum_k u_k (top - s_k), and of u, so far
    for start in range(0, V, BLOCK):
        columns = start + block
        s = _logits(logits, bias, columns, V, scale)
        highest = tl.maximum(top, tl.max(s, 0))
        new = finite(highest)
        old = tl.where(top == float("-inf"), new, top)
        total = total * tl.exp(old - new) + tl.sum(tl.exp(s - new), 0)
        if uniform is not None:
            u = tl.load(uniform + columns, mask=columns < V, other=0.0)
            far += weight * (new - old) + tl.sum(tl.where(columns < V, u * (new - s), 0.0), 0)
            weight += tl.sum(u, 0)
        top = highest
    log_total = tl.log(total)
    peak = finite(top)
    nll = log_total + (peak - s_y)
    if loss is not None:
        if label is None:
            tl.store(loss + row, log_total + top)
        else:
            tl.store(loss + row, tl.where(known, p * nll + (spread * log_total + far), 0.0))
    if gradient is not None:
        gradient += row * gradient_row
        g = tl.where(known, tl.load(factor + row), 0.0)
        of_label = g * (p * _expm1(-nll) + spread * tl.exp(-nll) - u_y)
        rate = g * (p + spread) / total
        for start in range(0, V, BLOCK):
            columns = start + block
            G = tl.exp(_logits(logits, bias, columns, V, scale) - peak) * rate
            if uniform is not None:
                G -= g * tl.load(uniform + columns, mask=columns < V, other=0.0)
            if label is not None:
                G = tl.where(columns == y, of_label, G)
            tl.store(gradient + columns, G.to(gradient.dtype.element_ty), mask=columns < V)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor | None,
    scale: Tensor,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    normalize: bool,
    derive: bool,
    derive_input: bool,
    derive_weight: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    tensors = input, linear_weight, linear_bias, target, scale, class_weight
    loss = input.new_empty(len(input), dtype=torch.float32)
    numbers = label_smoothing, ignore_index, normalize, precision
    wanted = derive_input, derive_weight, derive_input
    gradients = _visit(*tensors, row_weight if derive else None, None, loss, *numbers, wanted)
    return loss if row_weight is None else (loss * row_weight).sum(), *gradients


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor | None,
    scale: Tensor,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    normalize: bool,
    wants_input: bool,
    wants_linear_weight: bool,
    wants_scale: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    factors = (grad_loss, None) if row_weight is None else (row_weight, grad_loss)  # the forward pass's bits
    tensors = input, linear_weight, linear_bias, target, scale, class_weight
    wanted = wants_input, wants_linear_weight, wants_scale
    return _visit(*tensors, *factors, None, label_smoothing, ignore_index, normalize, precision, wanted)


def _visit(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor | None,
    scale: Tensor,
    class_weight: Tensor | None,
    factor: Tensor | None,
    upstream: Tensor | None,
    loss: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    normalize: bool,
    precision: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Writes each row's loss, if that is wanted; and returns the gradients of input, matrix, bias and scale, of no rows
    where they are not wanted: with a `factor`, those of the rows' losses times it, summed, times `upstream`."""
    wants_input, wants_matrix, wants_scale = wanted
    classes = len(linear_weight)
    scale = scale.float()
    weights = scale.new_ones(classes) if class_weight is None else class_weight.float()
    label = label_weight = uniform = known = None
    spread = torch.zeros_like(scale)
    if target is not None:
        known = target != ignore_index
        torch._assert_async((~known | ((target >= 0) & (target < classes))).all(), "target is out of range")
        label = target.where(known, -1)
        label_weight = weights[label.clamp(min=0)] * (1 - label_smoothing)
        if label_smoothing:
            uniform = weights * (label_smoothing / classes)
            spread = uniform.sum().reshape(1)
    x, norms = normalized_rows(input, True) if normalize else (input, None)
    w, w_norms = normalized_rows(linear_weight, True) if normalize else (linear_weight, None)
    if known is not None:
        x = x.where(known[:, None], 0)
    logits = Logits(x[None], w, precision)
    bias = linear_bias.float().contiguous() if len(linear_bias) else None
    gradients = bias_sums = None
    if factor is not None:
        # No element of G is larger than the factor times what the row's target sums up to.
        share = scale.new_ones(1) if label_weight is None else torch.cat([label_weight.abs() + spread, spread])
        gain = gain_for(torch.cat([factor.float(), scale.new_zeros(1)]).abs().amax() * share.amax())
        factor = factor.float() * gain
        once = (1 if upstream is None else upstream) / gain
        gradients = Gradients(logits, x[None], w, scale[0] * once, wants_input or wants_scale, wants_matrix)
        bias_sums = torch.zeros(len(linear_bias), dtype=torch.float32, device=x.device)
    scales = torch.cat([scale, spread])
    for rows in row_blocks(len(x), logits.row_bytes):
        of_rows = logits(rows)
        S = of_rows[0]
        launch(
            S,
            bias,
            uniform,
            None if label is None else label[rows],
            None if label is None else label_weight[rows],
            None if factor is None else factor[rows],
            scales,
            None if loss is None else loss[rows],
            None if factor is None else S,
        )
        if gradients is not None:
            gradients.add(rows, of_rows)
            if bias is not None:
                bias_sums += S.sum(0, dtype=torch.float32)
    dx, dw, db, dscale = (z.new_empty((0, *z.shape[1:])) for z in (input, linear_weight, linear_bias, scale))
    if gradients is None:
        return dx, dw, db, dscale
    of_rows, of_matrix = gradients.finish()
    if wants_scale:
        dscale = (of_rows[0].float() * x.float()).sum().reshape(1) / scale
    if wants_input:
        dx = through_norms(of_rows[0], x, norms).to(input.dtype)
    if wants_matrix:
        dw = through_norms(of_matrix, w, w_norms).to(linear_weight.dtype)
    return dx, dw, (bias_sums * once).to(linear_bias.dtype), dscale


def launch(
    logits: Tensor,
    bias: Tensor | None,
    uniform: Tensor | None,
    label: Tensor | None,
    label_weight: Tensor | None,
    factor: Tensor | None,
    scales: Tensor,
    loss: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Writes `loss` (N,) of logits (N, V), and their `gradient`, which may be the logits; or one of them."""
    rows, classes = logits.shape
    if rows == 0:
        return
    cross_entropy[(rows,)](
        logits, bias, uniform, label, label_weight, factor, scales, loss, gradient, classes, logits.stride(0),
        0 if gradient is None else gradient.stride(0), BLOCK=min(triton.next_power_of_2(classes), BLOCK),
        num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
