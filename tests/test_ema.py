"""Exponential moving averages: `ema_update_` with every kernel, and the module EMA."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl.functional import ema_update_
from fastssl.nn import EMA
from fastssl.reference import ema as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOMENTA = (0.3, 0.996)  # on either side of where lerp changes its starting point


def _tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # The sizes about a vector's and a run's length; 0-d, empty, transposed, with gaps, misaligned.
    flat = [rows(n) for n in (0, 1, 3, 15, 16, 17, 511, 513, 32767, 32769)]
    return [*flat, rows(()), rows(2, 3, 5), rows(30, 40).T, rows(30, 80)[:, ::2], rows(9, 7)[1:, 2:], rows(100)[1:]]


def _worst(results: list[Tensor], truth: list[Tensor]) -> float:
    return max((x.double() - y).abs().max().item() for x, y in zip(results, truth, strict=True) if y.numel())


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_as_accurate_as_eager_float32(target, source, momentum, kernels):
    targets, sources = _tensors(target, 0), _tensors(source, 1)
    wide = torch.promote_types(target, torch.float32)
    truth, eager = ([t.to(d, copy=True) for t in targets] for d in (torch.float64, wide))
    reference.ema_update_(truth, [s.double() for s in sources], momentum)
    reference.ema_update_(eager, [s.to(wide) for s in sources], momentum)
    largest = max(x.abs().max().item() for x in (*truth, *sources) if x.numel())
    allowed = 2 * _worst([x.to(target) for x in eager], truth) + torch.finfo(wide).eps * largest
    ema_update_(targets, sources, momentum)
    assert all(t.dtype == target for t in targets)
    assert _worst(targets, truth) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_are_exact(dtype, kernels):
    targets, sources = _tensors(dtype, 0), _tensors(dtype, 1)
    before = [t.clone() for t in targets]
    ema_update_(targets, sources, 1.0)
    assert all(map(torch.equal, targets, before))
    ema_update_(targets, sources, 0.0)
    assert all(map(torch.equal, targets, sources))


def test_more_elements_than_one_thread_takes(kernels):
    """Runs of threads that begin and end within tensors, and a source that is laid out otherwise."""
    torch.set_num_threads(2)
    shapes = [(70001,), (3,), (257, 1000), (), (40000,), (1,)]
    targets, sources = ([torch.randn(s) for s in shapes] for _ in range(2))
    sources[2] = sources[2].T.contiguous().T
    expected = [torch.lerp(t, s, 0.25) for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, 0.75)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-6)


def test_only_targets_are_written(kernels):
    """What lies between and behind them keeps its NaN."""
    memory = torch.full((40, 50), math.nan)
    target = memory[3:30:2, 5:45:3]
    target.zero_()
    source = torch.ones(target.shape)
    ema_update_([target], [source], 0.5)
    assert (target == 0.5).all() and (source == 1).all()
    assert memory.isnan().sum() == memory.numel() - target.numel()


def test_nan_and_infinity_come_through(kernels):
    target, source = torch.tensor([math.nan, 1, 1, math.inf, 1]), torch.tensor([1, math.nan, math.inf, 1, 1])
    ema_update_([target], [source], 0.9)
    assert target.isfinite().tolist() == [False] * 4 + [True]


def test_a_fixed_point(kernels):
    """A teacher that has reached its student stays there, whatever the momentum rounds to."""
    student = torch.randn(1000)
    teacher = student.clone()
    for momentum in MOMENTA:
        ema_update_([teacher], [student], momentum)
    assert torch.equal(teacher, student)


def test_momentum_may_be_a_tensor(backend):
    target, source = torch.ones(5), torch.zeros(5)
    ema_update_([target], [source], torch.tensor(0.25))
    torch.testing.assert_close(target, torch.full((5,), 0.25))
    ema_update_([], [], 0.5)


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
        ([torch.ones(2)], [torch.ones(2)], 1.5, ValueError, "momentum must be from 0 to 1, got 1.5"),
        ([torch.ones(2)], [torch.ones(2)], math.nan, ValueError, "momentum must be from 0 to 1, got nan"),
        ([torch.ones(2)], [torch.ones(2)], "1", TypeError, "momentum must be a number, got str"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(2), ValueError, r"momentum .*0-d.*\(2,\)"),
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


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def _train(model: nn.Module) -> None:
    model(torch.randn(8, 6)).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
            p.grad = None


def test_teacher_follows_its_student():
    student = _model()
    teacher, plain = EMA(student, 0.9), copy.deepcopy(student)
    for _ in range(3):
        _train(student)
        assert teacher.update(student) == 0.9
        with torch.no_grad():
            states = (plain.state_dict().values(), student.state_dict().values())
            for x, y in zip(*states, strict=True):
                x.copy_(0.9 * x + 0.1 * y if x.is_floating_point() else y)
    torch.testing.assert_close(teacher.module.state_dict(), plain.state_dict())
    assert teacher.step == 3 and not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())
    x = torch.randn(4, 6)
    torch.testing.assert_close(teacher(x), plain.eval()(x))


def test_buffers_may_be_left_alone():
    student = _model()
    teacher = EMA(student, 0.9, update_buffers=False)
    _train(student)
    teacher.update(student)
    assert teacher.module[1].num_batches_tracked == 0 and (teacher.module[1].running_mean == 0).all()


def test_cosine_schedule_and_resuming():
    student = _model()
    teacher = EMA(student, 0.99, schedule="cosine", total_steps=4)
    momenta = [teacher.update(student) for _ in range(3)]
    resumed = EMA(student, 0.99, schedule="cosine", total_steps=4)
    resumed.load_state_dict(teacher.state_dict())
    momenta += [resumed.update(student) for _ in range(3)]
    expected = [1 - 0.01 * (math.cos(math.pi * min(k, 4) / 4) + 1) / 2 for k in range(6)]
    assert momenta == pytest.approx(expected, abs=1e-12) and momenta[4] == 1


def test_low_precision_student_has_a_float32_teacher():
    student = _model().bfloat16()
    teacher = EMA(student, 0.999)
    assert all(p.dtype == torch.float32 for p in teacher.module.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    start = [p.clone() for p in teacher.module.parameters()]
    for _ in range(10):
        teacher.update(student)
    for p, before, target in zip(teacher.module.parameters(), start, student.parameters(), strict=True):
        expected = target.float() + (before - target.float()) * 0.999**10
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


def test_bad_teachers():
    student = _model()
    with pytest.raises(ValueError, match="momentum must be from 0 to 1, got 2"):
        EMA(student, 2)
    with pytest.raises(ValueError, match="schedule must be None or 'cosine', got 'linear'"):
        EMA(student, schedule="linear")
    for options in ({"schedule": "cosine"}, {"total_steps": 5}, {"schedule": "cosine", "total_steps": 0}):
        with pytest.raises(ValueError, match="total_steps must be"):
            EMA(student, **options)
    teacher = EMA(student)
    before = copy.deepcopy(teacher.state_dict())
    for other, match in (
        (nn.Linear(6, 5), "as many buffers as the teacher, 3, got 0"),
        (nn.Sequential(nn.BatchNorm1d(5)), "same length"),
    ):
        with pytest.raises(ValueError, match=match):
            teacher.update(other)
    student[1].num_batches_tracked = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"buffers .*same shape, got \(\) and \(2,\)"):
        teacher.update(student)
    torch.testing.assert_close(teacher.state_dict(), before)
