"""fastssl.optim.AdamW: torch's, and a teacher."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.nn import EMA
from fastssl.optim import AdamW

pytestmark = pytest.mark.usefixtures("device")


class _Byol(nn.Module):
    """A student with a frozen layer and one that is used every second time; its predictor has no teacher."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 2))
        self.predictor = nn.Linear(2, 2)
        self.student[0].bias.requires_grad_(False)

    def backward(self, step: int) -> None:
        """Gradients and statistics that depend on the step alone."""
        generator = torch.Generator().manual_seed(step)
        for name, p in self.named_parameters():
            gradient = torch.randn(p.shape, generator=generator) + 0.5
            unused = not p.requires_grad or (step % 2 == 0 and name.startswith("student.2"))
            p.grad = None if unused else gradient.to(p.dtype)
        self.student[1].running_mean += step
        self.student[1].num_batches_tracked += 1

    def groups(self) -> list[dict]:
        predictor = {"params": self.predictor.parameters(), "lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0}
        return [{"params": [p for p in self.student.parameters() if p.requires_grad]}, predictor]


def _train_byol(model: _Byol, fused: bool, steps: int) -> tuple[EMA, torch.optim.Optimizer]:
    teacher = EMA(model.student, 0.9, schedule="cosine", total_steps=steps)
    together = {"teacher": teacher, "student": model.student}
    optimizer = (
        AdamW(model.groups(), 0.02, **together) if fused else torch.optim.AdamW(model.groups(), 0.02, foreach=False)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    for step in range(steps):
        model.backward(step)
        optimizer.step()
        if not fused:
            teacher.update(model.student)
        schedule.step()
    return teacher, optimizer


def test_optimizer_is_adamw_and_its_teacher(backend):
    """Over many steps: groups, schedules, parameters without gradients or without a teacher, buffers."""
    runs = [_Byol(), _Byol(), _Byol().double()]
    (ours, adam), (eager, other), (truth, _) = map(_train_byol, runs, (True, False, False), (60, 60, 60))
    assert ours.step == 60 and adam.param_groups[0]["lr"] == pytest.approx(0.01)
    states = zip(*(m.state_dict().items() for m in (ours.module, eager.module, truth.module)), strict=True)
    weights = zip(*(m.state_dict().items() for m in runs), strict=True)
    for (name, x), (_, y), (_, exact) in (*states, *weights):
        error, allowed = ((z.double() - exact).abs().max() for z in (x, y))
        assert error <= 2 * allowed + 3e-7 * exact.abs().max(), name


def _same_states(ours: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    torch.testing.assert_close(ours.state_dict()["state"], other.state_dict()["state"], rtol=1e-5, atol=1e-7)


def test_optimizers_load_each_others_checkpoints():
    """As they are, and the next step is the same."""
    models = _Byol(), _Byol()
    (teacher, ours), (_, other) = map(_train_byol, models, (True, False), (3, 3))
    _same_states(ours, other)
    groups = (optimizer.state_dict()["param_groups"] for optimizer in (ours, other))
    assert [g | {"foreach": None} for g in next(groups)] == [g | {"foreach": None} for g in next(groups)]
    before = copy.deepcopy((ours.state_dict(), other.state_dict()))
    ours.load_state_dict(before[1])
    other.load_state_dict(before[0])
    for model, optimizer in zip(models, (ours, other), strict=True):
        model.backward(3)
        optimizer.step()
    _same_states(ours, other)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-5, atol=1e-7)
    assert ours.state[models[0].predictor.weight]["step"] == 4 and teacher.step == 4
    before[0]["param_groups"][1]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad must be False, got True"):
        ours.load_state_dict(before[0])
    _same_states(ours, other)


def test_optimizer_takes_a_closure_and_a_scaler():
    model = nn.Linear(3, 1)
    teacher = EMA(model, 0.5)
    optimizer = AdamW(model.parameters(), torch.tensor(0.1), teacher=teacher, student=model)
    start = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.requires_grad and (model.weight < start["weight"]).all()
    torch.testing.assert_close(teacher.module.weight, (start["weight"] + model.weight.detach()) / 2)

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, steps in ((1, 2), (math.inf, 2), (1, 3)):  # infinite gradients: no step
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert teacher.step == steps == optimizer.state[model.weight]["step"]
    assert model.weight.isfinite().all() and teacher.module.weight.isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_an_optimizer_moves_its_own_student_and_teacher(copied):
    model = _Byol()
    teacher, optimizer = _train_byol(model, True, 2)
    before = copy.deepcopy((model.state_dict(), teacher.state_dict()))
    other, follower, twin = copied((model, teacher, optimizer))
    assert twin.student is other.student and twin.teacher is follower
    other.backward(2)
    twin.step()
    torch.testing.assert_close((model.state_dict(), teacher.state_dict()), before, rtol=0, atol=0)
    model.backward(2)
    optimizer.step()
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(follower.state_dict(), teacher.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}], ids=str)
def test_takes_what_torchs_constructor_takes(how):
    model, follower = nn.Linear(3, 1), nn.Linear(3, 1)
    follower.load_state_dict(model.state_dict())
    teacher = EMA(model, 0.5)
    arguments = 0.1, (0.8, 0.9), 1e-7, 0.2, False
    ours = AdamW(model.parameters(), *arguments, maximize=False, **how, teacher=teacher, student=model)
    other = torch.optim.AdamW(follower.parameters(), *arguments, maximize=False, **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for x, optimizer in ((model, ours), (follower, other)):
        scaler.scale(x(torch.ones(2, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(model.state_dict(), follower.state_dict())
    assert ours.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert ours.defaults == other.defaults
    _same_states(ours, other)


def test_numbers_may_be_numpys():
    model = nn.Linear(3, 1)
    numbers = {"lr": np.float32(0.5), "betas": (np.float64(0.5), np.float32(0.75)), "eps": np.float16(0.5)}
    groups = [{"params": [model.weight], "weight_decay": np.int64(0)}, {"params": [model.bias]}]
    optimizer = AdamW(groups, **numbers, teacher=EMA(model), student=model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    for group in optimizer.state_dict()["param_groups"]:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.5, 0.75), 0.5)
        assert all(type(x) is float for x in (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"amsgrad": True}, ValueError, "amsgrad must be False, got True"),
        ({"maximize": True}, ValueError, "maximize must be False, got True"),
        ({"capturable": True}, ValueError, "capturable must be False, got True"),
        ({"differentiable": True}, ValueError, "differentiable must be False, got True"),
        ({"fused": True, "foreach": True}, ValueError, "foreach and fused must not both be True, got True and True"),
        ({"lr": -1}, ValueError, "lr must not be negative, got -1"),
        ({"lr": "1"}, TypeError, "lr must be a number.*got str"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9, 1)}, ValueError, r"betas\[1\] must be from 0 to below 1, got 1"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.9))}, TypeError, r"betas\[0\] must be a number, got Tensor"),
        ({"eps": math.nan}, ValueError, "eps must be finite, got nan"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number, got NoneType"),
    ],
)
def test_bad_arguments(arguments, error, match):
    model = nn.Linear(3, 1)
    both = {"teacher": EMA(model), "student": model}
    with pytest.raises(error, match=match):
        AdamW(model.parameters(), **arguments, **both)
    if not {"fused", "foreach"} & arguments.keys():
        with pytest.raises(error, match=match):
            AdamW([{"params": model.parameters(), **arguments}], **both)


def test_loads_a_checkpoint_of_steps_counted_on_the_gpu():
    model = _Byol()
    teacher, ours = _train_byol(model, True, 2)
    state = copy.deepcopy(ours.state_dict())
    for group in state["param_groups"]:
        group["capturable"] = True
    ours.load_state_dict(state)
    model.backward(2)
    ours.step()
    assert not any(group["capturable"] for group in ours.param_groups)
    assert ours.state[model.predictor.weight]["step"] == 3 == teacher.step


def test_bad_optimizers():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    teacher = EMA(model)
    with pytest.raises(TypeError, match=r"teacher must be a fastssl.nn.EMA, got Sequential"):
        AdamW(model.parameters(), teacher=model, student=model)
    with pytest.raises(ValueError, match=r"student must have the teacher's parameters.*got \[\(1, 2\), \(1,\)\]"):
        AdamW(model.parameters(), teacher=teacher, student=nn.Linear(2, 1))
    with pytest.raises(ValueError, match="maximize must be False, got True"):
        AdamW([{"params": model.parameters(), "maximize": True}], teacher=teacher, student=model)
    low = nn.Linear(6, 2).bfloat16()
    optimizer = AdamW(low.parameters(), teacher=EMA(low), student=low)
    low(torch.randn(4, 6).bfloat16()).sum().backward()
    with pytest.raises(ValueError, match=r"params\[0\] must be float32 or float64, got .*[Bb][Ff]loat16"):
        optimizer.step()


def test_steps_are_counted_on_the_cpu_wherever_tensors_are_made():
    model = _Byol()
    optimizer = AdamW(model.groups(), teacher=EMA(model.student, 0.9), student=model.student)
    model.backward(0)
    with torch.device("meta"):
        optimizer.step()
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}
