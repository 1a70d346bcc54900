"""Reductions of the losses of rows, as PyTorch's loss functions have them."""

from __future__ import annotations

from torch import Tensor


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """`loss` reduced: "none", "mean" or "sum"."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def gradient_of_rows(gradient: Tensor, reduction: str, rows: int) -> Tensor:
    """(rows,): that of the losses of rows, from that of what `reduce` made of them."""
    if reduction == "none":
        return gradient
    return (gradient / rows if reduction == "mean" else gradient).expand(rows)
