"""How far a result may be from the truth: as far as eager PyTorch's own, twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastssl
from fastssl.reference import OpSpec, Sample

Results = tuple[Tensor, ...]  # a value, and the gradient of every tensor that asks for one


def public(spec: OpSpec) -> Callable[..., Tensor]:
    return getattr(fastssl.functional, spec.name)


def map_tensors(sample: Sample, f: Callable[[Tensor], Tensor]) -> Sample:
    def apply(x: Any) -> Any:
        return f(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    return Sample(sample.label, tuple(map(apply, sample.args)), {k: apply(v) for k, v in sample.kwargs.items()})


def as_double(sample: Sample) -> Sample:
    return map_tensors(sample, lambda x: x.detach().double().requires_grad_(x.requires_grad))


def unreduced(spec: OpSpec, sample: Sample) -> Sample:
    """`sample`, reduced as little as the operation can."""
    if not spec.reductions:
        return sample
    return Sample(sample.label, sample.args, {**sample.kwargs, "reduction": spec.reductions[0]})


def tensors_of(sample: Sample) -> list[Tensor]:
    return [x for x in (*sample.args, *sample.kwargs.values()) if isinstance(x, Tensor)]


def leaves_of(sample: Sample) -> list[Tensor]:
    return [x for x in tensors_of(sample) if x.requires_grad]


def cotangent_for(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output.dtype)


def evaluate(function: Callable[..., Tensor], sample: Sample) -> Results:
    output = function(*sample.args, **sample.kwargs)
    return output.detach(), *torch.autograd.grad(output, leaves_of(sample), cotangent_for(output))


def truth_and_eager(spec: OpSpec, sample: Sample) -> tuple[Results, Results]:
    """What the reference makes of the sample in float64, and in the sample's dtype."""
    return evaluate(spec.reference, as_double(sample)), evaluate(spec.reference, sample)


def natural_sizes(spec: OpSpec, sample: Sample, truth: Results) -> list[tuple[Tensor | float, float]]:
    """(weight, size) of the value and each gradient: weight * result would have a norm of about `size`, were it not
    for cancellation. The gradient of a row is inverse to its length."""
    magnitude, cotangent = spec.magnitude(sample), cotangent_for(truth[0])
    sizes: list[tuple[Tensor | float, float]] = [(1.0, magnitude * truth[0].numel() ** 0.5 + truth[0].norm().item())]
    for leaf, gradient in zip(leaves_of(sample), truth[1:], strict=True):
        x = leaf.detach().double()
        weight = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) if x.dim() >= 2 else x.abs()
        size = torch.where(gradient.isfinite(), gradient * weight, 0).norm()
        sizes.append((weight, magnitude * cotangent.norm().item() + size.item()))
    return sizes


def weighted_error(result: Tensor, truth: Tensor, weight: Tensor | float) -> float:
    return torch.where(truth.isfinite(), (result.double() - truth) * weight, 0).norm().item()


def assert_as_accurate_as_eager(
    spec: OpSpec, sample: Sample, results: Results, yardstick: tuple[Results, Results] | None = None
) -> None:
    """Errors against float64 are at most twice those of eager PyTorch, or a few units in the last place before sums:
    four, or as many as rounding leaves in a plain sum over the rows, about the root of their number."""
    dtype = sample.args[0].dtype
    truth, eager = yardstick or truth_and_eager(spec, sample)
    # In float64 the truth is as rough as the rest: a similarity's rounding error is an exponential's relative error.
    units = max(4, max(len(x) for x in tensors_of(sample) if x.dim()) ** 0.5) * torch.finfo(dtype).eps
    units *= 1 + spec.magnitude(sample) if dtype == torch.float64 else 1
    names = ["value", *(f"gradient {i}" for i in range(len(truth) - 1))]
    sizes = natural_sizes(spec, sample, truth)
    for name, result, true, rough, (weight, size) in zip(names, results, truth, eager, sizes, strict=True):
        assert result.shape == true.shape, name
        settled = true.isfinite()  # where the truth is infinite, so is the result
        torch.testing.assert_close(result[~settled].double(), true[~settled])
        error, eager_error = (weighted_error(x, true, weight) for x in (result, rough))
        bound = 2 * eager_error + units * size
        assert error <= bound, f"{name}: error {error:.3g}, eager's {eager_error:.3g}, bound {bound:.3g}"
