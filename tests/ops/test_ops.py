"""What every operation must do, on every sample that its family gives: `fastssl.reference.OPS`."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastssl
from fastssl.ops import _portable
from fastssl.ops._op import Op
from fastssl.reference import OPS, BadInput, OpSpec, Sample
from fastssl.reference.samples import COMPILED, EDGE, POISONED, RAGGED, SHAPES, TRACED
from tests.accuracy import (
    Results,
    as_double,
    assert_as_accurate_as_eager,
    cotangent_for,
    device_of,
    evaluate,
    gradients,
    leaves_of,
    map_tensors,
    moved,
    natural_sizes,
    on_cpu,
    public,
    reference,
    tensors_of,
    truth_and_eager,
    unreduced,
    values,
    weighted_error,
)
from tests.devices import DEVICES, device_param, on_every_device
from tests.inputs import FLOATS
from tests.recorder import ATOMIC, AtomicSums, recorded_calls


@functools.cache
def _samples(name: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Sample]:
    return {sample.label: sample for sample in OPS[name].samples(dtype, device)}


def _cases(
    *dtypes: torch.dtype,
    where: Callable[[OpSpec, Sample], bool] = lambda spec, sample: True,
    unsanitized: tuple[torch.dtype, ...] = (),
) -> Any:
    """Parametrises a test over (spec, sample), on every device."""
    return pytest.mark.parametrize(
        "spec, sample",
        [
            device_param(
                device,
                spec,
                sample,
                id=f"{name}-{str(dtype).removeprefix('torch.')}-{label.replace(' ', '_')}",
                marks=[pytest.mark.unsanitized] * (dtype in unsanitized),
            )
            for device in DEVICES
            for name, spec in OPS.items()
            for dtype in dtypes
            if dtype in spec.dtypes
            for label, sample in _samples(name, dtype, device).items()
            if where(spec, sample)
        ],
    )


def _tagged(*tags: str) -> Callable[[OpSpec, Sample], bool]:
    return lambda spec, sample: not sample.tags.isdisjoint(tags)


_few = _tagged(TRACED, EDGE, COMPILED)


def _settled(spec: OpSpec, sample: Sample) -> bool:
    """Whether the arguments settle the outputs."""
    return spec.check is None


def _differentiable(spec: OpSpec, sample: Sample) -> bool:
    return _settled(spec, sample) and bool(leaves_of(sample))


def _small(spec: OpSpec, sample: Sample) -> bool:
    return _differentiable(spec, sample) and sum(x.numel() for x in tensors_of(sample)) <= 100


def _loss(spec: OpSpec, sample: Sample) -> bool:
    return spec.autocast == "float32" and _settled(spec, sample)


def test_every_function_has_a_specification():
    assert set(OPS) == set(fastssl.functional.__all__)


@functools.cache
def _truth_and_eager(spec: OpSpec, sample: Sample) -> tuple[Results, Results]:
    return truth_and_eager(spec, unreduced(spec, on_cpu(sample)))


@pytest.mark.sanitized
@_cases(*FLOATS, torch.float64, unsanitized=(torch.float16, torch.float64))
def test_value_and_gradients(spec, sample, kernels):
    """New tensors come filled with NaN, in Python and in C++: what is not written, or read before, is noticed."""
    yardstick = _truth_and_eager(spec, sample)
    sample = unreduced(spec, sample)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(4).isnan().all()
    assert_as_accurate_as_eager(spec, sample, evaluate(public(spec), sample), yardstick)


@_cases(torch.float32, torch.bfloat16, where=lambda spec, sample: spec.reductions and _few(spec, sample))
def test_reductions(spec, sample, backend):
    """Those that sum up, and with them what is computed only where the gradient is one number."""
    for reduction in spec.reductions[1:]:
        reduced = Sample(sample.label, sample.args, {**sample.kwargs, "reduction": reduction}, sample.tags)
        results, yardstick = evaluate(public(spec), reduced), truth_and_eager(spec, reduced)
        if yardstick[0][0].isnan():  # the mean of nothing
            assert results[0].isnan()
        else:
            assert_as_accurate_as_eager(spec, reduced, results, yardstick)


@_cases(torch.float32)
def test_portable_blocks(spec, sample, monkeypatch):
    """Blocks of few rows, the last of them with fewer, in place of one block for all."""
    if spec.magnitude(sample) > 1000:
        pytest.skip("S_ij and S_ji, of different blocks, are rounded differently: too much for exponentials")
    monkeypatch.setattr(_portable, "_BLOCK_ELEMENTS", 1000)
    yardstick = _truth_and_eager(spec, sample)
    sample = unreduced(spec, sample)
    with fastssl.use_backend("portable"):
        assert_as_accurate_as_eager(spec, sample, evaluate(public(spec), sample), yardstick)


@_cases(torch.float32)
def test_backends_agree_on_shape_and_dtype(spec, sample, backend):
    with fastssl.use_backend("reference"):
        expected = evaluate(public(spec), sample)
    results = evaluate(public(spec), sample)
    for result, right in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (right.shape, right.dtype)
    if _settled(spec, sample):
        for result, right in zip(values(results, sample), expected, strict=False):
            tolerance = 1e-4 if result.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(result, right, rtol=tolerance, atol=tolerance * max(spec.magnitude(sample), 1))


@_cases(torch.float32, where=lambda spec, sample: not _settled(spec, sample))
def test_what_is_said_of_outputs_holds_for_the_reference(spec, sample):
    sample = on_cpu(sample)
    spec.check(sample, *values(evaluate(reference(spec), sample), sample))


@_cases(torch.float32, where=lambda spec, sample: _settled(spec, sample) and not spec.written)
def test_medium_precision(spec, sample, kernels, medium):
    """As accurate as eager bfloat16 at least, and float32 in all but the products."""
    sample = unreduced(spec, sample)
    results = evaluate(public(spec), sample)
    assert all(r.dtype == torch.float32 for r in results if r.is_floating_point())
    if (rough_sample := _samples(spec.name, torch.bfloat16).get(sample.label)) is None:
        return
    truth = evaluate(reference(spec), as_double(on_cpu(sample)))
    rough_truth, rough = _truth_and_eager(spec, rough_sample)
    for result, true, x, y, (weight, size) in zip(
        results, truth, rough, rough_truth, natural_sizes(spec, sample, truth), strict=True
    ):
        error, eager_error = (weighted_error(*pair, weight) for pair in ((result, true), (x, y)))
        assert error <= eager_error + torch.finfo(torch.bfloat16).eps * size


@_cases(torch.float32, where=lambda spec, sample: _loss(spec, sample) and spec.multiplies is not None)
def test_autocast_multiplies_in_its_dtype(spec, sample, backend):
    """As "medium" does, whose products are bfloat16 too."""
    with torch.autocast(device_of(sample).type, torch.bfloat16):
        output = public(spec)(*sample.args, **sample.kwargs)
    results = [x.cpu() for x in (output, *gradients([output], sample))]
    torch.set_float32_matmul_precision("medium")
    expected = evaluate(public(spec), sample)
    for result, right, (weight, size) in zip(
        results, expected, natural_sizes(spec, sample, tuple(x.double() for x in expected)), strict=True
    ):
        assert result.dtype == torch.float32
        assert weighted_error(result, right, weight) <= 4 * torch.finfo(torch.float32).eps * size


@_cases(torch.bfloat16, torch.float32, where=_tagged(TRACED))
def test_dtype_under_autocast(spec, sample, backend):
    with torch.autocast(device_of(sample).type, torch.bfloat16):
        outputs = tensors_of(public(spec)(*sample.args, **sample.kwargs))
    if spec.autocast == "inputs":
        expected = [x.dtype for x in tensors_of(public(spec)(*sample.args, **sample.kwargs))]
    else:
        expected = [torch.float32 if spec.autocast == "float32" else torch.bfloat16]
    assert [x.dtype for x in outputs] == expected
    for leaf, gradient in zip(leaves_of(sample), gradients(outputs, sample), strict=True):
        assert gradient.dtype == leaf.dtype


@_cases(torch.float64, where=_small)
def test_derivatives_are_numerically_right(spec, sample, monkeypatch):
    monkeypatch.setattr(_portable, "_BLOCK_ELEMENTS", 30)  # the derivatives of a sum over blocks
    sample = as_double(sample)
    leaves = leaves_of(sample)

    def function(*values: Tensor) -> Tensor:
        replaced = dict(zip(map(id, leaves), values, strict=True))
        sample_ = map_tensors(sample, lambda x: replaced.get(id(x), x))
        return public(spec)(*sample_.args, **sample_.kwargs)

    if function(*leaves).isfinite().all():
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@_cases(torch.float32, where=lambda spec, sample: _tagged(TRACED)(spec, sample) and _differentiable(spec, sample))
def test_torch_func(spec, sample, backend):
    """torch.func.grad, and nested: a product with the Hessian, against the reference's."""
    argnums = tuple(i for i, x in enumerate(sample.args) if any(y.requires_grad for y in tensors_of(x)))
    sample = map_tensors(sample, torch.Tensor.detach)

    def gradient(function: Callable[..., Tensor], *args: Any) -> list[Tensor]:
        return tensors_of(torch.func.grad(lambda *a: function(*a, **sample.kwargs).sum(), argnums)(*args))

    def product(function: Callable[..., Tensor], args: tuple[Any, ...]) -> list[Tensor]:
        def along(*a: Any) -> Tensor:
            return sum((g * cotangent_for(g)).sum() for g in gradient(function, *a))

        return tensors_of(torch.func.grad(along, argnums)(*args))

    double = as_double(sample)
    magnitude = max(1.0, spec.magnitude(sample))
    naive = functools.partial(_with_kwargs_of, spec.reference, double)
    for result, expected in zip(
        (*gradient(public(spec), *sample.args), *product(public(spec), sample.args)),
        (*gradient(naive, *double.args), *product(naive, double.args)),
        strict=True,
    ):
        torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-4 * magnitude)


def _with_kwargs_of(function: Callable[..., Tensor], sample: Sample, *args: Tensor, **_: Any) -> Tensor:
    return function(*args, **sample.kwargs)


@pytest.mark.parametrize("spec", [spec for spec in OPS.values() if spec.op], ids=lambda spec: spec.name)
def test_calls_its_operation(spec):
    samples = _samples(spec.name, torch.float32).values()
    assert spec.op in {op._opname for sample in samples for op, _ in recorded_calls(spec, sample)}


@_cases(torch.float32, where=_tagged(TRACED, EDGE))
def test_opcheck(spec, sample):
    for op, args in recorded_calls(spec, sample):
        torch.library.opcheck(op, args)


@_cases(torch.bfloat16, where=_tagged(TRACED))
def test_opcheck_portable(spec, sample):
    with fastssl.use_backend("portable"):
        calls = recorded_calls(spec, sample)
    for op, args in calls:
        assert "portable" in op._opname
        torch.library.opcheck(op, args)


def _assert_compiles(spec: Any, sample: Sample, exact: bool = True, **options: Any) -> None:
    torch._dynamo.reset()
    compiled = public(spec, functools.partial(torch.compile, fullgraph=True, **options))
    results, expected = evaluate(compiled, sample), evaluate(public(spec), sample)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, **({"rtol": 0, "atol": 0} if exact else {}), equal_nan=True)


@_cases(torch.float32, where=_tagged(TRACED))
def test_compile(spec, sample):
    _assert_compiles(spec, sample, exact=not _takes_gradients(spec), backend="aot_eager")


def _takes_gradients(spec: OpSpec) -> bool:
    """In the forward pass, and in the backward pass where it is traced: these are rounded in another order."""
    names = [
        {argument.name for argument in arguments}
        for op, arguments in ((spec.op, "returns"), (f"{spec.op}_backward", "arguments"))
        if hasattr(torch.ops.fastssl, op)
        for arguments in [getattr(getattr(torch.ops.fastssl, op).default._schema, arguments)]
    ]
    return len(names) == 2 and any(name.startswith("kept_") for name in names[0] - names[1])


@_cases(torch.float32, where=_tagged(COMPILED))
def test_compile_inductor(spec, sample):
    _assert_compiles(spec, sample, exact=False)


@on_every_device
@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_compile_dynamic_shapes(spec, device):
    torch._dynamo.reset()
    compiled = public(spec, functools.partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True))
    samples = [sample for sample in _samples(spec.name, torch.float32, device).values() if SHAPES in sample.tags]
    assert len(samples) > 1
    for sample in samples:
        for result, expected in zip(evaluate(compiled, sample), evaluate(public(spec), sample), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@on_every_device
@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_compile_follows_the_precision(spec, device):
    traced = [sample for sample in _samples(spec.name, torch.float32, device).values() if TRACED in sample.tags]
    sample = max(traced, key=lambda sample: sum(x.numel() for x in tensors_of(sample)))
    torch._dynamo.reset()
    compiled = public(spec, functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    outputs = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        outputs[precision] = tensors_of(compiled(*sample.args, **sample.kwargs))
        torch.manual_seed(0)
        assert all(map(torch.equal, outputs[precision], tensors_of(public(spec)(*sample.args, **sample.kwargs))))
    if spec.multiplies is not None:
        assert all(map(torch.equal, *outputs.values())) != spec.multiplies


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@_cases(torch.float32, where=lambda spec, sample: _tagged(POISONED)(spec, sample) and _loss(spec, sample))
def test_nan_and_inf(spec, sample, poison, backend):
    """NaN wherever the reference has NaN, and a finite value wherever the reference has one."""
    rows = [i for i, x in enumerate(sample.args) if isinstance(x, Tensor) and x.is_floating_point()]
    for argument in rows:
        poisoned = unreduced(spec, map_tensors(sample, lambda x: x.detach().clone().requires_grad_(x.requires_grad)))
        with torch.no_grad():
            poisoned.args[argument][3, ..., 2] = poison
        results, expected = evaluate(public(spec), poisoned), evaluate(reference(spec), poisoned)
        for result, right in zip(results, expected, strict=True):
            assert result[right.isnan()].isnan().all()
        assert results[0][expected[0].isfinite()].isfinite().all()
        assert results[0].isfinite().all() == expected[0].isfinite().all()


def _bad_inputs(spec: OpSpec, device: str) -> Iterator[BadInput]:
    """Those on the CPU are on that device."""
    for bad in spec.bad_inputs():
        args, kwargs = moved((bad.args, bad.kwargs), device)
        match = bad.match if device == "cpu" else bad.match.replace("cpu", torch.device(device).type)
        yield BadInput(bad.label, args, kwargs, bad.error, match)


@pytest.mark.parametrize(
    "spec, bad",
    [
        device_param(device, spec, bad, id=f"{spec.name}-{bad.label.replace(' ', '_')}")
        for device in DEVICES
        for spec in OPS.values()
        for bad in _bad_inputs(spec, device)
    ],
)
def test_bad_inputs(spec, bad, monkeypatch):
    def run(self: Op, *args: Any) -> Any:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(Op, "__call__", run)
    with pytest.raises(bad.error, match=bad.match):
        getattr(fastssl.functional, spec.name)(*bad.args, **bad.kwargs)


@_cases(torch.float32, torch.bfloat16)
def test_same_bits_in_every_run(spec, sample):
    torch.use_deterministic_algorithms(device_of(sample).type != "cpu")  # where it is not so anyway
    runs = {threads: [] for threads in (1, 2)}
    for threads, results in runs.items():
        torch.set_num_threads(threads)
        results += [evaluate(public(spec), sample) for _ in range(2)]
    for first, second in runs.values():
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    yardstick = _truth_and_eager(spec, sample)
    sample = unreduced(spec, sample)
    assert_as_accurate_as_eager(spec, sample, evaluate(public(spec), sample), yardstick)


@pytest.mark.parametrize("name", OPS)
def test_portable_code_adds_nothing_atomically_on_a_gpu(name, monkeypatch):
    spec = OPS[name]
    monkeypatch.setattr(_portable, "_ADDS_IN_ORDER", set())  # not even a CPU

    def refuse(x: Tensor, *_: Any, original: Any, **options: Any) -> Any:
        assert not x.is_floating_point(), original
        return original(x, *_, **options)

    for method in filter(lambda method: hasattr(Tensor, method), (m + end for m in ATOMIC for end in ("", "_"))):
        refusing = functools.partialmethod(refuse, original=getattr(Tensor, method))  # in operations, which hide theirs
        monkeypatch.setattr(Tensor, method, refusing)
    for sample in filter(leaves_of, _samples(name, torch.float32).values()):
        with fastssl.use_backend("portable"), AtomicSums() as atomic:
            evaluate(public(spec), sample)
        assert not atomic, sample.label


class _OnMeta(TorchDispatchMode):
    """Runs the code of fastssl's operations on tensors that have no values: asking for one raises."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace != "fastssl":
            return op(*args, **(kwargs or {}))
        with self:
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)


READ = {  # samples whose temperature is on the GPU, and read there
    "dino_loss": "learnable temperature",
    "ibot_loss": "learnable temperature",
    "sinkhorn_center": "temperature tensor",
    "sinkhorn_knopp": "temperature tensor",
}
# What counts steps on the CPU; what takes the rows of a mask, for whose number the portable code waits.
NOT_ON_META = {"adamw_ema_step_", "masked_feature_loss", "masked_patch_loss"}


@pytest.mark.parametrize("name", sorted(OPS.keys() - NOT_ON_META))
def test_portable_code_waits_for_nothing_on_a_gpu(name):
    spec = OPS[name]
    for label, sample in _samples(name, torch.float32).items():
        sample = Sample(label, moved(sample.args, "meta"), moved(sample.kwargs, "meta"), sample.tags)
        reads = READ.get(name) == label
        with pytest.raises(RuntimeError, match="item") if reads else contextlib.nullcontext():
            with fastssl.use_backend("portable"), _OnMeta():
                outputs = [x for x in tensors_of(public(spec)(*sample.args, **sample.kwargs)) if x.requires_grad]
                if outputs:
                    gradients_of = [torch.ones_like(x) for x in outputs]
                    torch.autograd.grad(outputs, leaves_of(sample), gradients_of, allow_unused=True)


def test_no_kernel_adds_atomically():
    """Maxima and minima, which are the same in every order, may be atomic."""
    root = Path(__file__).parents[2]
    for path in (*root.glob("kernels/**/*.py"), *root.glob("csrc/cuda/**/*.cu"), *root.glob("csrc/cuda/**/*.h")):
        assert not re.search("atomic_?(add|cas|xchg|exch)", path.read_text(), re.IGNORECASE), path


@_cases(*FLOATS, where=_tagged(RAGGED))
@pytest.mark.sanitized
def test_misaligned_data(spec, sample, backend):
    """One element off any alignment: the same bits, but for the portable code, whose products are the BLAS library's:
    on some CPUs its sums depend on the alignment."""
    exact = {} if backend == "portable" else {"rtol": 0, "atol": 0}

    def misaligned(x: Tensor) -> Tensor:
        storage = x.new_empty(x.numel() + 1)
        return storage[1:].view(x.shape).copy_(x.detach()).requires_grad_(x.requires_grad)

    for result, right in zip(
        evaluate(public(spec), map_tensors(sample, misaligned)), evaluate(public(spec), sample), strict=True
    ):
        torch.testing.assert_close(result, right, **exact)


@_cases(torch.float32, where=_differentiable)
def test_strided_grad_output(spec, sample, backend):
    """The gradient that `sum` sends back has a stride of 0."""
    sample = unreduced(spec, sample)
    output = public(spec)(*sample.args, **sample.kwargs)
    leaves = leaves_of(sample)
    expanded = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    contiguous = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    sliced = torch.autograd.grad(output, leaves, output.new_ones(2 * output.numel())[::2].view(output.shape))
    for a, b, c in zip(expanded, contiguous, sliced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(c, b, rtol=0, atol=0)


FACTORIES = (
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
)


@_cases(torch.float32, where=_tagged(TRACED, EDGE))
def test_new_tensors_are_made_on_a_device_that_is_named(spec, sample, monkeypatch):
    """And not on the CPU because that is where they are made by default."""

    def named(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            caller = sys._getframe(1)
            ours = caller.f_globals.get("__name__", "").startswith("fastssl.")
            assert not ours or kwargs.get("device") is not None, f"{caller.f_code.co_filename}:{caller.f_lineno}"
            return factory(*args, **kwargs)

        return make

    for name in FACTORIES:
        monkeypatch.setattr(torch, name, named(getattr(torch, name)))
    for backend in ("portable", "reference"):
        with fastssl.use_backend(backend):
            evaluate(public(spec), sample)


@_cases(torch.float32)
def test_leaves_its_inputs_alone(spec, sample, backend):
    before = [x.detach().clone() for x in tensors_of(sample)]
    evaluate(public(spec), sample)
    assert all(map(torch.equal, tensors_of(sample), before))
