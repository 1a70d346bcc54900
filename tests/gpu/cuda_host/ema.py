"""Moving averages, and AdamW's step that moves them: csrc/cuda/ema.cu."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.accuracy import with_tensors
from tests.gpu.cuda_host.common.operations import DEVICE, DTYPES, assert_launches, cuda, portable


def _pairs(target: torch.dtype, source: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """About the size of a vector and of a chunk; 0-d, transposed, with gaps, misaligned."""

    def rows(dtype: torch.dtype) -> list[Tensor]:
        def x(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype)

        flat = [x(n) for n in (0, 1, 3, 4, 4095, 4096, 4097, 9000)]
        return [*flat, x(), x(3, 5), x(30, 40).T, x(9, 30)[:, ::2], x(9, 7)[1:, 2:], x(50)[1:]]

    return list(zip(rows(target), rows(source), strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_moving_averages(target, momentum):
    pairs = [pair for source in DTYPES for pair in _pairs(target, source)]
    targets, sources = map(list, zip(*pairs, strict=True))
    sources[10] = sources[10].contiguous()  # of other strides than its target
    expected, eager = ([t.to(d, copy=True) for t in targets] for d in (torch.float64, target))
    for results, of in ((expected, [s.double() for s in sources]), (eager, sources)):
        portable.ema_update_portable_(results, of, torch.tensor(momentum, dtype=torch.float64))
    cuda.ema_update_(targets, sources, torch.tensor(momentum, dtype=torch.float64))
    for result, other, truth in zip(targets, eager, expected, strict=True):
        if result.numel():
            error, allowed = ((x.double() - truth).abs().max().item() for x in (result, other))
            assert error <= 2 * allowed + 1e-7 * truth.abs().max().item()


@pytest.mark.parametrize("momentum", [0.0, 1e-9, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_moving_averages_of_infinities_and_huge_numbers(target, momentum):
    """As in the portable code, bit for bit where both are equal, and at the ends of momentum; NaN is NaN."""
    for source in DTYPES:
        values = []
        for dtype in (target, source):
            narrow = dtype if dtype != torch.float64 else torch.promote_types(target, torch.float32)
            positive = torch.tensor([0.0, 1.0, torch.finfo(narrow).max, math.inf, math.nan], dtype=torch.float64)
            values.append(torch.cat([positive, -positive]).to(dtype))
        targets, sources = values[0].repeat(10), values[1].repeat_interleave(10)
        equal, expected = targets.double() == sources.double(), targets.clone()
        portable.ema_update_portable_([expected], [sources], torch.tensor(momentum, dtype=torch.float64))
        before = targets.clone()
        cuda.ema_update_([targets], [sources], torch.tensor(momentum, dtype=torch.float64))
        torch.testing.assert_close(targets, expected, equal_nan=True)
        exact = before if momentum else sources.to(target)
        kept = torch.ones_like(equal) if momentum in (0, 1) else equal & (before.signbit() == sources.signbit())
        assert torch.equal(targets[kept].nan_to_num(7), exact[kept].nan_to_num(7))
        numbers = kept & ~exact.isnan()
        assert torch.equal(targets[numbers].signbit(), exact[numbers].signbit())


def test_launches():
    """One for up to 900 pairs, or 400 parameters."""
    rows = list(torch.ones(900, 2).unbind())
    assert_launches("ema_update_", rows, [x.clone() for x in rows], MOMENTUM)
    lists = [list(x.unbind()) for x in torch.ones(5, 400, 2)]
    assert_launches("adamw_ema_step_", *lists, [torch.tensor(0.0, device="cpu") for _ in range(400)], *ADAMW)


def test_moving_averages_of_very_many_pairs():
    for count in (120, 121, 900, 901):
        targets, sources = (list(torch.randn(count, 3).unbind()) for _ in range(2))
        expected = torch.stack(targets).lerp(torch.stack(sources), 0.25)
        cuda.ema_update_(targets, sources, torch.tensor(0.75, dtype=torch.float64))
        torch.testing.assert_close(torch.stack(targets), expected)


def test_moving_averages_write_targets_only():
    memory = torch.full((40, 50), math.nan)
    target = memory[3:30:2, 5:45:3]
    target.zero_()
    cuda.ema_update_([target, memory[0, 1:4].zero_()], [torch.ones(target.shape), torch.ones(3)], torch.tensor(0.5))
    assert (target == 0.5).all() and memory.isnan().sum() == memory.numel() - target.numel() - 3


LR, MOMENTUM = torch.tensor(0.02, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
ADAMW = with_tensors((LR, 0.9, 0.99, 1e-8, 0.1, MOMENTUM))


def _parameters(dtype: torch.dtype, ema: torch.dtype) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs, ema_params, steps."""
    lists = [[target for target, _ in _pairs(of, of)] for of in (dtype, dtype, dtype, dtype, ema)]
    lists[1][10] = lists[1][10].contiguous()  # of other strides than its parameter
    lists[3] = [x.square_() for x in lists[3]]
    return [*lists, [torch.tensor(float(i % 3), device="cpu") for i in range(len(lists[0]))]]


@pytest.mark.parametrize("ema", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_and_moving_averages(dtype, ema):
    states = _parameters(dtype, ema)
    exact, eager = ([[x.to(d or x.dtype, copy=True) for x in xs] for xs in states[:-1]] for d in (torch.float64, None))
    for lists in (exact, eager):
        portable.adamw_ema_step_portable_(*lists, [x.clone() for x in states[-1]], *ADAMW)
    cuda.adamw_ema_step_(*states, *ADAMW)
    assert [int(x) for x in states[-1]] == [i % 3 + 1 for i in range(len(states[-1]))]
    for results, others, truths in zip(states[:-1], eager, exact, strict=True):
        for result, other, truth in zip(results, others, truths, strict=True):
            if result.numel():
                error, allowed = ((x.double() - truth).abs().max().item() for x in (result, other))
                assert error <= 2 * allowed + 2e-7 * truth.abs().max().item()


def test_adamw_of_very_many_parameters_and_of_some_without_a_teacher():
    for count in (53, 54, 400, 401):
        states = [list(x.unbind()) for x in torch.rand(5, count, 3)]
        states[4][::2] = [x.detach() for x in states[0][::2]]
        expected = [[x.clone() for x in xs] for xs in states]
        expected[4][::2] = expected[0][::2]
        for op, lists in ((cuda.adamw_ema_step_, states), (portable.adamw_ema_step_portable_, expected)):
            op(*lists, [torch.tensor(0.0, device="cpu") for _ in range(count)], *ADAMW)
        torch.testing.assert_close(states, expected)


def test_adamw_writes_what_it_should_only():
    memory = torch.full((5, 40, 50), math.nan)
    lists = [[x[3:30:2, 5:45:3].fill_(1)] for x in memory]
    cuda.adamw_ema_step_(*lists, [torch.tensor(0.0, device="cpu")], *ADAMW)
    assert memory.isnan().sum() == memory.numel() - 5 * 14 * 14 and (lists[1][0] == 1).all()
    assert not any((x == 1).any() for x in (lists[0][0], lists[4][0]))


LOW, ZEROS = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)


@pytest.mark.parametrize(
    "targets, sources, momentum, match",
    [
        ([LOW], [], 0.5, "targets and sources must have the same length, got 1 and 0"),
        ([LOW], [ZEROS[1:]], 0.5, r"targets\[0\] and sources\[0\] .*shape, got \[4\] and \[3\]"),
        ([LOW], [ZEROS.long()], 0.5, r"sources\[0\] must be of 16, 32 or 64 bits, floating-point, got Long"),
        ([LOW.bool()], [ZEROS], 0.5, r"targets\[0\] must be of 16, 32 or 64 bits, floating-point, got Bool"),
        ([LOW, LOW], [ZEROS, ZEROS], 0.5, r"targets must not share memory, got targets\[\d\] and targets\[\d\]"),
        ([LOW[:3]], [LOW[1:]], 0.5, r"targets must not share memory, got sources\[0\] and targets\[0\]"),
        ([LOW[:1].expand(4)], [ZEROS], 0.5, r"targets\[0\] must have no two elements in one place, got strides \[0\]"),
        ([LOW], [ZEROS], [0.5, 0.5], r"momentum must be one number, got shape \[2\]"),
    ],
)
def test_bad_pairs(targets, sources, momentum, match):
    with pytest.raises(ValueError, match=match):
        cuda.ema_update_(targets, sources, torch.tensor(momentum))
    assert (LOW == 1).all()


@pytest.mark.parametrize(
    "place, tensor, match",
    [
        (1, ZEROS[1:], r"params\[0\] and grads\[0\] .*shape, got \[4\] and \[3\]"),
        (1, ZEROS.double(), r"params\[0\] and grads\[0\] must have the same dtype, got Float and Double"),
        (
            2,
            LOW,
            r"ema_params and steps must not share memory, got (exp_avgs|params)\[0\] and (exp_avgs|params)\[0\]",
        ),
        (0, LOW.half(), r"params\[0\] must be float32 or float64, got Half"),
        (5, LOW[0], r"and steps must not share memory, got (steps|params)\[0\] and (steps|params)\[0\]"),
        (5, torch.zeros(1), r"steps\[0\] must be a 0-d tensor, float32, on the CPU, got Float on cpu of shape \[1\]"),
        (6, torch.zeros(2), r"lr must be one number, got shape \[2\]"),
    ],
)
def test_bad_parameters(place, tensor, match):
    args = [[LOW], *([x.clone()] for x in 4 * [ZEROS]), [torch.zeros((), device="cpu")], *ADAMW]
    args[place] = tensor if place == 6 else [tensor]
    with pytest.raises(ValueError, match=match):
        cuda.adamw_ema_step_(*args)
    assert (LOW == 1).all()
