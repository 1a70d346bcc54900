"""The product of tensors and a number, in place: of gradients that a forward pass took, see `_derivative.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.ops._op import Op
from fastssl.ops._portable import row_blocks


def _portable(tensors: list[Tensor], factor: Tensor) -> None:
    if factor.device.type == "cpu":
        if (number := factor.item()) != 1:
            torch._foreach_mul_(tensors, number)
        return
    for x in tensors:  # whether it is 1 is not waited for
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        for block in row_blocks(*rows.shape):
            rows[block] = rows[block].to(factor.dtype) * factor


scale_ = Op("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()", portable=_portable)
