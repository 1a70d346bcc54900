"""What every operation must do, on every sample that its family gives: `fastssl.reference.OPS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.ops import _portable
from fastssl.ops._op import Op
from fastssl.reference import OPS, Sample
from tests.accuracy import (
    Results,
    as_double,
    assert_as_accurate_as_eager,
    cotangent_for,
    evaluate,
    leaves_of,
    map_tensors,
    natural_sizes,
    public,
    tensors_of,
    truth_and_eager,
    unreduced,
    weighted_error,
)

POISONED = ("5x64", "33x16", "not normalized", "5x7x64", "scale=14.0", "labels", "queue", "paired and batch", "views")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("1x1", "1x9", "2x3", "transposed", "sliced", "expanded", "empty", "learnable")  # that differ to a tracer
OPTIONS = ("queue and batch", "paired and batch", "labels, smoothed", "views", "weighted")  # and so do these
PATCHES = ("2x3x8x12", "3x3x15x14", "2x3x5, mse", "3x7x129, mse")
WITHOUT_PRODUCTS = ("variance_loss", "masked_patch_loss", "masked_feature_loss")  # whose precision would matter


@functools.cache
def _samples(name: str, dtype: torch.dtype) -> dict[str, Sample]:
    return {sample.label: sample for sample in OPS[name].samples(dtype, "cpu")}


def _cases(
    *dtypes: torch.dtype,
    where: Callable[[Sample], bool] = lambda sample: True,
    unsanitized: tuple[torch.dtype, ...] = (),
) -> Any:
    """Parametrises a test over (spec, sample)."""
    return pytest.mark.parametrize(
        "spec, sample",
        [
            pytest.param(
                spec,
                sample,
                id=f"{name}-{str(dtype).removeprefix('torch.')}-{label.replace(' ', '_')}",
                marks=[pytest.mark.unsanitized] * (dtype in unsanitized),
            )
            for name, spec in OPS.items()
            for dtype in dtypes
            if dtype in spec.dtypes
            for label, sample in _samples(name, dtype).items()
            if where(sample)
        ],
    )


def _is_kind(sample: Sample) -> bool:
    return sample.label.startswith(KINDS) or sample.label in OPTIONS


def _is_small(sample: Sample) -> bool:
    return sum(x.numel() for x in tensors_of(sample)) <= 100


@functools.cache
def _truth_and_eager(name: str, label: str, dtype: torch.dtype) -> tuple[Results, Results]:
    return truth_and_eager(OPS[name], unreduced(OPS[name], _samples(name, dtype)[label]))


@pytest.mark.sanitized
@_cases(*FLOATS, torch.float64, unsanitized=(torch.float16, torch.float64))
def test_value_and_gradients(spec, sample, kernels):
    yardstick = _truth_and_eager(spec.name, sample.label, sample.args[0].dtype)
    sample = unreduced(spec, sample)
    assert_as_accurate_as_eager(spec, sample, evaluate(public(spec), sample), yardstick)


@_cases(torch.float32)
def test_portable_blocks(spec, sample, monkeypatch):
    """Blocks of few rows, the last of them with fewer, in place of one block for all."""
    if spec.magnitude(sample) > 1000:
        pytest.skip("S_ij and S_ji, of different blocks, are rounded differently: too much for exponentials")
    monkeypatch.setattr(_portable, "_BLOCK_ELEMENTS", 1000)
    yardstick = _truth_and_eager(spec.name, sample.label, torch.float32)
    sample = unreduced(spec, sample)
    with fastssl.use_backend("portable"):
        assert_as_accurate_as_eager(spec, sample, evaluate(public(spec), sample), yardstick)


@_cases(torch.float32)
def test_backends_agree_on_shape_and_dtype(spec, sample, backend):
    with fastssl.use_backend("reference"):
        expected = public(spec)(*sample.args, **sample.kwargs)
    result = public(spec)(*sample.args, **sample.kwargs)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * max(spec.magnitude(sample), 1))


@_cases(torch.float32)
def test_medium_precision(spec, sample, kernels, medium):
    """As accurate as eager bfloat16 at least, and float32 in all but the products."""
    sample = unreduced(spec, sample)
    results = evaluate(public(spec), sample)
    assert all(r.dtype == torch.float32 for r in results)
    if sample.label not in _samples(spec.name, torch.bfloat16):
        return
    truth = evaluate(spec.reference, as_double(sample))
    rough_truth, rough = _truth_and_eager(spec.name, sample.label, torch.bfloat16)
    for result, true, x, y, (weight, size) in zip(
        results, truth, rough, rough_truth, natural_sizes(spec, sample, truth), strict=True
    ):
        error, eager_error = (weighted_error(*pair, weight) for pair in ((result, true), (x, y)))
        assert error <= eager_error + torch.finfo(torch.bfloat16).eps * size


@_cases(torch.float32)
def test_autocast_multiplies_in_its_dtype(spec, sample, backend):
    """As "medium" does, whose products are bfloat16 too."""
    with torch.autocast("cpu", torch.bfloat16):
        output = public(spec)(*sample.args, **sample.kwargs)
    results = output, *torch.autograd.grad(output, leaves_of(sample), cotangent_for(output))
    torch.set_float32_matmul_precision("medium")
    expected = evaluate(public(spec), sample)
    for result, right, (weight, size) in zip(
        results, expected, natural_sizes(spec, sample, tuple(x.double() for x in expected)), strict=True
    ):
        assert result.dtype == torch.float32
        assert weighted_error(result, right, weight) <= 4 * torch.finfo(torch.float32).eps * size


@_cases(torch.bfloat16, where=_is_kind)
def test_autocast_returns_float32(spec, sample, backend):
    with torch.autocast("cpu", torch.bfloat16):
        output = public(spec)(*sample.args, **sample.kwargs)
    assert output.dtype == torch.float32
    for leaf, gradient in zip(leaves_of(sample), torch.autograd.grad(output.sum(), leaves_of(sample)), strict=True):
        assert gradient.dtype == leaf.dtype


@_cases(torch.float64, where=_is_small)
def test_derivatives_are_numerically_right(spec, sample, monkeypatch):
    monkeypatch.setattr(_portable, "_BLOCK_ELEMENTS", 30)  # the derivatives of a sum over blocks
    sample = as_double(sample)
    leaves = leaves_of(sample)

    def function(*values: Tensor) -> Tensor:
        replaced = dict(zip(map(id, leaves), values, strict=True))
        sample_ = Sample(
            sample.label,
            tuple(replaced.get(id(x), x) for x in sample.args),
            {k: replaced.get(id(x), x) for k, x in sample.kwargs.items()},
        )
        return public(spec)(*sample_.args, **sample_.kwargs)

    if function(*leaves).isfinite().all():
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@_cases(torch.float32, where=_is_kind)
def test_torch_func(spec, sample, backend):
    """torch.func.grad, and nested: a product with the Hessian, against the reference's."""
    argnums = tuple(i for i, x in enumerate(sample.args) if isinstance(x, Tensor) and x.requires_grad)
    sample = map_tensors(sample, torch.Tensor.detach)

    def gradient(function: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *a: function(*a, **sample.kwargs).sum(), argnums)(*args)

    def product(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        def along(*a: Tensor) -> Tensor:
            return sum((g * cotangent_for(g)).sum() for g in gradient(function, *a))

        return torch.func.grad(along, argnums)(*args)

    double = as_double(sample)
    magnitude = max(1.0, spec.magnitude(sample))
    reference = functools.partial(_with_kwargs_of, spec.reference, double)
    for result, expected in zip(
        (*gradient(public(spec), *sample.args), *product(public(spec), sample.args)),
        (*gradient(reference, *double.args), *product(reference, double.args)),
        strict=True,
    ):
        torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-4 * magnitude)


def _with_kwargs_of(function: Callable[..., Tensor], sample: Sample, *args: Tensor, **_: Any) -> Tensor:
    return function(*args, **sample.kwargs)


@_cases(torch.float32, torch.float64, where=lambda s: _is_kind(s) or s.label.startswith(("scale", "zero", "excludes")))
def test_opcheck(spec, sample):
    torch.library.opcheck(getattr(torch.ops.fastssl, spec.op).default, spec.op_args(sample))


@_cases(torch.bfloat16, where=_is_kind)
def test_opcheck_portable(spec, sample):
    torch.library.opcheck(getattr(torch.ops.fastssl, f"{spec.op}_portable").default, spec.op_args(sample))


def _assert_compiles(spec: Any, sample: Sample, exact: bool = True, **options: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(public(spec), fullgraph=True, **options)
    results, expected = evaluate(compiled, sample), evaluate(public(spec), sample)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, **({"rtol": 0, "atol": 0} if exact else {}), equal_nan=True)


@_cases(torch.float32, where=_is_kind)
def test_compile(spec, sample):
    _assert_compiles(spec, sample, backend="aot_eager")


@_cases(torch.float32, where=lambda sample: sample.label in ("5x64", "5x7x64"))
def test_compile_inductor(spec, sample):
    _assert_compiles(spec, sample, exact=False)


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_compile_dynamic_shapes(spec):
    torch._dynamo.reset()
    compiled = torch.compile(public(spec), fullgraph=True, backend="aot_eager", dynamic=True)
    shapes = ("2x3", "5x64", "32x128", "33x16", "5x7x64", "32x64x128", "64x65x127", *PATCHES)
    samples = [sample for label, sample in _samples(spec.name, torch.float32).items() if label in shapes]
    assert len(samples) > 1
    for sample in samples:
        for result, expected in zip(evaluate(compiled, sample), evaluate(public(spec), sample), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_compile_follows_the_precision(spec):
    sample = _samples(spec.name, torch.float32)["transposed"]
    torch._dynamo.reset()
    compiled = torch.compile(public(spec), fullgraph=True, backend="aot_eager")
    outputs = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        outputs[precision] = compiled(*sample.args, **sample.kwargs)
        assert torch.equal(outputs[precision], public(spec)(*sample.args, **sample.kwargs))
    assert torch.equal(outputs["highest"], outputs["medium"]) == (spec.name in WITHOUT_PRODUCTS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@_cases(torch.float32, where=lambda s: s.label in POISONED)
def test_nan_and_inf(spec, sample, poison, backend):
    """NaN wherever the reference has NaN, and a finite value wherever the reference has one."""
    rows = [i for i, x in enumerate(sample.args) if isinstance(x, Tensor) and x.is_floating_point()]
    for argument in rows:
        poisoned = unreduced(spec, map_tensors(sample, lambda x: x.detach().clone()))
        poisoned.args[argument][3, ..., 2] = poison
        poisoned = map_tensors(poisoned, lambda x: x.requires_grad_())
        results, expected = evaluate(public(spec), poisoned), evaluate(spec.reference, poisoned)
        for result, right in zip(results, expected, strict=True):
            assert result[right.isnan()].isnan().all()
        assert results[0][expected[0].isfinite()].isfinite().all()
        assert not results[0].isfinite().all()


@_cases(torch.float32, torch.bfloat16)
def test_reads_no_uninitialised_memory(spec, sample, kernels):
    """New tensors come filled with NaN, here, in Python and in C++."""
    expected = evaluate(public(spec), sample)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(4).isnan().all()
    for result, right in zip(evaluate(public(spec), sample), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "spec, bad",
    [pytest.param(s, b, id=f"{s.name}-{b.label.replace(' ', '_')}") for s in OPS.values() for b in s.bad_inputs()],
)
def test_bad_inputs(spec, bad, monkeypatch):
    def run(self: Op, *args: Any) -> Any:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(Op, "__call__", run)
    with pytest.raises(bad.error, match=bad.match):
        public(spec)(*bad.args, **bad.kwargs)


@_cases(torch.float32, torch.bfloat16)
def test_same_bits_in_every_run(spec, sample, backend):
    runs = {threads: [] for threads in (1, 2)}
    for threads, results in runs.items():
        torch.set_num_threads(threads)
        results += [evaluate(public(spec), sample) for _ in range(2)]
    for first, second in runs.values():
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    yardstick = _truth_and_eager(spec.name, sample.label, sample.args[0].dtype)
    sample = unreduced(spec, sample)
    assert_as_accurate_as_eager(spec, sample, evaluate(public(spec), sample), yardstick)


@_cases(*FLOATS, where=lambda s: s.label in ("65x129", "129x64", "64x127", "64x65x127", "129x257x16", "300x40"))
@pytest.mark.sanitized
def test_misaligned_data(spec, sample, backend):
    """One element off any alignment: the same bits."""

    def misaligned(x: Tensor) -> Tensor:
        storage = x.new_empty(x.numel() + 1)
        return storage[1:].view(x.shape).copy_(x.detach()).requires_grad_(x.requires_grad)

    for result, right in zip(
        evaluate(public(spec), map_tensors(sample, misaligned)), evaluate(public(spec), sample), strict=True
    ):
        torch.testing.assert_close(result, right, rtol=0, atol=0)


@_cases(torch.float32)
def test_strided_grad_output(spec, sample, backend):
    """The gradient that `sum` sends back has a stride of 0."""
    sample = unreduced(spec, sample)
    output = public(spec)(*sample.args, **sample.kwargs)
    leaves = leaves_of(sample)
    expanded = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    contiguous = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    sliced = torch.autograd.grad(
        output, leaves, torch.ones(2 * output.numel(), dtype=output.dtype)[::2].view(output.shape)
    )
    for a, b, c in zip(expanded, contiguous, sliced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(c, b, rtol=0, atol=0)


@_cases(torch.float32)
def test_leaves_its_inputs_alone(spec, sample, backend):
    before = map_tensors(sample, lambda x: x.detach().clone())
    evaluate(public(spec), sample)
    for x, y in zip((*sample.args, *sample.kwargs.values()), (*before.args, *before.kwargs.values()), strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
