"""AdamW's step that moves a teacher too: `adamw_ema_step_` with every kernel."""

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
from tests.accuracy import same_bits, with_tensors, worst_error
from tests.inputs import DTYPES, ragged

MOMENTA = (0.3, 0.996)  # on either side of where lerp changes its starting point


STATES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "ema_params", "steps")
NUMBERS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}


def _parameters(dtype: torch.dtype = torch.float32, ema: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """What AdamW holds in the middle of training."""
    states = dict(zip(STATES, (ragged(dtype, seed) for seed in range(5)), strict=False))
    states["exp_avg_sqs"] = [x.square_() for x in states["exp_avg_sqs"]]
    states["ema_params"] = ragged(ema, 4)
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
            2 * worst_error([x.to(written) for x in eager[name]], truth[name])
            + torch.finfo(torch.float32 if written != torch.float64 else dtype).eps * largest
        )
        assert worst_error(states[name], truth[name]) <= allowed, name


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
            assert same_bits(x, torch.tensor([math.inf, -math.inf, -0.0, 1.0], dtype=x.dtype))


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
