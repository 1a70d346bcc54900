"""What a family says about each of its operations, and the table that collects it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

OPS: dict[str, OpSpec] = {}


@dataclass
class Sample:
    """Arguments of one valid call. Floating-point tensors with `requires_grad` are differentiated."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class BadInput:
    """Arguments of one call that must raise `error` with a message that matches `match`."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class OpSpec:
    """One operation: `fastssl.functional.<name>` must equal `reference`.

    Attributes:
        name: the operation's name in every room.
        family: the module it lives in.
        reference: naive implementation with the signature of `fastssl.functional.<name>`.
        samples: (dtype, device) -> valid calls: ragged, strided, scaled, and degenerate inputs.
        bad_inputs: () -> calls that must raise.
        op_args: (sample) -> arguments of `torch.ops.fastssl.<op>` for that sample.
        magnitude: (sample) -> how large the terms are that its values and gradients sum up: what rounding errors are
            relative to, where the result itself cancels.
        dtypes: floating dtypes that the inputs may have.
        reductions: values of its argument `reduction`, that which sums up the least first.
        op: the operation of `torch.ops.fastssl` that does its tiles; None: the one of its name.
    """

    name: str
    family: str
    reference: Callable[..., torch.Tensor]
    samples: Callable[[torch.dtype, str], Iterator[Sample]]
    bad_inputs: Callable[[], Iterator[BadInput]]
    op_args: Callable[[Sample], tuple[Any, ...]]
    magnitude: Callable[[Sample], float]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    reductions: tuple[str, ...] = ("none", "mean", "sum")
    op: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.op or self.name)
        OPS[self.name] = self
