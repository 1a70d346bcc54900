"""What holds for arguments of one kind wherever they occur: operands, numbers, flags."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastssl
from fastssl.reference import OPS, Sample
from tests.accuracy import (
    as_double,
    cotangent_for,
    evaluate,
    leaves_of,
    map_tensors,
    natural_sizes,
    public,
    weighted_error,
)

KINDS = ("5x64", "33x16", "5x7x64", "labels", "queue", "paired and batch", "symmetric", "2x3x8x12", "2x3x5, mse")


def _samples(name: str) -> Iterator[Sample]:
    return (sample for sample in OPS[name].samples(torch.float32, "cpu") if sample.label in KINDS)


def _operands(sample: Sample) -> list[str | int]:
    """Places of the arguments that are floating-point tensors of two dimensions or more."""
    places = [*enumerate(sample.args), *sample.kwargs.items()]
    return [place for place, x in places if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]


def _with_operand(sample: Sample, place: str | int, dtype: torch.dtype) -> Sample:
    """`sample`, that operand and no other of another dtype, and all of them fit to be differentiated again."""

    def change(key: str | int, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(dtype if key == place else x.dtype)
        return x.requires_grad_(old.requires_grad) if (old := _at(sample, key)) is not None else x

    args = tuple(change(i, x) for i, x in enumerate(sample.args))
    return Sample(sample.label, args, {key: change(key, x) for key, x in sample.kwargs.items()})


def _at(sample: Sample, place: str | int) -> Any:
    return sample.args[place] if isinstance(place, int) else sample.kwargs[place]


def _mixed() -> list[Any]:
    return [
        pytest.param(name, sample, place, dtype, id=f"{name}-{sample.label}-{place}-{dtype}".replace(" ", "_"))
        for name in OPS
        for sample in _samples(name)
        if len(_operands(sample)) > 1
        for place in _operands(sample)
        for dtype in (torch.bfloat16, torch.float16)
    ]


@pytest.mark.parametrize("name, sample, place, dtype", _mixed())
def test_unlike_dtypes_under_autocast(name, sample, place, dtype, backend):
    """The numbers of the same operands, all of them float32; and gradients in each one's own dtype."""
    spec = OPS[name]
    mixed = _with_operand(sample, place, dtype)
    alike = map_tensors(mixed, lambda x: x.detach().float().requires_grad_(x.requires_grad))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [public(spec)(*s.args, **s.kwargs) for s in (mixed, alike)]
    assert outputs[0].dtype == torch.float32 and torch.equal(*outputs)
    cotangent = cotangent_for(outputs[0])
    gradients = [
        torch.autograd.grad(out, leaves_of(s), cotangent) for out, s in zip(outputs, (mixed, alike), strict=True)
    ]
    for leaf, gradient, expected in zip(leaves_of(mixed), *gradients, strict=True):
        assert gradient.dtype == leaf.dtype and torch.equal(gradient, expected.to(leaf.dtype))
    truth = evaluate(spec.reference, as_double(mixed))
    for result, true, (weight, size) in zip(
        (outputs[0].detach(), *gradients[0]), truth, natural_sizes(spec, mixed, truth), strict=True
    ):
        assert weighted_error(result, true, weight) <= 2 * torch.finfo(torch.bfloat16).eps * size


@pytest.mark.parametrize("name, sample, place, dtype", _mixed()[::2])
def test_unlike_dtypes_without_autocast(name, sample, place, dtype):
    if name in ("masked_patch_loss", "masked_feature_loss"):
        pytest.skip("takes targets of any dtype")
    sample = _with_operand(sample, place, dtype)
    with pytest.raises(ValueError, match="must have the same dtype, got torch.* and torch"):
        public(OPS[name])(*sample.args, **sample.kwargs)


def test_float64_is_not_mixed_under_autocast():
    z = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="z1 and z2 must have the same dtype"):
        fastssl.functional.nt_xent(z, z.double())


SPECIALISED = ("barlow_twins", "vicreg", "variance_loss", "masked_feature_loss")  # operations that take numbers
FLOATS = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name in OPS
    if name not in SPECIALISED
    for argument, parameter in inspect.signature(getattr(fastssl.functional, name)).parameters.items()
    if parameter.annotation in ("float", "float | Tensor")
]


def _call_with(name: str, argument: str, value: float) -> Sample:
    """The first sample of two dimensions that is differentiated, with another value of that argument."""
    sample = next(s for s in _samples(name) if len(leaves_of(s)) > 0)
    arguments = inspect.signature(public(OPS[name])).bind(*sample.args, **sample.kwargs).arguments
    return Sample(sample.label, (), {**arguments, argument: value})


@pytest.mark.parametrize("name, argument", FLOATS)
def test_a_number_that_varies_is_compiled_twice(name, argument):
    """Once for the first number, once for all others, and what is compiled knows each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(public(OPS[name]), fullgraph=True, backend=counter)
    for i in range(20):
        sample = _call_with(name, argument, 0.1 + i / 100)
        for result, expected in zip(evaluate(compiled, sample), evaluate(public(OPS[name]), sample), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name, argument", FLOATS)
@pytest.mark.parametrize("scalar", [np.float32(0.25), np.float64(0.25), np.float16(0.25), np.array(0.25)], ids=str)
def test_numbers_of_numpy(name, argument, scalar, backend):
    function = public(OPS[name])
    for result, expected in zip(
        evaluate(function, _call_with(name, argument, scalar)),
        evaluate(function, _call_with(name, argument, 0.25)),
        strict=True,
    ):
        assert torch.equal(result, expected)


SCALARS = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name in OPS
    for argument, parameter in inspect.signature(getattr(fastssl.functional, name)).parameters.items()
    if parameter.annotation == "float | Tensor"
]


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("name, argument", SCALARS)
def test_tensors_of_one_element_are_scalars(name, argument, shape):
    """Their gradients are of their own shape, on every backend."""
    for backend in ("auto", "portable", "reference"):
        with fastssl.use_backend(backend):
            plain, shaped = (torch.full(s, 0.25, requires_grad=True) for s in ((), shape))
            values = [evaluate(public(OPS[name]), _call_with(name, argument, scalar))[0] for scalar in (plain, shaped)]
            assert torch.equal(*values)
            sample = _call_with(name, argument, shaped)
            public(OPS[name])(**sample.kwargs).sum().backward()
            sample = _call_with(name, argument, plain)
            public(OPS[name])(**sample.kwargs).sum().backward()
            assert shaped.grad.shape == shape and torch.equal(shaped.grad.reshape(()), plain.grad)
