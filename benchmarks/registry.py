"""What is timed: an operation, its inputs, its contestants, and the least work it could be done with.

A family's benchmarks live in the module of its name beside this one; constructing a `Benchmark` registers it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import functional
from fastssl.reference import OPS

Size = tuple[int, ...]
Loss = Callable[..., Tensor]
LossAndGradients = tuple[Tensor, tuple[Tensor, ...]]

_FLOAT64_ELEMENTS = 1 << 28  # above, an oracle works in float32
_BLOCK_ELEMENTS = 1 << 22

BENCHMARKS: dict[str, Benchmark] = {}
BASELINES = ("naive", "compile", "lightly", "open_clip", "metric_learning")


@dataclass(frozen=True)
class Mode:
    """A precision: the inputs' dtype, fastssl's and the baselines' float32 matmul precision, the largest error.

    A contestant whose loss or gradient has a larger relative error (Frobenius norm) than `tolerance` is wrong. That of
    bfloat16 admits what eager code loses where it rounds log-sum-exps to bfloat16.
    """

    dtype: torch.dtype
    precision: str
    baseline_precision: str
    tolerance: float


MODES = {
    "float32": Mode(torch.float32, "highest", "highest", 1e-5),
    "medium": Mode(torch.float32, "medium", "highest", 5e-3),
    "bfloat16": Mode(torch.bfloat16, "highest", "highest", 5e-2),
}


@dataclass(frozen=True)
class Contestant:
    """A loss to build, the float32 matmul precision it runs under, and the bytes it needs at its peak."""

    make: Callable[[], Loss]
    precision: str
    needs: float = 0
    compiled: bool = False


@dataclass(frozen=True)
class Benchmark:
    """One operation, forward and backward.

    Attributes:
        op: name in `fastssl.functional` and `fastssl.reference.OPS`.
        sizes: what is timed unless the user says otherwise; what a shorter size leaves out is the first one's.
        memory_sizes: what only the peak memory is measured at.
        inputs: (size, dtype) -> tensors; those that require gradients get them.
        flops: (size) -> floating-point operations of the matrix products of forward + backward at best.
        traffic: (size, bytes per element) -> bytes that forward + backward must read and write.
        needs: (size, bytes per element) -> estimate of each baseline's peak extra memory.
        arguments: keyword arguments of fastssl's function and of the reference.
        call: (loss, *inputs) -> the loss with what people compute in front of it; peers that do so themselves lack it.
        peers: baseline -> its loss, from another library.
        oracle: (*inputs) -> mean loss and gradients, exact to float32 or better; None: the reference in float64.
    """

    op: str
    sizes: tuple[Size, ...]
    memory_sizes: tuple[Size, ...]
    inputs: Callable[[Size, torch.dtype], tuple[Tensor, ...]]
    flops: Callable[[Size], float]
    traffic: Callable[[Size, int], float]
    needs: Callable[[Size, int], dict[str, float]]
    arguments: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Tensor] | None = None
    peers: dict[str, Callable[[], Loss]] = field(default_factory=dict)
    oracle: Callable[..., LossAndGradients] | None = None

    def __post_init__(self) -> None:
        BENCHMARKS[self.op] = self

    def contestants(self, size: Size, mode: str, against: tuple[str, ...] = BASELINES) -> dict[str, Contestant]:
        """fastssl first, then the baselines that `against` names and this operation has."""
        settings = MODES[mode]
        naive, ours = self._loss(OPS[self.op].reference), self._loss(getattr(functional, self.op))
        needs = self.needs(size, settings.dtype.itemsize)
        makers = {"naive": lambda: naive, "compile": lambda: compiled(naive), **self.peers}
        found = {"fastssl": Contestant(lambda: ours, settings.precision)}
        for name in against:
            if name in makers:
                found[name] = Contestant(makers[name], settings.baseline_precision, needs[name], name == "compile")
        if "naive" in found and settings.precision != settings.baseline_precision:
            found[f"naive, {settings.precision}"] = Contestant(makers["naive"], settings.precision, needs["naive"])
        return found

    def expected(self, inputs: tuple[Tensor, ...]) -> LossAndGradients:
        """The oracle's answer."""
        if self.oracle:
            return self.oracle(*inputs)
        exact = (x.detach().double() if x.is_floating_point() else x for x in inputs)
        leaves = tuple(y.requires_grad_(x.requires_grad) for x, y in zip(inputs, exact, strict=True))
        return forward_backward(self._loss(OPS[self.op].reference), leaves)

    def _loss(self, function: Loss) -> Loss:
        loss = functools.partial(function, **self.arguments)
        return functools.partial(self.call, loss) if self.call else loss

    def floor(self, size: Size, itemsize: int, product_rate: float, bandwidth: float) -> float:
        """Seconds of the products at `product_rate` FLOP/s, then of the traffic at `bandwidth` bytes/s."""
        return self.flops(size) / product_rate + self.traffic(size, itemsize) / bandwidth


def load(names: Sequence[str] = ()) -> dict[str, Benchmark]:
    """The benchmarks of the families and operations in `names`, or all, by operation."""
    family = {name: spec.family for name, spec in OPS.items()}
    for name in set(family.values()):
        if Path(__file__).with_name(f"{name}.py").exists():
            importlib.import_module(name)
    return {op: b for op, b in BENCHMARKS.items() if not names or op in names or family[op] in names}


def forward_backward(loss: Loss, inputs: tuple[Tensor, ...]) -> LossAndGradients:
    """The step that is timed: the loss, averaged where there is one per row, and its gradients."""
    value = loss(*inputs)
    if value.dim():
        value = value.mean()
    return value.detach(), torch.autograd.grad(value, [x for x in inputs if x.requires_grad])


def unit_pairs(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Two sets of rows of unit length, each with a cosine of about 1/2 to its partner, which require gradients."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (F.normalize(torch.randn(*size, generator=generator), dim=1) for _ in range(2))
    y = F.normalize(x + 3**0.5 * noise, dim=1)
    return tuple(z.to(dtype).requires_grad_() for z in (x, y))


def blockwise(share: Callable[..., Tensor]) -> Callable[..., LossAndGradients]:
    """An oracle that never holds the whole matrix of similarities.

    Args:
        share: (rows, *inputs) -> what these rows, a vector of indices of the first input's, add to the mean loss.
    """

    def oracle(*inputs: Tensor) -> LossAndGradients:
        rows, columns = len(inputs[0]), max(len(x) for x in inputs if x.dim())
        dtype = torch.float64 if rows * columns <= _FLOAT64_ELEMENTS else torch.float32
        exact = [x.detach().to(dtype) if x.is_floating_point() else x for x in inputs]
        leaves = [y.requires_grad_() for x, y in zip(inputs, exact, strict=True) if x.requires_grad]
        loss, gradients = torch.zeros((), dtype=torch.float64), [torch.zeros(x.shape).double() for x in leaves]
        for row in torch.arange(rows).split(max(1, _BLOCK_ELEMENTS // columns)):
            part = share(row, *exact)
            loss += part.detach()
            for gradient, more in zip(gradients, torch.autograd.grad(part, leaves), strict=True):
                gradient += more
        return loss, tuple(gradients)

    return oracle


def compiled(loss: Loss) -> Loss:
    """torch.compile of `loss` for one size, which raises where it cannot compile the whole of it.

    Dynamo forgets what it compiled before, so that no limit on recompilations turns this one into eager code.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(loss, dynamic=False, fullgraph=True)
