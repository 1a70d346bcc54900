"""The cross-entropy of a linear layer's logits: schemas, fake kernels, derivatives, and the portable code.

Of rows x (N, D), a weight (V, D), a bias (V,) or (0,), and the labels y or the distributions T (N, V):

    s_i = scale W x_i + b,    lse_i = log sum_k exp(s_ik),    Q = softmax(s)
    loss_i = p_i (lse_i - s_iy) + sum_k c_k (lse_i - s_ik),    p_i = (1 - smoothing) w_y,    c_k = smoothing w_k / V
    loss_i = sum_k R_ik (lse_i - s_ik),    R_ik = ((1 - smoothing) T_ik + smoothing / V) w_k
    G = dloss/ds = (sum of the row's target) Q - its target
    dx = scale G W,    dW = scale G^T x,    db = sum_i G_i,    dscale = <x, G W>

w are class weights. With the largest s_ik taken from all, every term is of one sign: nothing cancels. Where x and W are
normalised, the gradients of their rows are, as those of contrastive losses, through the norms.

A block of rows at a time: its logits, their G in place, and both products with them. With U = 2 N V D floating-point
operations, one product, that is 3 U, in the forward pass if gradients are taken there (`derive`), and O(rows V) memory.
Where not both products are asked for, as with a frozen matrix, it is 2 U: of dx, with which dscale comes, and of dW.
Rows without a label take no part in any product on the CPU; elsewhere, where that would make the CPU wait, they take
part as zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._norms import EPS, normalized_rows, through_norms
from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks
from fastssl.ops._precision import accumulate_dtype, round_operand, round_weights


def _fake(
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
    loss = input.new_empty(input.shape[:1] if row_weight is None else (), dtype=accumulate_dtype(input.dtype))
    taken = (input, derive_input), (linear_weight, derive_weight), (linear_bias, derive), (scale, derive_input)
    return loss, *(_taken(*pair) for pair in taken)


def _soft_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    normalize: bool,
    derive: bool,
    derive_input: bool,
    derive_weight: bool,
    derive_target: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    flags = derive, derive_input, derive_weight
    others = class_weight, row_weight, label_smoothing, 0, normalize, *flags, precision
    loss, *kept, kept_scale = _fake(input, linear_weight, linear_bias, target, scale, *others)
    return loss, *kept, _taken(target, derive_target), kept_scale


def _taken(x: Tensor, derive: bool) -> Tensor:
    return x.new_empty(x.shape if derive else (0, *x.shape[1:]))


class _Wanted(NamedTuple):
    """Of which inputs gradients are, beside the bias."""

    input: bool
    linear_weight: bool
    scale: bool
    target: bool = False


class _Target:
    """What the rows of a block are to be: a label each, or a distribution."""

    def __init__(
        self,
        target: Tensor | None,
        class_weight: Tensor | None,
        label_smoothing: float,
        known: Tensor | None,
        like: Tensor,
    ) -> None:
        """`known`: whether a row's label counts; None: all do. `like`: logits (rows, V)."""
        rows, classes = like.shape
        weights = like.new_ones(classes) if class_weight is None else class_weight.to(like.dtype)
        self.uniform = weights * (label_smoothing / classes) if label_smoothing and target is not None else None
        self.labels = self.distribution = None
        self.label_weight = like.new_ones(rows)  # of the log-sum-exp alone, where there is no target
        if target is not None and target.is_floating_point():
            self.class_weight = weights * (1 - label_smoothing)
            self.distribution = target.to(like.dtype) * self.class_weight
            self.label_weight = self.distribution.sum(1)
        elif target is not None:
            self.labels = (target if known is None else target.where(known, 0))[:, None]
            self.label_weight = weights[self.labels[:, 0]] * (1 - label_smoothing)
        self.known = known

    def loss(self, logits: Tensor) -> Tensor:
        """Of each row; differentiable."""
        peak = logits.detach().amax(1, keepdim=True)
        peak = peak.where(peak.isfinite(), 0)
        below = logits - peak
        total = below.logsumexp(1)
        if self.distribution is not None:
            # Not <R, s>: what is infinitely far below and not wanted would be NaN in a derivative of it only.
            loss = (self.distribution * (total[:, None] - below)).sum(1)
        elif self.labels is not None:
            loss = self.label_weight * (total - below.gather(1, self.labels)[:, 0])
        else:
            loss = total + peak[:, 0]
        if self.uniform is not None:
            loss = loss + (self.uniform * (total[:, None] - below)).sum(1)
        return loss if self.known is None else loss.where(self.known, 0)

    def loss_(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each row's loss, log Q in place of the logits, and the gradient of a distribution."""
        peak = logits.amax(1, keepdim=True)
        below = logits.sub_(peak)
        log_total, grad_target = below.exp().sum(1).log(), None
        if self.distribution is not None:
            distance = log_total[:, None] - below
            loss = (self.distribution * distance).sum(1)
            grad_target = distance * self.class_weight
        elif self.labels is not None:
            loss = self.label_weight * (log_total - below.gather(1, self.labels)[:, 0])
        else:
            loss = log_total + peak[:, 0]
        if self.uniform is not None:
            loss = loss + log_total * self.uniform.sum() - below @ self.uniform
        return loss, below.sub_(log_total[:, None]), grad_target

    def weights_(self, log_probabilities: Tensor, factor: Tensor) -> Tensor:
        """G times a factor of each row, in place."""
        share = self.label_weight if self.uniform is None else self.label_weight + self.uniform.sum()
        if self.labels is not None:
            # 1 - Q of the label, exactly: it is what a confident row still has to learn.
            log_label = log_probabilities.gather(1, self.labels)
            label = self.label_weight[:, None] * log_label.expm1()
            if self.uniform is not None:
                label += self.uniform.sum() * log_label.exp() - self.uniform[self.labels]
        G = log_probabilities.exp_().mul_(share[:, None])
        if self.distribution is not None:
            G -= self.distribution
        if self.uniform is not None:
            G -= self.uniform
        if self.labels is not None:
            G.scatter_(1, self.labels, label)
        return G.mul_(factor[:, None])


def _visit(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor | None,
    scale: Tensor,
    class_weight: Tensor | None,
    factor: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    normalize: bool,
    precision: str,
    wanted: _Wanted,
    upstream: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Each row's loss; and the gradients, of input, weight, bias, target and scale, of the losses times `factor`,
    summed, times `upstream`; of no rows where they are not wanted."""
    dtype = accumulate_dtype(input.dtype)
    (wide_w, w_norms), bias = normalized_rows(linear_weight, normalize), linear_bias.to(dtype)
    w, wide_scale = round_operand(wide_w, precision), scale.to(dtype)
    loss = input.new_zeros(len(input), dtype=dtype)
    derive = factor is not None
    sums = (input, wanted.input), (w, wanted.linear_weight), (bias, derive), (target, wanted.target)
    grad_x, grad_w, grad_b, grad_target = (None if z is None else _taken(z, taken).zero_() for z, taken in sums)
    along = input.new_zeros(1, dtype=torch.float64)
    once = None if upstream is None else upstream.to(dtype)
    ids = _labelled(target, ignore_index, len(w))
    for rows in row_blocks(len(input) if ids is None else len(ids), len(w)):
        at = rows if ids is None else ids[rows]
        (wide_x, norms), y, known = normalized_rows(input[at], normalize), None if target is None else target[at], None
        if y is not None and ids is None and not y.is_floating_point():
            known = y != ignore_index
            wide_x = wide_x.masked_fill(~known[:, None], 0)
        x = round_operand(wide_x, precision)
        logits = (x @ w.T).mul_(wide_scale)
        if len(bias):
            logits += bias
        block = _Target(y, class_weight, label_smoothing, known, logits)
        losses, log_probabilities, slope = block.loss_(logits)
        loss[at] = losses if known is None else losses.where(known, 0)
        if not derive:
            continue
        factors = factor[at].to(dtype)
        if wanted.target:
            slope = slope * factors[:, None]
            grad_target[at] = (slope if once is None else slope * once).to(grad_target.dtype)
        G = block.weights_(log_probabilities, factors if known is None else factors.where(known, 0))
        if known is not None:
            G = G.masked_fill_(~known[:, None], 0)
        if len(bias):
            grad_b += G.sum(0)
        G = round_weights(G, precision)
        if wanted.linear_weight:
            grad_w.addmm_(G.T, x)
        if not (wanted.input or wanted.scale):
            continue
        g = G @ w
        along += (g * wide_x).sum(dtype=torch.float64)
        if wanted.input:
            g = through_norms(g.mul_(wide_scale), wide_x, norms)
            grad_x[at] = (g if once is None else g * once).to(grad_x.dtype)
    grad_scale = along.to(dtype) if wanted.scale else along.new_empty(0, dtype=dtype)
    if wanted.linear_weight:
        grad_w = through_norms(grad_w.mul_(wide_scale), wide_w, w_norms)
    if once is not None:
        grad_w, grad_b, grad_scale = grad_w * once, grad_b * once, grad_scale * once
    return (
        loss,
        grad_x,
        grad_w.to(linear_weight.dtype),
        grad_b.to(linear_bias.dtype),
        grad_target,
        grad_scale.to(scale.dtype),
    )


def _labelled(target: Tensor | None, ignore_index: int, classes: int) -> Tensor | None:
    """Which rows count; None: all, or that is to be found out block by block, as nothing waits for a GPU."""
    if target is None or target.is_floating_point() or target.device.type != "cpu":
        return None
    known = check_labels(target, ignore_index, classes)
    return None if known.all() else known.nonzero()[:, 0]


def check_labels(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Which labels are not ignored. Raises IndexError if one of them is no class; waits for a GPU."""
    known = target != ignore_index
    wrong = known & ((target < 0) | (target >= classes))
    if wrong.any():
        rule = f"must be from 0 to below {classes}, or ignore_index, {ignore_index}"
        raise IndexError(f"target {rule}, got {target[wrong][0].item()}")
    return known


def _forward(
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
    tensors = input, linear_weight, linear_bias, target, scale, class_weight, row_weight if derive else None
    wanted = _Wanted(derive_input, derive_weight, derive_input)
    loss, *kept, _, kept_scale = _visit(*tensors, label_smoothing, ignore_index, normalize, precision, wanted)
    return _weighted(loss, row_weight), *kept, kept_scale


def _backward(
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
    factor, upstream = (grad_loss, None) if row_weight is None else (row_weight, grad_loss)
    tensors = input, linear_weight, linear_bias, target, scale, class_weight, factor
    wanted = _Wanted(wants_input, wants_linear_weight, wants_scale)
    _, *grads, _, grad_scale = _visit(*tensors, label_smoothing, ignore_index, normalize, precision, wanted, upstream)
    return *grads, grad_scale


def _soft_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    normalize: bool,
    derive: bool,
    derive_input: bool,
    derive_weight: bool,
    derive_target: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    tensors = input, linear_weight, linear_bias, target, scale, class_weight, row_weight if derive else None
    wanted = _Wanted(derive_input, derive_weight, derive_input, derive_target)
    loss, *kept = _visit(*tensors, label_smoothing, 0, normalize, precision, wanted)
    return _weighted(loss, row_weight), *kept


def _soft_backward(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    normalize: bool,
    wants_input: bool,
    wants_linear_weight: bool,
    wants_target: bool,
    wants_scale: bool,
    precision: str,
) -> tuple[Tensor, ...]:
    factor, upstream = (grad_loss, None) if row_weight is None else (row_weight, grad_loss)
    tensors = input, linear_weight, linear_bias, target, scale, class_weight, factor
    wanted = _Wanted(wants_input, wants_linear_weight, wants_scale, wants_target)
    return _visit(*tensors, label_smoothing, 0, normalize, precision, wanted, upstream)[1:]


def _weighted(loss: Tensor, row_weight: Tensor | None) -> Tensor:
    return loss if row_weight is None else (loss * row_weight).sum()


def _share(
    rows: slice,
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
) -> Tensor:
    x, w, y, known = input[rows], linear_weight, None if target is None else target[rows], None
    if y is not None and not y.is_floating_point():
        known = y != ignore_index
        x = x.where(known[:, None], 0)
    if normalize:
        x, w = (F.normalize(z, dim=1, eps=EPS) for z in (x, w))
    logits = x @ w.T * scale
    if len(linear_bias):
        logits = logits + linear_bias
    loss = _Target(y, class_weight, label_smoothing, known, logits).loss(logits)
    return (loss * grad_loss[rows]).sum() if row_weight is None else grad_loss * (loss * row_weight[rows]).sum()


def _soft_share(
    rows: slice,
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    normalize: bool,
) -> Tensor:
    tensors = grad_loss, input, linear_weight, linear_bias, target, scale, class_weight, row_weight
    return _share(rows, *tensors, label_smoothing, 0, normalize)


def _blocks(input: Tensor, linear_weight: Tensor) -> list[slice]:
    return row_blocks(len(input), len(linear_weight))


_TENSORS = "Tensor input, Tensor linear_weight, Tensor linear_bias,"
_WEIGHTS = "Tensor scale, Tensor? class_weight, Tensor? row_weight, float label_smoothing,"
_DERIVE = "bool derive, bool derive_input, bool derive_weight,"

linear_cross_entropy = Op(
    f"linear_cross_entropy({_TENSORS} Tensor? target, {_WEIGHTS} int ignore_index, bool normalize, {_DERIVE}"
    " str precision)"
    " -> (Tensor loss, Tensor kept_input, Tensor kept_linear_weight, Tensor kept_linear_bias, Tensor kept_scale)",
    backward=f"(Tensor grad_loss, {_TENSORS} Tensor? target, {_WEIGHTS} int ignore_index, bool normalize,"
    " bool wants_input, bool wants_linear_weight, bool wants_scale, str precision) -> (Tensor grad_input,"
    " Tensor grad_linear_weight, Tensor grad_linear_bias, Tensor grad_scale)",
    fake=_fake,
    portable=(_forward, _backward),
    share=_share,
    blocks=_blocks,
    triton="linear_cross_entropy",
)

linear_soft_cross_entropy = Op(
    f"linear_soft_cross_entropy({_TENSORS} Tensor target, {_WEIGHTS} bool normalize, {_DERIVE} bool derive_target,"
    " str precision) -> (Tensor loss, Tensor kept_input, Tensor kept_linear_weight, Tensor kept_linear_bias,"
    " Tensor kept_target, Tensor kept_scale)",
    backward=f"(Tensor grad_loss, {_TENSORS} Tensor target, {_WEIGHTS} bool normalize, bool wants_input,"
    " bool wants_linear_weight, bool wants_target, bool wants_scale, str precision) -> (Tensor grad_input,"
    " Tensor grad_linear_weight, Tensor grad_linear_bias, Tensor grad_target, Tensor grad_scale)",
    fake=_soft_fake,
    portable=(_soft_forward, _soft_backward),
    share=_soft_share,
    blocks=_blocks,
)
