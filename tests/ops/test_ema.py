"""Exponential moving averages: `ema_update_` with every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastssl
from fastssl.functional import adamw_ema_step_, ema_update_
from fastssl.reference import ema as reference
from tests.accuracy import same_bits, worst_error
from tests.inputs import DTYPES, ragged

MOMENTA = (0.3, 0.996)  # on either side of where lerp changes its starting point
on_every_device = pytest.mark.usefixtures("device")


@on_every_device
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.sanitized
def test_as_accurate_as_eager_float32(target, source, momentum, kernels):
    targets, sources = ragged(target, 0), ragged(source, 1)
    wide = torch.promote_types(target, torch.float32)
    truth, eager = ([t.to(d, copy=True) for t in targets] for d in (torch.float64, wide))
    reference.ema_update_(truth, [s.double() for s in sources], momentum)
    reference.ema_update_(eager, [s.to(wide) for s in sources], momentum)
    largest = max(x.abs().max().item() for x in (*truth, *sources) if x.numel())
    allowed = 2 * worst_error([x.to(target) for x in eager], truth) + torch.finfo(wide).eps * largest
    ema_update_(targets, sources, momentum)
    assert all(t.dtype == target for t in targets)
    assert worst_error(targets, truth) <= allowed


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_are_exact(dtype, kernels):
    targets, sources = ragged(dtype, 0), ragged(dtype, 1)
    before = [t.clone() for t in targets]
    ema_update_(targets, sources, 1.0)
    assert all(map(torch.equal, targets, before))
    ema_update_(targets, sources, 0.0)
    assert all(map(torch.equal, targets, sources))


@on_every_device
@pytest.mark.sanitized
def test_more_elements_than_one_thread_takes(kernels):
    """Runs of threads that begin and end within tensors, and a source that is laid out otherwise."""
    torch.set_num_threads(2)
    shapes = [(70001,), (3,), (257, 1000), (), (40000,), (1,)]
    targets, sources = ([torch.randn(s) for s in shapes] for _ in range(2))
    sources[2] = sources[2].T.contiguous().T
    expected = [torch.lerp(t, s, 0.25) for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, 0.75)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-6)


@on_every_device
@pytest.mark.sanitized
def test_only_targets_are_written(kernels):
    """What lies between and behind them keeps its NaN."""
    memory = torch.full((40, 50), math.nan)
    target = memory[3:30:2, 5:45:3]
    target.zero_()
    source = torch.ones(target.shape)
    ema_update_([target], [source], 0.5)
    assert (target == 0.5).all() and (source == 1).all()
    assert memory.isnan().sum() == memory.numel() - target.numel()


@on_every_device
def test_nan_and_infinity_come_through(kernels):
    target, source = torch.tensor([math.nan, 1, 1, math.inf, 1]), torch.tensor([1, math.nan, math.inf, 1, 1])
    ema_update_([target], [source], 0.9)
    assert target.isfinite().tolist() == [False] * 4 + [True]


def _extremes(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    positive = torch.tensor([0.0, 1.0, 3.1, info.tiny, info.max, math.inf, math.nan], dtype=torch.float64)
    return torch.cat([positive, -positive]).to(dtype)


@on_every_device
@pytest.mark.parametrize("momentum", [0.0, 1e-9, *MOMENTA, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_equal_stays(dtype, momentum, kernels):
    """A teacher that has reached its student stays there, whatever the momentum rounds to; infinity stays, and -0."""
    for other in DTYPES:
        wide = torch.promote_types(dtype, other)
        narrow = other if wide == dtype else dtype
        values = torch.cat([torch.randn(1000).to(narrow), _extremes(narrow)])
        teacher, student = values.to(dtype, copy=True), values.to(other)
        before = teacher.clone()
        ema_update_([teacher], [student], momentum)
        assert wide not in (dtype, other) or same_bits(teacher, before)


@on_every_device
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_whatever_the_values(target, source, kernels):
    """Momentum 0 is a copy, 1 changes nothing, and between them it is float64's sum."""
    values = _extremes(source if source != torch.float64 else torch.promote_types(target, torch.float32)).to(source)
    targets, sources = _extremes(target).repeat(len(values)), values.repeat_interleave(len(_extremes(target)))
    for momentum in (0.0, *MOMENTA, 1.0):
        result = targets.clone()
        ema_update_([result], [sources], momentum)
        if momentum in (0, 1):
            assert same_bits(result, targets if momentum else sources.to(target))
        else:
            expected = momentum * targets.double() + (1 - momentum) * sources.double()
            tolerance = 2 * torch.finfo(target).eps
            torch.testing.assert_close(result, expected.to(target), rtol=tolerance, atol=tolerance, equal_nan=True)


@on_every_device
def test_a_tensor_momentum_has_exact_ends(backend):
    for number in (0.0, 1.0):
        target, source = torch.tensor([math.inf, 1.0, -0.0]), torch.tensor([math.nan, -math.inf, 0.0])
        expected = source.clone() if number == 0 else target.clone()
        ema_update_([target], [source], torch.tensor(number))
        assert same_bits(target, expected)


@on_every_device
def test_momentum_may_be_a_tensor(backend):
    target, source = torch.ones(5), torch.zeros(5)
    ema_update_([target], [source], torch.tensor(0.25))
    torch.testing.assert_close(target, torch.full((5,), 0.25))
    ema_update_([], [], 0.5)


@on_every_device
def test_leaves_that_require_gradients_and_what_autograd_saved(backend):
    weight, other = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    kept = (weight * weight).sum()
    ema_update_([weight], [other], 0.5)
    assert weight.requires_grad and weight.grad_fn is None and weight.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_pairs_on_several_devices(backend):
    targets, sources = ([torch.full((3,), x), torch.empty(2, device="meta")] for x in (1.0, 0.0))
    ema_update_(targets, sources, 0.5)
    assert targets[0].tolist() == [0.5] * 3


@on_every_device
def test_compiles(backend):
    def step(target: Tensor, source: Tensor) -> Tensor:
        ema_update_([target], [source], 0.9)
        return target * 2

    targets = torch.ones(7), torch.ones(7)
    eager, compiled = (
        f(t, torch.zeros(7)) for f, t in zip((step, torch.compile(step, fullgraph=True)), targets, strict=True)
    )
    assert torch.equal(eager, compiled) and torch.equal(*targets)


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
@pytest.mark.parametrize(
    "targets, sources, momentum, error, match",
    [
        ([torch.ones(2)], [], 0.5, ValueError, "targets and sources .*same length.* 1 and 0"),
        ([torch.ones(2)], [torch.ones(3)], 0.5, ValueError, r"targets\[0\] and sources\[0\] .*shape.*\[2\] and \[3\]"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], 0.5, ValueError, "same device.*cpu and meta"),
        ([torch.ones(2)], [torch.ones(2).long()], 0.5, ValueError, "16, 32 or 64 bits.*(int64|long)"),
        ([torch.ones(2), 1.0], [torch.ones(2)] * 2, 0.5, TypeError, r"targets\[1\] must be a Tensor, got float"),
        ([torch.ones(2)], [None], 0.5, TypeError, r"sources\[0\] must be a Tensor, got NoneType"),
        ([torch.ones(2)], None, 0.5, TypeError, "sources must be a list of tensors, got NoneType"),
        (
            [torch.ones(2)],
            [torch.ones(2)],
            torch.ones((), device="meta"),
            ValueError,
            "momentum must have a value.*meta",
        ),
        ([torch.ones(2)], [torch.ones(2)], 1.5, ValueError, "momentum must be from 0 to 1, got 1.5"),
        ([torch.ones(2)], [torch.ones(2)], math.nan, ValueError, "momentum must be from 0 to 1, got nan"),
        ([torch.ones(2)], [torch.ones(2)], "1", TypeError, "momentum must be a number, got str"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(2), ValueError, r"momentum .*one.* element.*\(2,\)"),
    ],
)
def test_bad_input(targets, sources, momentum, error, match, chosen):
    before = [t.clone() for t in targets if isinstance(t, Tensor)]
    with fastssl.use_backend(chosen), pytest.raises(error, match=match):
        ema_update_(targets, sources, momentum)
    assert all(map(torch.equal, before, targets))


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
def test_shared_memory_is_refused_before_anything_changes(chosen):
    memory, zeros = torch.ones(12), torch.zeros(4)
    low, high, middle = memory[:4], memory[8:], memory[2:6]
    shared = r"targets must not share memory, got .*\[\d\] and .*\[\d\]"
    with fastssl.use_backend(chosen):
        for targets, sources, match in (
            ([low, low], [zeros, zeros], shared),
            ([high, low, middle], [zeros, zeros, zeros], shared),
            ([high, low], [zeros, middle], shared),
            ([low, high], [high, zeros], shared),
            ([high, memory[:1].expand(4)], [zeros, zeros], r"targets\[1\] must have no two elements in one place"),
            ([high, memory.as_strided((2, 2), (1, 1))], [zeros, zeros.view(2, 2)], "no two elements"),
        ):
            with pytest.raises(ValueError, match=match):
                ema_update_(targets, sources, 0.5)
        assert (memory == 1).all()
        ema_update_([low, high], [low, memory[4:8]], 0.5)  # one with itself
        ema_update_([low, high], [zeros, zeros], 0.5)  # sources may share
    assert memory.tolist() == [0.5] * 4 + [1] * 4 + [0.5] * 4


def test_numbers_are_not_captured_in_a_cuda_graph(monkeypatch):
    """Fake tensors are on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)  # the CPU's are not
    with FakeTensorMode():
        target, source, *rest = (torch.zeros(3, device="cuda") for _ in range(5))
        for momentum in (0.5, torch.tensor(0.5)):
            with pytest.raises(ValueError, match="momentum must be a tensor on the GPU while a CUDA graph is captured"):
                ema_update_([target], [source], momentum)
        ema_update_([target], [source], torch.tensor(0.5, device="cuda"))
        with pytest.raises(ValueError, match="steps must not be taken while a CUDA graph is captured"):
            adamw_ema_step_(*([x] for x in (target, source, *rest)), [torch.tensor(0.0)], momentum=0.5)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        ema_update_([target], [source], 0.5)
