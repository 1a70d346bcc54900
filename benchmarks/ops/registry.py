"""What is timed: an operation, its inputs, its contestants, and the least work that it takes.

A family's benchmarks are in the module of its name beside this one; constructing a `Benchmark` registers it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
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
Function = Callable[..., Any]  # a loss, or what else takes a benchmark's inputs
Inputs = tuple[Any, ...]  # tensors, lists of them, numbers
LossAndGradients = tuple[Tensor, tuple[Tensor, ...]]
Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # outputs, gradients

_FLOAT64_ELEMENTS = 1 << 28  # above, an oracle works in float32
_BLOCK_ELEMENTS = {"cpu": 1 << 22, "gpu": 1 << 26}  # of the matrix of similarities, at a time
_GPU_ROWS, _GPU_FEATURES = (512, 4096, 32768, 131072), (128, 512, 1024)

BENCHMARKS: dict[str, Benchmark] = {}
BASELINES = (
    "naive",
    "compile",
    "chunked",
    "lightly",
    "open_clip",
    "metric_learning",
    "cosine",
    "pytorch",
    "assign",
    "foreach",
    "fused",
)


@dataclass(frozen=True)
class Mode:
    """A precision: the inputs' dtype, fastssl's and the baselines' float32 matmul precision, that of the products whose
    rate is the floor's, the largest error.

    A contestant whose outputs or gradients have a larger relative error (Frobenius norm) than `tolerance` is wrong. The
    tolerance of bfloat16 allows for eager code that rounds log-sum-exps to bfloat16.
    """

    dtype: torch.dtype
    precision: str
    baseline_precision: str
    products: str
    tolerance: float


MODES = {
    "float32": Mode(torch.float32, "highest", "highest", "float32", 1e-5),
    "tf32": Mode(torch.float32, "high", "high", "tf32", 5e-3),
    "medium": Mode(torch.float32, "medium", "highest", "bfloat16", 5e-3),
    "bfloat16": Mode(torch.bfloat16, "highest", "highest", "bfloat16", 5e-2),
}


@dataclass(frozen=True)
class Contestant:
    """A function to build, the float32 matmul precision it runs under, and the bytes it needs at its peak."""

    make: Callable[[], Function]
    precision: str
    needs: float = 0
    compiled: bool = False


def loss_and_gradients(loss: Loss, inputs: Inputs) -> Results:
    """The step of a loss: its value, averaged where there is one per row, and its gradients."""
    value = loss(*inputs)
    if value.dim():
        value = value.mean()
    return (value.detach(),), torch.autograd.grad(value, [x for x in inputs if x.requires_grad])


def output_and_gradients(function: Function, inputs: Inputs) -> Results:
    """The step of a layer. The last of its inputs is the gradient that the next layer sends back."""
    *arguments, gradient = inputs
    output = function(*arguments)
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return (output.detach(),), torch.autograd.grad(output, leaves, gradient)


def outputs(function: Function, inputs: Inputs) -> Results:
    """The step of an operation of several outputs, without gradients."""
    return function(*inputs), ()


def in_place(function: Function, inputs: Inputs) -> Results:
    """The step of an operation that changes its first input, a tensor or a list of tensors."""
    function(*inputs)
    return (inputs[0],) if isinstance(inputs[0], Tensor) else tuple(inputs[0]), ()


@dataclass(frozen=True)
class Benchmark:
    """One operation, and the step that is timed: of a loss forward and backward.

    Attributes:
        op: name in `fastssl.functional`.
        sizes: the sizes that are timed unless the user names others; a shorter size is completed by the first of these.
        memory_sizes: sizes at which only the peak memory is measured.
        inputs: (size, dtype) -> tensors, lists of them, numbers: the same at every call; tensors that require gradients
            get them.
        traffic: (size, bytes per element) -> bytes that the step must read and write.
        needs: (size, bytes per element) -> estimate of the peak extra memory of "naive", and of every other baseline
            that is to run.
        flops: (size) -> floating-point operations of the step's matrix products at best.
        products: the precision of those products, as in `Rates`; None: the mode's.
        arguments: keyword arguments of fastssl's function and of the naive one.
        call: (function, *inputs) -> its result, including what people compute before calling it; not applied to peers,
            which do that themselves.
        naive: eager code; None: the reference in `fastssl.reference.OPS`.
        peers: baseline -> its function, from another library.
        step: (function, inputs) -> outputs and gradients, a function of this module.
        timed: the step, in words.
        settle: (inputs, outputs) -> tensors that must equal the oracle's, where the outputs themselves are random.
        oracle: (*inputs) -> mean loss and gradients, exact to float32 or better; None: the naive code in float64.
        modes: the precisions that make a difference to it.
        on_cpu: positions of the inputs that are on the CPU wherever the others are.
        kernel: the operation of `torch.ops.fastssl` that does the work; "": the one that `OPS` names, or the one named
            `op`.
        name: needed where `op` has several benchmarks; "": `op`.
    """

    op: str
    sizes: tuple[Size, ...]
    memory_sizes: tuple[Size, ...]
    inputs: Callable[[Size, torch.dtype], Inputs]
    traffic: Callable[[Size, int], float]
    needs: Callable[[Size, int], dict[str, float]]
    flops: Callable[[Size], float] = lambda size: 0.0
    products: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    call: Function | None = None
    naive: Function | None = None
    peers: dict[str, Callable[[], Function]] = field(default_factory=dict)
    step: Callable[[Function, Inputs], Results] = loss_and_gradients
    timed: str = "forward + backward, normalisation included"
    settle: Callable[[Inputs, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    oracle: Callable[..., LossAndGradients] | None = None
    modes: tuple[str, ...] = tuple(MODES)
    on_cpu: tuple[int, ...] = ()
    kernel: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        spec = OPS.get(self.op)
        object.__setattr__(self, "naive", self.naive or spec.reference)
        object.__setattr__(self, "kernel", self.kernel or (spec.op if spec else self.op))
        object.__setattr__(self, "name", self.name or self.op)
        BENCHMARKS.setdefault(self.name, self)  # and not a copy of it with something replaced

    @property
    def family(self) -> str:
        """The module of `fastssl.functional` that the operation lives in."""
        return getattr(functional, self.op).__module__.split(".")[2]

    def sizes_on(self, device: str) -> tuple[Size, ...]:
        """Those of a CPU that are timed by default, or of a GPU, where a loss of whole batches has larger ones."""
        if device == "cpu" or len(self.sizes[0]) > 2 or self.step is not loss_and_gradients or self.oracle is None:
            return self.sizes
        return tuple((rows, dim) for rows in _GPU_ROWS for dim in _GPU_FEATURES)

    def modes_on(self, device: str) -> tuple[str, ...]:
        """Those that are timed by default: TF32 is a format of GPUs, where nobody multiplies in float32 for speed."""
        if device == "cpu":
            return tuple(mode for mode in self.modes if mode != "tf32")
        return tuple(mode for mode in self.modes if mode not in {"float32", "medium"} or "tf32" not in self.modes)

    def inputs_on(self, device: str, size: Size, dtype: torch.dtype) -> Inputs:
        """The numbers of `inputs`, on `device`."""
        inputs = self.inputs(size, dtype)
        return tuple(x if i in self.on_cpu else _moved(x, device) for i, x in enumerate(inputs))

    def contestants(self, size: Size, mode: str, against: tuple[str, ...] = BASELINES) -> dict[str, Contestant]:
        """fastssl first, then the baselines that `against` names and this operation has."""
        settings = MODES[mode]
        naive, ours = self._complete(self.naive), self._complete(getattr(functional, self.op))
        needs = self.needs(size, settings.dtype.itemsize)
        makers = {"naive": lambda: naive, "compile": lambda: compiled(naive), **self.peers}
        if isinstance(self.oracle, Blockwise):
            makers["chunked"] = self.oracle.loop
            needs = {**needs, "chunked": 4.0 * max(_BLOCK_ELEMENTS.values()) * settings.dtype.itemsize}
        found = {"fastssl": Contestant(lambda: ours, settings.precision)}
        for name in against:
            if name in makers and name in needs:
                found[name] = Contestant(makers[name], settings.baseline_precision, needs[name], name == "compile")
        if "naive" in found and settings.precision != settings.baseline_precision:
            found[f"naive, {settings.precision}"] = Contestant(makers["naive"], settings.precision, needs["naive"])
        return found

    def run(self, function: Function, inputs: Inputs) -> Results:
        """The step, with outputs reduced to what must equal the oracle's."""
        values, gradients = self.step(function, inputs)
        with torch.device(device_of(inputs)):
            return self.settle(inputs, values) if self.settle else values, gradients

    def expected(self, inputs: Inputs) -> Results:
        """The oracle's answer, in float32 products at least. It changes the same inputs as the step does."""
        torch.set_float32_matmul_precision("highest")
        with torch.device(device_of(inputs)):
            if self.oracle:
                loss, gradients = self.oracle(*inputs)
                return (loss,), gradients
            return self.run(self._complete(self.naive), tuple(map(_exact, inputs)))

    def _complete(self, function: Function) -> Function:
        function = functools.partial(function, **self.arguments)
        return functools.partial(self.call, function) if self.call else function

    def floor(self, size: Size, itemsize: int, product_rate: float, bandwidth: float) -> float:
        """Seconds of the products at `product_rate` FLOP/s, then of the traffic at `bandwidth` bytes/s."""
        return self.flops(size) / product_rate + self.traffic(size, itemsize) / bandwidth


def load(names: Sequence[str] = ()) -> dict[str, Benchmark]:
    """The benchmarks whose family, operation or name is among `names`, or all, by name."""
    for module in pkgutil.iter_modules(functional.__path__):
        if Path(__file__).with_name(f"{module.name}.py").exists():
            importlib.import_module(f"{__package__}.{module.name}")
    return {b.name: b for b in BENCHMARKS.values() if not names or not {b.family, b.op, b.name}.isdisjoint(names)}


def _exact(x: Any) -> Any:
    """`x`, its floating-point numbers in float64."""
    if isinstance(x, (list, tuple)):
        return [_exact(y) for y in x]
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def tensors_of(x: Any) -> list[Tensor]:
    if isinstance(x, (list, tuple)):
        return [z for y in x for z in tensors_of(y)]
    return [x] if isinstance(x, Tensor) else []


def device_of(inputs: Inputs) -> str:
    """The type of the device that they are on, but for some on the CPU."""
    return next((x.device.type for x in tensors_of(inputs) if x.device.type != "cpu"), "cpu")


def _moved(x: Any, device: str) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(_moved(y, device) for y in x)
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def small_batches(dim: int) -> tuple[Size, ...]:
    """What people train with on one device; a loss must be faster than eager code at each of them."""
    return tuple((rows, dim) for rows in (32, 64, 128, 256, 512, 1024))


def unit_pairs(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Two sets of rows of unit length, each with a cosine of about 1/2 to its partner, which require gradients."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (F.normalize(torch.randn(*size, generator=generator), dim=1) for _ in range(2))
    y = F.normalize(x + 3**0.5 * noise, dim=1)
    return tuple(z.to(dtype).requires_grad_() for z in (x, y))


def square_products(units: float, again: float = 0) -> Callable[[Size], float]:
    """`flops` of as many products of all rows with all rows, for sizes (rows, features). The backward pass needs
    `again` more where the exponentials do not fit into four times the inputs' bytes, for those that do not fit."""

    def flops(size: Size) -> float:
        rows, dim = size
        return (units + again * max(0, 1 - 8 * dim / rows)) * 2 * rows**2 * dim

    return flops


def square_matrices(**count: float) -> Callable[[Size, int], dict[str, float]]:
    """`needs` by the number of rows x rows matrices that each contestant holds at once."""
    return lambda size, itemsize: {name: n * size[0] ** 2 * itemsize for name, n in count.items()}


class Blockwise:
    """An oracle that never holds the whole matrix of similarities.

    Args:
        share: (rows, *inputs) -> what these rows, a vector of indices into the first input, add to the mean loss.
    """

    def __init__(self, share: Callable[..., Tensor]) -> None:
        self.share = share

    def __call__(self, *inputs: Tensor) -> LossAndGradients:
        rows, columns = _shape(inputs)
        dtype = torch.float64 if rows * columns <= _FLOAT64_ELEMENTS else torch.float32
        exact = [x.detach().to(dtype) if x.is_floating_point() else x for x in inputs]
        leaves = [y.requires_grad_(x.requires_grad) for x, y in zip(inputs, exact, strict=True)]
        return _in_blocks(self.share, leaves, torch.float64)

    def loop(self) -> Loss:
        """What one writes where the matrix does not fit: the same, compiled, in the inputs' dtype. The gradients are
        taken with the loss, block by block, and scaled in the backward pass."""
        torch._dynamo.reset()
        share = torch.compile(self.share, dynamic=False, fullgraph=True)

        class Loop(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, ctx.needs_input_grad, strict=True)]
                loss, gradients = _in_blocks(share, leaves, torch.float32)
                found = iter(gradients)
                ctx.gradients = [next(found).to(x.dtype) if x.requires_grad else None for x in leaves]
                return loss

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
                return tuple(None if x is None else x * grad.to(x.dtype) for x in ctx.gradients)

        return Loop.apply


def _shape(inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Of the matrix of similarities."""
    return len(inputs[0]), max(len(x) for x in inputs if x.dim())


def _in_blocks(share: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> LossAndGradients:
    """The sum of the shares of all rows, and its gradients, added up in `dtype`."""
    (rows, columns), device = _shape(inputs), inputs[0].device
    leaves = [x for x in inputs if x.requires_grad]
    loss = torch.zeros((), dtype=dtype, device=device)
    gradients = [torch.zeros(x.shape, dtype=dtype, device=device) for x in leaves]
    for row in torch.arange(rows, device=device).split(
        max(1, _BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // columns)
    ):
        with torch.enable_grad():
            part = share(row, *inputs)
        loss += part.detach()
        for gradient, more in zip(gradients, torch.autograd.grad(part, leaves), strict=True):
            gradient += more
    return loss, tuple(gradients)


def compiled(loss: Loss) -> Loss:
    """torch.compile of `loss` for one size, which raises where it cannot compile the whole of it.

    Dynamo forgets what it compiled before, so that no limit on recompilations turns this one into eager code.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(loss, dynamic=False, fullgraph=True)
