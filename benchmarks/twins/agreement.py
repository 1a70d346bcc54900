"""Whether twins compute the same, by whole steps from the same weights, and whether their runs stay together.

Rounding separates two runs of one method: training amplifies 1e-7 until weights differ visibly. So their curves alone
say little. A few times in a run, therefore, the fastssl twin is copied before a step, and from these weights the step
is taken three times: with fastssl's kernels, with the naive code, and with the naive code in float64. Compared are

    loss         of the same embeddings, those of the naive forward pass
    gradients    of that loss, by the embeddings and by what it learns itself, such as a temperature
    step         the gradients of all parameters, through the whole network
    state        what the optimiser does not train, after the step: teacher, queue, running statistics

each as one vector, by their distance from float64's, over the length of float64's. fastssl's may be twice the naive
code's, which is what float32 itself loses, plus eight units in its last place, since a single number such as the loss
may be right by luck.

Of the curves, the running means over a tenth of the run are compared. They may differ by `DRIFT`, as a share of the
loss's root mean square. Single steps may differ more: two naive runs of VICReg whose first weights differed by 6e-8
were 4.9 % apart at one of 60 steps, and 1.1 % in running means.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastssl import use_backend
from fastssl.train import Method, Step, twins
from fastssl.train.method import IMPLEMENTATIONS

TIMES = 2.0
UNITS = 8 * 2.0**-23
DRIFT = 0.05
LOOKS = 6

Errors = dict[str, dict[str, float]]  # quantity -> implementation -> relative error


@dataclass(frozen=True)
class Agreement:
    """What comparing twins found.

    Attributes:
        errors: the largest relative error of any look, by quantity and implementation.
        drift: the largest difference of the curves' running means, as a share of the loss's root mean square.
        largest: the same of single steps.
    """

    errors: Errors
    drift: float
    largest: float

    @property
    def complaints(self) -> list[str]:
        """One line for each tolerance that was exceeded."""
        lines = []
        for quantity, error in self.errors.items():
            if not error["fastssl"] <= TIMES * error["naive"] + UNITS:
                lines.append(
                    f"{quantity}: relative error {error['fastssl']:.1e}, that of naive float32 {error['naive']:.1e}"
                )
        if not self.drift <= DRIFT:
            lines.append(f"the curves' running means differ by {self.drift:.1%} of the loss, above {DRIFT:.0%}")
        return lines


class Watched:
    """Training data that compares a method's implementations whenever a batch is taken for one of a few steps.

    So the comparison uses the weights and the batch of a real step, and takes none of its time.

    Attributes:
        found: the errors of each look.
    """

    def __init__(self, data: Any, method: Method, steps: int) -> None:
        self.data, self.method, self.step = data, method, 0
        self.looks = {round(look * (steps - 1) / (LOOKS - 1)) for look in range(LOOKS)}
        self.found: list[Errors] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, positions: Tensor) -> Any:
        batch = self.data[positions]
        if self.step in self.looks:
            views = self.method.views(batch, torch.Generator().manual_seed(self.step))
            self.found.append(step_errors(self.method, views))
        self.step += 1
        return batch


def agreement(found: Sequence[Errors], history: dict[str, list[Step]]) -> Agreement:
    """The agreement of twins, from the errors of each look and the losses of each step."""
    errors = {
        quantity: {impl: _largest(look[quantity][impl] for look in found) for impl in IMPLEMENTATIONS}
        for quantity in found[0]
    }
    losses = {impl: torch.tensor([step.loss for step in steps], dtype=torch.float64) for impl, steps in history.items()}
    difference = (losses["fastssl"] - losses["naive"]) / losses["naive"].square().mean().sqrt()
    means = difference.unfold(0, max(1, len(difference) // 10), 1).mean(1)
    return Agreement(errors, means.abs().max().item(), difference.abs().max().item())


def step_errors(method: Method, views: Sequence[Tensor]) -> Errors:
    """The relative errors of a step's results, by implementation. The method is not changed."""
    both = as_twins(method)
    with torch.random.fork_rng(devices=[]), running(both["naive"]):
        embeddings = [z.detach().requires_grad_(z.requires_grad) for z in both["naive"](*views)]
    exact = _results(in_float64(method), [in_float64(z) for z in embeddings], [in_float64(x) for x in views])
    results = {impl: _results(twin, embeddings, views) for impl, twin in as_twins(method).items()}
    return {
        quantity: {impl: relative(result[quantity], tensors) for impl, result in results.items()}
        for quantity, tensors in exact.items()
        if tensors
    }


def as_twins(method: Method) -> dict[str, Method]:
    """`twins`, both of them copies."""
    return twins(copy.deepcopy(method))


def in_float64(x: Any) -> Any:
    """A naive copy of a method, or a tensor, with floating-point numbers in float64."""
    if isinstance(x, Tensor):
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
    twin = copy.deepcopy(x).double()
    twin.impl = "naive"
    return twin


@contextmanager
def running(method: Method) -> Iterator[None]:
    """The method's backend; for a method in float64, `.float()` has no effect."""
    exact = next(method.parameters()).dtype == torch.float64
    with use_backend(IMPLEMENTATIONS[method.impl]), _KeepFloat64() if exact else nullcontext():
        yield


class _KeepFloat64(TorchFunctionMode):
    """Methods ask for float32 because autocast might have left bfloat16."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))


def loss_and_gradients(
    method: Method, loss: Callable[..., Tensor], embeddings: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """`loss` of embeddings, and its gradients by them and by what it learns itself, such as a temperature."""
    learned = [p for p in method.parameters() if p.requires_grad and not p.dim()]
    with running(method):
        value = loss(*embeddings)
        wanted = [*(z for z in embeddings if z.requires_grad), *learned]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
    return [value.detach()], [g for g in gradients if g is not None]


def _results(method: Method, embeddings: Sequence[Tensor], views: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Changes the method."""
    of_loss, gradients = loss_and_gradients(method, method.loss, embeddings)
    with torch.random.fork_rng(devices=[]), running(method):
        torch.manual_seed(0)  # dropout's
        own = method(*views)
        method.loss(*own).backward()
        method.after_step(*(z.detach() for z in own))
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    state = [x for name, x in method.state_dict().items() if name not in trained and x.is_floating_point()]
    return {
        "loss": of_loss,
        "gradients": gradients,
        "step": [p.grad for p in trained.values() if p.grad is not None],
        "state": state,
    }


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The distance of two lists of tensors, each as one vector, over the length of the second."""
    found, exact = (torch.cat([x.double().flatten() for x in tensors]) for tensors in (found, exact))
    return ((found - exact).norm() / exact.norm()).item()


def _largest(values: Iterable[float]) -> float:
    """NaN if one is."""
    return max(values, key=lambda value: (math.isnan(value), value))
