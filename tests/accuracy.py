"""What a test calls, and how results are compared; the rest of it is in `fastssl.reference.accuracy`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fastssl
from fastssl.reference import OpSpec, Sample
from fastssl.reference.accuracy import (
    Results,
    as_double,
    assert_as_accurate_as_eager,
    cotangent_for,
    dtype_of,
    evaluate,
    gradients,
    leaves_of,
    map_tensors,
    natural_sizes,
    on_cpu,
    returning,
    tensors_of,
    truth_and_eager,
    values,
    weighted_error,
)

__all__ = [
    "Results",
    "as_double",
    "assert_as_accurate_as_eager",
    "cotangent_for",
    "device_of",
    "dtype_of",
    "evaluate",
    "gradients",
    "leaves_of",
    "map_tensors",
    "moved",
    "natural_sizes",
    "on_cpu",
    "public",
    "reference",
    "relative_error",
    "same_bits",
    "tensors_of",
    "truth_and_eager",
    "unreduced",
    "values",
    "weighted_error",
    "with_gradients",
    "with_tensors",
    "worst_error",
]


def public(spec: OpSpec, compiled: Callable[..., Any] = lambda function: function) -> Callable[..., Any]:
    """`fastssl.functional.<name>`, compiled; if it writes arguments in place, it writes copies and returns them."""
    return returning(spec, compiled(getattr(fastssl.functional, spec.name)))


def reference(spec: OpSpec) -> Callable[..., Any]:
    return returning(spec, spec.reference)


def moved(x: Any, device: str) -> Any:
    """Tensors in tuples, lists and dicts, to that device, but for those on "meta"."""
    if isinstance(x, dict):
        return {key: moved(value, device) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(moved(y, device) for y in x)
    if not isinstance(x, Tensor) or x.is_meta or device == "cpu":
        return x
    return x.detach().to(device).requires_grad_(x.requires_grad)


def device_of(sample: Sample) -> torch.device:
    """Of its tensors, but for some on the CPU; the CPU, where it has none."""
    devices = [x.device for x in tensors_of(sample)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def unreduced(spec: OpSpec, sample: Sample) -> Sample:
    """`sample`, reduced as little as the operation can."""
    if not spec.reductions:
        return sample
    return Sample(sample.label, sample.args, {**sample.kwargs, "reduction": spec.reductions[0]}, sample.tags)


def with_tensors(args: Iterable[Any]) -> tuple[Any, ...]:
    """Arguments of an operation of `torch.ops.fastssl`, whose numbers are tensors."""
    return tuple(torch.tensor(x, dtype=torch.float64, device="cpu") if isinstance(x, float) else x for x in args)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Results:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output.sum(), leaves)


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def worst_error(results: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    return max((x.double() - y).abs().max().item() for x, y in zip(results, truths, strict=True) if y.numel())


def same_bits(x: Tensor, y: Tensor) -> bool:
    """-0 is not 0, and any NaN is NaN."""
    signs = (z.signbit() & ~z.isnan() for z in (x, y))
    return torch.equal(*(z.nan_to_num(7, math.inf, -math.inf) for z in (x, y))) and torch.equal(*signs)
