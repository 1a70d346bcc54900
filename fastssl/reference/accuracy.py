"""How far a result may be from the truth: as far as eager PyTorch's own, twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastssl.reference.samples import OpSpec, Sample

Results = tuple[Tensor, ...]  # a value, and the gradient of every tensor that asks for one


def returning(spec: OpSpec, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the operation's signature; if it writes arguments in place, it writes copies and returns them."""
    if not spec.written:
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        args = [_map(x, torch.clone) if i in spec.written else x for i, x in enumerate(args)]
        function(*args, **kwargs)
        return [args[i] for i in spec.written]

    return call


def _map(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)([_map(y, f) for y in x])
    return f(x) if isinstance(x, Tensor) else x


def map_tensors(sample: Sample, f: Callable[[Tensor], Tensor]) -> Sample:
    """With those of a floating dtype changed."""

    def apply(x: Any) -> Any:
        return _map(x, lambda y: f(y) if y.is_floating_point() else y)

    kwargs = {k: apply(v) for k, v in sample.kwargs.items()}
    return Sample(sample.label, tuple(map(apply, sample.args)), kwargs, sample.tags)


def as_double(sample: Sample) -> Sample:
    return map_tensors(sample, lambda x: x.detach().double().requires_grad_(x.requires_grad))


def on_cpu(sample: Sample) -> Sample:
    """Itself, if it is there."""

    def copy(x: Tensor) -> Tensor:
        return x.detach().cpu().requires_grad_(x.requires_grad)

    if all(x.device.type == "cpu" for x in tensors_of(sample)):
        return sample
    kwargs = {k: _map(v, copy) for k, v in sample.kwargs.items()}
    return Sample(sample.label, tuple(_map(x, copy) for x in sample.args), kwargs, sample.tags)


def tensors_of(*values: Any) -> list[Tensor]:
    """Those of samples, outputs, and lists of them, in order."""
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, Sample):
            found += tensors_of(*x.args, *x.kwargs.values())
        elif isinstance(x, (list, tuple)):
            found += tensors_of(*x)
    return found


def dtype_of(sample: Sample) -> torch.dtype:
    """Of its first floating-point tensor."""
    return next((x.dtype for x in tensors_of(sample) if x.is_floating_point()), torch.float32)


def leaves_of(sample: Sample) -> list[Tensor]:
    return [x for x in tensors_of(sample) if x.requires_grad]


def cotangent_for(output: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randn(output.shape, generator=generator, device="cpu").to(output.device, output.dtype)


def evaluate(function: Callable[..., Tensor], sample: Sample) -> Results:
    """On the sample's device; the results are on the CPU."""
    torch.manual_seed(0)
    outputs = tensors_of(function(*sample.args, **sample.kwargs))
    return tuple(x.detach().cpu() for x in (*outputs, *gradients(outputs, sample)))


def gradients(outputs: list[Tensor], sample: Sample) -> Results:
    """Of every leaf."""
    if not leaves_of(sample):
        return ()
    differentiable = [x for x in outputs if x.requires_grad]
    return torch.autograd.grad(differentiable, leaves_of(sample), [cotangent_for(x) for x in differentiable])


def values(results: Results, sample: Sample) -> Results:
    """Without the gradients."""
    return results[: len(results) - len(leaves_of(sample))]


def truth_and_eager(spec: OpSpec, sample: Sample) -> tuple[Results, Results]:
    """What the reference makes of the sample on the CPU, in float64, and in the sample's dtype."""
    sample = on_cpu(sample)
    reference = returning(spec, spec.reference)
    return evaluate(reference, as_double(sample)), evaluate(reference, sample)


def natural_sizes(spec: OpSpec, sample: Sample, truth: Results) -> list[tuple[Tensor | float, float]]:
    """(weight, size) of each value and each gradient, on the CPU: weight * result would have a norm of about `size`,
    were it not for cancellation. The gradient of a row is inverse to its length."""
    sample = on_cpu(sample)
    magnitude, outputs = spec.magnitude(sample), values(truth, sample)
    sizes: list[tuple[Tensor | float, float]] = [
        (1.0, magnitude * x.numel() ** 0.5 + x.double().norm().item()) for x in outputs
    ]
    summed = sample.kwargs.get("reduction") == "sum" and spec.reductions[0] == "none"  # one number for each row's loss
    for leaf, gradient in zip(leaves_of(sample), truth[len(outputs) :], strict=True):
        x = leaf.detach().double()
        weight = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) if x.dim() >= 2 else x.abs()
        size = torch.where(gradient.isfinite(), gradient * weight, 0).norm()
        rows = len(x) ** 0.5 if summed and x.dim() else 1.0
        sizes.append((weight, magnitude * rows * cotangent_for(outputs[0]).norm().item() + size.item()))
    return sizes


def weighted_error(result: Tensor, truth: Tensor, weight: Tensor | float) -> float:
    return torch.where(truth.isfinite(), (result.double() - truth) * weight, 0).norm().item()


def assert_as_accurate_as_eager(
    spec: OpSpec, sample: Sample, results: Results, yardstick: tuple[Results, Results] | None = None
) -> None:
    """Errors against float64 are at most twice those of eager PyTorch, or a few units in the last place before sums:
    four, or as many as rounding leaves in a plain sum over the rows, about the root of their number. What is no
    floating-point number is equal. Of outputs that the arguments do not settle, what the operation says holds."""
    sample = on_cpu(sample)
    if spec.check is not None:
        spec.check(sample, *values(results, sample))
        return
    dtype = dtype_of(sample)
    truth, eager = yardstick or truth_and_eager(spec, sample)
    # In float64 the truth is as rough as the rest: a similarity's rounding error is an exponential's relative error.
    units = max(4, max((len(x) for x in tensors_of(sample) if x.dim()), default=1) ** 0.5) * torch.finfo(dtype).eps
    units *= 1 + spec.magnitude(sample) if dtype == torch.float64 else 1
    outputs = len(values(truth, sample))
    names = [f"value {i}" if i < outputs else f"gradient {i - outputs}" for i in range(len(truth))]
    sizes = natural_sizes(spec, sample, truth)
    for name, result, true, rough, (weight, size) in zip(names, results, truth, eager, sizes, strict=True):
        assert result.shape == true.shape, name
        if not true.is_floating_point():
            assert torch.equal(result, true), name
            continue
        settled = true.isfinite()  # where the truth is infinite, so is the result
        torch.testing.assert_close(result[~settled].double(), true[~settled])
        error, eager_error = (weighted_error(x, true, weight) for x in (result, rough))
        bound = 2 * eager_error + units * size
        assert error <= bound, f"{name}: error {error:.3g}, eager's {eager_error:.3g}, bound {bound:.3g}"
