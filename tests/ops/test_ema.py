"""Exponential moving averages: `ema_update_` and `adamw_ema_step_` with every kernel."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.adamw import adamw

import fastssl
from fastssl.functional import adamw_ema_step_, ema_update_
from fastssl.reference import ema as reference
from tests.accuracy import with_tensors

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
@pytest.mark.sanitized
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


def test_nan_and_infinity_come_through(kernels):
    target, source = torch.tensor([math.nan, 1, 1, math.inf, 1]), torch.tensor([1, math.nan, math.inf, 1, 1])
    ema_update_([target], [source], 0.9)
    assert target.isfinite().tolist() == [False] * 4 + [True]


def _extremes(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    positive = torch.tensor([0.0, 1.0, 3.1, info.tiny, info.max, math.inf, math.nan], dtype=torch.float64)
    return torch.cat([positive, -positive]).to(dtype)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """-0 is not 0, and any NaN is NaN."""
    signs = (z.signbit() & ~z.isnan() for z in (x, y))
    return torch.equal(x.nan_to_num(7, math.inf, -math.inf), y.nan_to_num(7, math.inf, -math.inf)) and torch.equal(
        *signs
    )


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
        assert wide not in (dtype, other) or _same_bits(teacher, before)


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
            assert _same_bits(result, targets if momentum else sources.to(target))
        else:
            expected = momentum * targets.double() + (1 - momentum) * sources.double()
            tolerance = 2 * torch.finfo(target).eps
            torch.testing.assert_close(result, expected.to(target), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_tensor_momentum_has_exact_ends(backend):
    for number in (0.0, 1.0):
        target, source = torch.tensor([math.inf, 1.0, -0.0]), torch.tensor([math.nan, -math.inf, 0.0])
        expected = source.clone() if number == 0 else target.clone()
        ema_update_([target], [source], torch.tensor(number))
        assert _same_bits(target, expected)


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


STATES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema_params", "steps")
NUMBERS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}


def _parameters(dtype: torch.dtype = torch.float32, ema: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """What AdamW holds in the middle of training."""
    states = dict(zip(STATES, (_tensors(dtype, seed) for seed in range(5)), strict=False))
    states["exp_avg_sqs"] = [x.square_() for x in states["exp_avg_sqs"]]
    states["ema_params"] = _tensors(ema, 4)
    return {**states, "steps": [torch.tensor(float(i % 4)) for i in range(len(states["params"]))]}


def _small(*names: str) -> dict[str, list[Tensor]]:
    return {name: [torch.zeros(()) if name == "steps" else torch.ones(2)] for name in names or STATES}


def _copy(states: dict[str, list[Tensor]], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    return {name: [x.to(x.dtype if name == "steps" else dtype, copy=True) for x in xs] for name, xs in states.items()}


def _separately(states: dict[str, list[Tensor]], betas: tuple[float, float], momentum: float, **numbers) -> None:
    """PyTorch's own step, then the moving average."""
    params, grads, exp_avgs, exp_avg_sqs, ema_params, steps = states.values()
    beta1, beta2 = betas
    numbers |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
    adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=False, **numbers)
    reference.ema_update_(ema_params, params, momentum)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.3, 0.95), (0.0, 0.0)])
@pytest.mark.parametrize("ema", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_is_as_accurate_as_adamw(dtype, ema, betas, kernels):
    """Parameters that have taken more or fewer steps before, with gradients laid out otherwise."""
    states, numbers = _parameters(dtype, ema), NUMBERS | {"betas": betas}
    states["grads"][-1] = states["grads"][-1].repeat_interleave(2)[::2]
    states["grads"][-4] = states["grads"][-4].contiguous()
    truth, eager = (_copy(states, d) for d in (torch.float64, torch.promote_types(dtype, ema)))
    eager = {
        name: [x.to(dtype) if name not in ("ema_params", "steps") else x for x in xs] for name, xs in eager.items()
    }
    adamw_ema_step_(**states, **numbers)
    _separately(truth, **numbers)
    _separately(eager, **numbers)
    assert states["steps"] == truth["steps"]
    for name in ("params", "exp_avgs", "exp_avg_sqs", "ema_params"):
        written = ema if name == "ema_params" else dtype
        assert all(x.dtype == written for x in states[name])
        largest = max(x.abs().max().item() for x in truth[name] if x.numel())
        allowed = (
            2 * _worst([x.to(written) for x in eager[name]], truth[name])
            + torch.finfo(torch.float32 if written != torch.float64 else dtype).eps * largest
        )
        assert _worst(states[name], truth[name]) <= allowed, name


@pytest.mark.sanitized
def test_step_of_more_elements_than_one_thread_takes(kernels):
    torch.set_num_threads(2)
    shapes = [(70001,), (3,), (257, 1000), (), (40000,), (1,)]
    states = {name: [torch.rand(shape) for shape in shapes] for name in STATES}
    states["steps"] = [torch.tensor(float(i)) for i in range(len(shapes))]
    expected = _copy(states, torch.float32)
    adamw_ema_step_(**states, **NUMBERS)
    _separately(expected, **NUMBERS)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)


def test_step_writes_only_what_it_should(kernels):
    """What lies between and behind keeps its NaN, gradients what they are."""
    memory = {name: torch.full((40, 50), math.nan) for name in STATES[:5]}
    states = {name: [x[3:30:2, 5:45:3].fill_(1)] for name, x in memory.items()}
    adamw_ema_step_(**states, steps=[torch.tensor(0.0)], **NUMBERS)
    for x in memory.values():
        assert x.isnan().sum() == x.numel() - 14 * 14
    assert (states["grads"][0] == 1).all() and not any(
        (states[name][0] == 1).any() for name in ("params", "ema_params")
    )


def test_step_lets_nan_and_infinity_through(kernels):
    bad = torch.tensor([math.nan, math.inf, 1.0])
    for name in STATES[:4]:
        states = {other: [bad.clone() if other == name else torch.ones(3)] for other in STATES[:5]}
        adamw_ema_step_(**states, steps=[torch.tensor(0.0)], **NUMBERS)
        expected = [False, name == "exp_avg_sqs", True]  # a step divided by infinity is none
        assert states["params"][0].isfinite().tolist() == states["ema_params"][0].isfinite().tolist() == expected


@pytest.mark.parametrize("ema", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_keeps_what_is_infinite(dtype, ema, kernels):
    """Without a gradient neither a parameter of infinity moves nor its teacher, whether that is its own or not."""
    for momentum in (0.0, *MOMENTA, 1.0):
        param = torch.tensor([math.inf, -math.inf, -0.0, 1.0], dtype=dtype)
        zeros, teacher = [torch.zeros(4, dtype=dtype) for _ in range(6)], param.to(ema, copy=True)
        other = param.clone()
        lists = (
            [param, other],
            zeros[:2],
            zeros[2:4],
            zeros[4:],
            [teacher, other],
            [torch.tensor(0.0), torch.tensor(0.0)],
        )
        adamw_ema_step_(*lists, **NUMBERS | {"momentum": momentum, "weight_decay": 0})
        for x in (param, other, teacher):
            assert _same_bits(x, torch.tensor([math.inf, -math.inf, -0.0, 1.0], dtype=x.dtype))


def test_ends_of_momentum_and_parameters_without_a_teacher(kernels):
    for ema in DTYPES:
        states = _parameters(ema=ema)
        before = [x.clone() for x in states["ema_params"]]
        adamw_ema_step_(**states, **NUMBERS | {"momentum": 1.0})
        assert all(map(torch.equal, states["ema_params"], before))
        adamw_ema_step_(**states, **NUMBERS | {"momentum": 0.0})
        assert all(torch.equal(x, y.to(ema)) for x, y in zip(states["ema_params"], states["params"], strict=True))
    states, alone = _parameters(), _parameters()
    adamw_ema_step_(**states, **NUMBERS)
    adamw_ema_step_(**alone | {"ema_params": [x.detach() for x in alone["params"]]}, **NUMBERS)
    assert all(map(torch.equal, states["params"], alone["params"]))


def test_step_with_tensors_for_numbers_and_with_nothing_to_do(backend):
    states, expected = _small(), _small()
    adamw_ema_step_(**expected, **NUMBERS)
    numbers = {name: torch.tensor(NUMBERS[name], dtype=torch.float64) for name in ("lr", "momentum")}
    adamw_ema_step_(**states, **NUMBERS | numbers)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(states.values(), expected.values(), strict=True))
    adamw_ema_step_([], [], [], [], [], [], momentum=0.5)


def test_step_on_several_devices_and_what_autograd_saved(backend):
    states = {
        name: [*xs, *(x.clone() if name == "steps" else x.to("meta") for x in xs)] for name, xs in _small().items()
    }
    param = states["params"][0].requires_grad_()
    kept = (param * param).sum()
    adamw_ema_step_(**states, **NUMBERS)
    assert param.is_leaf and (param < 1).all() and states["steps"][0] == 1
    versions = {name: xs[0]._version for name, xs in states.items()}
    assert versions.pop("grads") == 0 and all(version > 0 for version in versions.values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_step_compiles(backend):
    def step(states: dict[str, list[Tensor]]) -> Tensor:
        adamw_ema_step_(**states, **NUMBERS)
        return states["ema_params"][0] * 2

    for alone in (False, True):
        states, expected = _small(), _small()
        if alone:
            states["ema_params"], expected["ema_params"] = states["params"], expected["params"]
        assert torch.equal(torch.compile(step, fullgraph=True)(states), step(expected))
        assert all(torch.equal(x[0], y[0]) for x, y in zip(states.values(), expected.values(), strict=True))


def test_step_is_a_proper_operation():
    states = [list(x) for x in _small().values()]
    lr, momentum = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    for op in (torch.ops.fastssl.adamw_ema_step_, torch.ops.fastssl.adamw_ema_step_portable_):
        torch.library.opcheck(op.default, with_tensors((*states, lr, 0.9, 0.99, 1e-8, 0.1, momentum)))


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
@pytest.mark.parametrize(
    "changed, error, match",
    [
        ({"grads": []}, ValueError, "params and grads .*same length.* 1 and 0"),
        ({"steps": []}, ValueError, "params and steps .*same length.* 1 and 0"),
        ({"exp_avgs": [torch.ones(3)]}, ValueError, r"params\[0\] and exp_avgs\[0\] .*shape.*\[2\] and \[3\]"),
        ({"grads": [None]}, TypeError, r"grads\[0\] must be a Tensor, got NoneType"),
        ({"grads": [torch.ones(2).to_sparse()]}, ValueError, r"grads\[0\] must be a dense tensor, got .*[Ss]parse"),
        ({"grads": [torch.ones(2).half()]}, ValueError, r"params\[0\] and grads\[0\] .*same dtype, got .* and "),
        ({"exp_avg_sqs": [torch.ones(2).double()]}, ValueError, r"params\[0\] and exp_avg_sqs\[0\] .*same dtype"),
        (
            {"ema_params": [torch.ones(2).long()]},
            ValueError,
            r"ema_params\[0\] must be of 16, 32 or 64 bits.*(int64|long)",
        ),
        ({"ema_params": [torch.ones(2, device="meta")]}, ValueError, "same device.*cpu and meta"),
        ({"steps": [torch.zeros((), device="meta")]}, ValueError, r"steps\[0\] must be .* on the CPU, got .*meta"),
        ({"momentum": torch.ones((), device="meta")}, ValueError, "momentum must have a value, got a tensor on meta"),
        ({"lr": torch.ones((), device="meta")}, ValueError, "lr must have a value, got a tensor on meta"),
        ({"grads": None}, TypeError, "grads must be a list of tensors, got NoneType"),
        ({"steps": [torch.zeros(1)]}, ValueError, r"steps\[0\] must be a 0-d tensor, float32, on the CPU, got .*\[1\]"),
        ({"steps": [torch.tensor(1)]}, ValueError, r"steps\[0\] must be a 0-d tensor, float32, .*got .*(int64|Long)"),
        ({"lr": -1.0}, ValueError, "lr must not be negative, got -1"),
        ({"lr": math.inf}, ValueError, "lr must be finite, got inf"),
        ({"lr": torch.ones(2)}, ValueError, r"lr .*one.* element.*\(2,\)"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be from 0 to below 1, got 1"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] must be from 0 to below 1, got -0.1"),
        ({"eps": -1e-8}, ValueError, "eps must not be negative, got -1e-08"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be finite, got nan"),
        ({"momentum": 1.5}, ValueError, "momentum must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_input_of_a_step(changed, error, match, chosen):
    states = _small()
    with fastssl.use_backend(chosen), pytest.raises(error, match=match):
        adamw_ema_step_(**states | NUMBERS | changed)
    assert all((x == (name != "steps")).all() for name, xs in states.items() for x in xs)


def _refused_by_pytorch() -> dict[str, tuple[Tensor, str]]:
    x = torch.ones(2)
    with FakeTensorMode():
        fake = torch.ones(2)
    return {
        "nested": (torch.nested.nested_tensor([x[:1], x]), r"\[0\] must be a dense tensor, got a nested one"),
        "jagged": (
            torch.nested.nested_tensor([x[:1], x], layout=torch.jagged),
            r"\[0\] must (be a dense tensor|have the same shape), got",
        ),
        "fake": (fake, "must both be meta, fake or real tensors, got (a real one and a fake|a fake one and a real)"),
        "negated": (torch.complex(x, x).conj().imag, r"\[0\] must not be a negated view"),
    }


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
@pytest.mark.parametrize("kind", ["nested", "jagged", "fake", "negated"])
def test_what_pytorch_refuses_is_named(kind, chosen):
    bad, match = _refused_by_pytorch()[kind]
    for places in (STATES[:5], ("targets", "sources")):
        for place in places:
            lists = {name: [torch.ones(2)] for name in places} | {place: [bad]}
            call = partial(ema_update_, momentum=0.5)
            if "params" in lists:
                call, lists["steps"] = partial(adamw_ema_step_, **NUMBERS), [torch.tensor(0.0)]
            with fastssl.use_backend(chosen):
                if kind == "negated" and (chosen == "reference" or place in ("grads", "sources")):
                    call(**lists)  # PyTorch takes it
                    continue
                with pytest.raises(ValueError, match=(place if kind != "fake" else "") + match):
                    call(**lists)
    steps = {"steps": [torch.tensor(0.0).to_sparse()]}
    with fastssl.use_backend(chosen), pytest.raises(ValueError, match=r"steps\[0\] must be a .*"):
        adamw_ema_step_(**{name: [torch.ones(2)] for name in STATES[:5]} | steps, **NUMBERS)


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
def test_step_refuses_low_precision_and_shared_memory(chosen):
    low = {name: [torch.zeros(())] if name == "steps" else [torch.ones(2).bfloat16()] for name in STATES}
    states = _small()
    shared = "params, .*ema_params and steps must not share memory, got "
    with fastssl.use_backend(chosen):
        with pytest.raises(ValueError, match=r"params\[0\] must be float32 or float64, got .*[Bb][Ff]loat16"):
            adamw_ema_step_(**low, **NUMBERS)
        for name, other in (
            ("grads", "params"),
            ("exp_avgs", "grads"),
            ("exp_avg_sqs", "grads"),
            ("ema_params", "grads"),
        ):
            with pytest.raises(ValueError, match=shared + rf"({name}\[0\] and {other}|{other}\[0\] and {name})\[0\]"):
                adamw_ema_step_(**states | {name: states[other]}, **NUMBERS)
        twice = {name: [*xs, *(y.clone() for y in xs)] for name, xs in states.items()}
        twice["ema_params"][1] = twice["params"][0]
        with pytest.raises(ValueError, match=shared):
            adamw_ema_step_(**twice, **NUMBERS)
        alone = {name: [*xs, *(y.clone() for y in xs)] for name, xs in states.items()}
        one = torch.zeros(1)
        for steps in (states["steps"] * 2, [one[0], one.view(())], [twice["params"][1][1], torch.zeros(())]):
            with pytest.raises(ValueError, match=r"and steps must not share memory, got .*steps\[[01]\]"):
                adamw_ema_step_(**alone | {"steps": steps, "params": twice["params"]}, **NUMBERS)
        with pytest.raises(ValueError, match=r"exp_avgs\[0\] must have no two elements in one place"):
            adamw_ema_step_(**states | {"exp_avgs": [torch.ones(1).expand(2)]}, **NUMBERS)
    assert all((x == (name != "steps")).all() for name, xs in states.items() for x in xs)
