"""What a family says about each of its operations, and the table that collects it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch

OPS: dict[str, OpSpec] = {}

# Tags of samples, by which the generic tests choose:
TRACED = "traced"  # differs from others to a tracer: is compiled, differentiated by torch.func, checked by opcheck
SHAPES = "shapes"  # of nothing but sizes, above 1: one graph with dynamic shapes serves them all
COMPILED = "compiled"  # by Inductor, too
RAGGED = "ragged"  # long enough for wide loads: is tried at other alignments
POISONED = "poisoned"  # element [3, ..., 2] of each input is set to NaN and infinity
EDGE = "edge"  # numbers at which kernels take other ways: is checked by opcheck


@dataclass(eq=False)
class Sample:
    """Arguments of one valid call. Floating-point tensors with `requires_grad` are differentiated."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tags: Set[str] = frozenset()


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
        magnitude: (sample) -> how large the terms are that its values and gradients sum up: what rounding errors are
            relative to, where the result itself cancels.
        dtypes: floating dtypes that the inputs may have.
        reductions: values of its argument `reduction`, that which sums up the least first.
        op: the operation of `torch.ops.fastssl` that does most of its work; None: the one of its name; "": none does.
        written: positions of the arguments that it writes in place. They are its outputs; it returns None.
        check: (sample, *outputs) -> None, or an AssertionError: what holds of outputs that the arguments do not settle,
            which are random or one choice of several. They are not compared with the reference's, for which it holds
            too.
        multiplies: whether it has products, which follow `torch.set_float32_matmul_precision` and autocast; None: those
            of PyTorch, which decides.
        autocast: what the dtype of the result is under autocast: "float32", as a loss; "autocast", as a product;
            "inputs", which it does not change.
    """

    name: str
    family: str
    reference: Callable[..., Any]
    samples: Callable[[torch.dtype, str], Iterator[Sample]]
    bad_inputs: Callable[[], Iterator[BadInput]]
    magnitude: Callable[[Sample], float] = lambda sample: 1.0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    reductions: tuple[str, ...] = ()
    op: str | None = None
    written: tuple[int, ...] = ()
    check: Callable[..., None] | None = None
    multiplies: bool | None = True
    autocast: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.name if self.op is None else self.op)
        OPS[self.name] = self
