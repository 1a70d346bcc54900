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
from torch._subclasses import FakeTensorMode

import fastssl
from fastssl.functional import (
    dcl,
    ema_update_,
    gather_tokens,
    info_nce,
    nt_xent,
    patch_embed,
    random_masking,
    random_masking_ids,
    restore_tokens,
    scatter_tokens,
    siglip_loss,
    similarity_logsumexp,
    topk_similarity,
    uniformity,
    vicreg,
)
from fastssl.reference import OPS, Sample
from tests.accuracy import (
    as_double,
    cotangent_for,
    evaluate,
    leaves_of,
    map_tensors,
    natural_sizes,
    public,
    tensors_of,
    weighted_error,
)

IDS = torch.arange(8)[None]
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
        with fastssl.use_backend("reference"):
            rough = public(spec)(*mixed.args, **mixed.kwargs)
    expected = torch.bfloat16 if spec.autocast == "autocast" else torch.float32
    assert rough.dtype == outputs[0].dtype == expected and torch.equal(*outputs)
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
        nt_xent(z, z.double())


FLOATS = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name in OPS
    if any(map(leaves_of, _samples(name)))
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
    if any(map(leaves_of, _samples(name)))
    for argument, parameter in inspect.signature(getattr(fastssl.functional, name)).parameters.items()
    if parameter.annotation == "float | Tensor"
]


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("name, argument", SCALARS)
def test_tensors_of_one_element_are_scalars(name, argument, shape):
    """Their gradients, where they have any, are of their own shape, on every backend."""
    differentiable = argument != "teacher_temperature"
    for backend in ("auto", "portable", "reference"):
        with fastssl.use_backend(backend):
            plain, shaped = (torch.full(s, 0.25, requires_grad=differentiable) for s in ((), shape))
            values = [evaluate(public(OPS[name]), _call_with(name, argument, scalar))[0] for scalar in (plain, shaped)]
            assert torch.equal(*values)
            if not differentiable:
                continue
            sample = _call_with(name, argument, shaped)
            public(OPS[name])(**sample.kwargs).sum().backward()
            sample = _call_with(name, argument, plain)
            public(OPS[name])(**sample.kwargs).sum().backward()
            assert shaped.grad.shape == shape and torch.equal(shaped.grad.reshape(()), plain.grad)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda z: nt_xent(z, z, temperature=5e-324), ValueError, "1 / temperature must be finite in torch.float32"),
        (lambda z: nt_xent(z, z, temperature=1j), TypeError, "temperature must be a number .* got complex"),
        (lambda z: nt_xent(z, z, temperature=torch.tensor(1j)), ValueError, "temperature .*real.*complex64"),
        (lambda z: nt_xent(z, z, temperature=torch.ones(1).to_sparse()), ValueError, "temperature .* dense tensor"),
        (lambda z: nt_xent(z, z, temperature=torch.ones((), device="meta")), ValueError, "temperature and .* meta"),
        (lambda z: siglip_loss(z, z, 1e300), ValueError, r"logit_scale must be finite in torch.float32, got 1e\+300"),
        (lambda z: siglip_loss(z, z, 1.0, 10**400), ValueError, "logit_bias must be finite, got inf"),
        (lambda z: uniformity(z, t=3e38), ValueError, r"2 t must be finite in torch.float32, got 3e\+38"),
        (lambda z: nt_xent(z, z, normalize=1), TypeError, "normalize must be True or False, got 1"),
        (lambda z: vicreg(z, z, unbiased=2), TypeError, "unbiased must be True or False, got 2"),
        (lambda z: info_nce(z, z, in_batch_negatives="yes"), TypeError, "in_batch_negatives must be True or False"),
        (lambda z: nt_xent(z, z, reduction=["mean"]), ValueError, "reduction must be 'none', 'mean' or 'sum'"),
        (lambda z: dcl(z, z, weight_fn=3), TypeError, "weight_fn must be a function or None, got int"),
        (lambda z: topk_similarity(z, z, True), TypeError, "k must be an integer, got bool"),
        (lambda z: topk_similarity(z, z, 10**30), ValueError, r"k must be below 2\^63"),
        (lambda z: similarity_logsumexp(z, z, offset=z[:, 0] * 1j), ValueError, "offset must have dtype .*complex64"),
        (lambda z: random_masking_ids(2, 8, 0.5, device=torch.float32), TypeError, "device must be .*float32"),
        (lambda z: random_masking_ids(2, 8, 0.5, device="nowhere"), ValueError, "device must be .*got 'nowhere'"),
        (lambda z: random_masking_ids(2, 8, 0.5, generator=0), TypeError, "generator must be .*got int"),
        (lambda z: siglip_loss(z, z, 10**30, 10**39), ValueError, "logit_bias must be finite in torch.float32"),
        (lambda z: scatter_tokens(z[None], IDS, 8, 1e300), ValueError, r"fill must be finite in torch.float32"),
        (lambda z: random_masking_ids(2, 8, 0.5, device=10**30), ValueError, "device must be"),
        (lambda z: dcl(z, z, weight_fn=lambda x, y: 1.0), TypeError, "weight_fn must return a Tensor, got float"),
        (lambda z: dcl(z, z, weight_fn=lambda x, y: x), ValueError, r"weight_fn must return .*\(8,\), got .*\(8, 16\)"),
        (lambda z: vicreg(z, z, mu_param=1e39), ValueError, r"mu_param must be finite in torch.float32, got 1e\+39"),
        (lambda z: ema_update_([z], [z + 1], torch.tensor(1.5)), ValueError, "momentum must be from 0 to 1, got 1.5"),
        (lambda z: nt_xent(z, z, temperature=torch.tensor(True)), ValueError, "temperature must be .*, got torch.bool"),
        (lambda z: scatter_tokens(z[None], IDS, 2**62), ValueError, "length must make no tensor of 2.63 bytes"),
        (lambda z: fastssl.use_backend([]).__enter__(), ValueError, r"name must be one of .*, got \[\]"),
        (lambda z: ema_update_(z, z, 0.9), TypeError, "targets must be a list of tensors, got Tensor"),
        (lambda z: ema_update_([z], None, 0.9), TypeError, "sources must be a list of tensors, got NoneType"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message, backend):
    with pytest.raises(error, match=message):
        call(torch.randn(8, 16))


@pytest.mark.parametrize("layout", ["sparse", "csr", "mkldnn", "nested", "jagged", "fake"])
@pytest.mark.parametrize("name", [name for name in OPS if any(map(_operands, _samples(name)))])
def test_layouts_are_named(name, layout):
    """In place of each floating-point operand in turn."""
    sample = next(_samples(name))
    for place in _operands(sample):
        x = _at(sample, place).detach()
        bad = {
            "sparse": x.to_sparse,
            "csr": lambda x=x: x.flatten(0, -2).to_sparse_csr(),
            "mkldnn": x.to_mkldnn,
            "nested": lambda x=x: torch.nested.nested_tensor([x, x]),
            "jagged": lambda x=x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
            "fake": lambda x=x: FakeTensorMode().from_tensor(x),
        }[layout]()
        args = [bad if i == place else a for i, a in enumerate(sample.args)]
        kwargs = {key: bad if key == place else value for key, value in sample.kwargs.items()}
        if layout == "fake" and len(tensors_of(sample)) == 1:
            continue
        with pytest.raises(ValueError, match="both be meta, fake or real" if layout == "fake" else "must be a dense"):
            public(OPS[name])(*args, **kwargs)


def test_a_fake_pair_is_taken():
    with FakeTensorMode():
        loss = nt_xent(torch.randn(8, 16), torch.randn(8, 16))
    assert loss.shape == ()


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
@pytest.mark.parametrize("wrong", [-1, 8])
def test_ids_out_of_range(chosen, wrong):
    tokens, ids = torch.randn(1, 8, 4), torch.where(IDS == 3, wrong, IDS)
    images, weight = torch.randn(1, 3, 4, 8), torch.randn(5, 3, 2, 2)
    calls = {
        "ids must be from 0 to below 8": lambda: gather_tokens(tokens, ids),
        "ids must be from 0 to below 8, ": lambda: scatter_tokens(tokens, ids, 8),
        "ids_keep must be from 0 to below 8": lambda: patch_embed(images, weight, None, ids),
    }
    if wrong < 0:
        calls["ids_restore must not be negative"] = lambda: restore_tokens(tokens[:, :4], ids, tokens[0, 0])
    with fastssl.use_backend(chosen):
        for message, call in calls.items():
            with pytest.raises(IndexError, match=f"{message}.*got {wrong}"):
                call()


def test_fake_tensors_are_taken_outside_of_their_mode():
    z = FakeTensorMode().from_tensor(torch.randn(8, 16))
    assert nt_xent(z, z).shape == uniformity(z).shape == vicreg(z, z).shape == ()
    assert random_masking(z[None], 0.5)[0].shape == (1, 4, 16)
    ema_update_([z], [z + 1], 0.9)
