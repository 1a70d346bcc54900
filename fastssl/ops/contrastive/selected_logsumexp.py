"""The log-sum-exp of each row's similarities with rows that it chooses, by their ids.

Reading memory takes all the time: products are float32, whatever precision is asked for, and no matrix products, of
which there would be one for each row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._norms import EPS, normalized_rows, through_norms
from fastssl.ops._op import Op
from fastssl.ops._portable import add_rows_, row_blocks
from fastssl.ops._precision import accumulate_dtype, widen
from fastssl.ops.contrastive._shared import sums_of_exponentials


def _fake(
    x: Tensor, y: Tensor, ids: Tensor, scale: Tensor, normalize: bool, weigh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dim = x.shape
    shapes = (rows,), (rows,), (rows if weigh else 0, dim), (rows if weigh else 0, ids.shape[1])
    results = (x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) for shape in shapes)
    return *results, x.new_empty(y.shape[0] if normalize else 0, dtype=accumulate_dtype(x.dtype))


def _blocks(x: Tensor, ids: Tensor) -> list[slice]:
    return row_blocks(x.shape[0], ids.shape[1] * x.shape[1])


def _selected(y: Tensor, ids: Tensor, divisor: Tensor | None) -> Tensor:
    """(B, K, D): the rows that ids name, divided; zeros where they name none."""
    some = ids.clamp_min(0)
    rows = y[some] if divisor is None else y[some] / divisor[some][:, :, None]
    return rows.where(ids[:, :, None] >= 0, 0)


def _check_range(ids: Tensor, y: Tensor) -> None:
    if ids.device.type == "cpu" and ids.numel() and ids.max() >= y.shape[0]:
        raise IndexError(f"negative_ids must be below {y.shape[0]}, got {ids.max()}")


def _forward(
    x: Tensor, y: Tensor, ids: Tensor, scale: Tensor, normalize: bool, weigh: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_range(ids, y)
    x, wide = widen(x), widen(y)
    divisor = norms = None
    if normalize:
        norms = normalized_rows(y, True)[1][:, 0]
        divisor = norms.clamp_min(EPS)
    total, shift, weighted, exponentials, _ = (t.zero_() for t in _fake(x, y, ids, scale, normalize, weigh))
    for rows in _blocks(x, ids) if y.shape[0] else []:
        selected = _selected(wide, ids[rows], divisor)
        S = (x[rows, None] * selected).sum(2) * scale
        S = S.masked_fill(ids[rows] < 0, float("-inf"))
        total[rows], shift[rows] = sums_of_exponentials(S, 1)
        if weigh:
            exponentials[rows] = S.sub_(shift[rows, None]).exp_()
            weighted[rows] = (exponentials[rows, :, None] * selected).sum(1)
    return total, shift, weighted, exponentials, x.new_empty(0) if norms is None else norms.contiguous()


def _backward(
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    weighted: Tensor,
    exponentials: Tensor,
    norms: Tensor,
    needs_y: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = (grad_total * scale)[:, None] * weighted
    grad_scale = (grad_total[:, None] * weighted * x).sum(dtype=torch.float64).to(scale.dtype)
    if not needs_y:
        return grad_x.to(x.dtype), y.new_empty((0, y.shape[1])), grad_scale
    count = y.shape[0]
    grad_y = weighted.new_zeros((count + 1, y.shape[1]))  # the last row takes what names none
    weights, rows_of = exponentials * (grad_total * scale)[:, None], ids.where(ids >= 0, count)
    for rows in _blocks(x, ids):
        terms = weights[rows, :, None] * x[rows, None].to(weights.dtype)
        add_rows_(grad_y, rows_of[rows].flatten(), terms.flatten(0, 1))
    grad_y = grad_y[:count]
    if normalize:
        grad_y = through_norms(grad_y, widen(y) / norms[:, None].clamp_min(EPS), norms[:, None])
        named = torch.zeros(count + 1, dtype=torch.bool, device=y.device).index_fill_(0, rows_of.flatten(), True)
        grad_y = grad_y.where(named[:count, None], 0)  # not NaN, whatever a row is that nothing names
    return grad_x.to(x.dtype), grad_y.to(y.dtype).contiguous(), grad_scale


def _share(
    rows: slice,
    grad_total: Tensor,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    scale: Tensor,
    shift: Tensor,
    normalize: bool,
) -> Tensor:
    selected = _selected(F.normalize(y, dim=1, eps=EPS) if normalize else y, ids[rows], None)
    S = ((x[rows, None] * selected).sum(2) * scale).masked_fill(ids[rows] < 0, float("-inf"))
    return (grad_total[rows] * (S - shift[rows, None]).exp().sum(1)).sum()


selected_logsumexp = Op(
    "selected_logsumexp(Tensor x, Tensor y, Tensor ids, Tensor scale, bool normalize, bool weigh)"
    " -> (Tensor total, Tensor shift, Tensor weighted, Tensor exponentials, Tensor norms)",
    backward="(Tensor grad_total, Tensor x, Tensor y, Tensor ids, Tensor scale, Tensor shift, Tensor weighted,"
    " Tensor exponentials, Tensor norms, bool needs_y, bool normalize)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    fake=_fake,
    portable=(_forward, _backward),
    share=_share,
    blocks=_blocks,
    triton="contrastive",
)
