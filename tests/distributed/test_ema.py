"""Moving averages of sharded parameters, in two processes: together they do what one process does."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

import fastssl
from fastssl.functional import adamw_ema_step_, ema_update_
from fastssl.nn import EMA
from fastssl.optim import AdamW
from tests.distributed.processes import needs_gloo, run_processes

pytestmark = needs_gloo


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """One row that only one of two processes has, and a batch normalisation, whose buffers are not sharded."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).to(dtype)


def _shard(model: nn.Sequential, **options) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}


def _fully_sharded(backend: str) -> None:
    students = _model(), _model()
    teachers = [EMA(student, 0.9, schedule="cosine", total_steps=5) for student in students]
    for model in (students[1], teachers[1].module):
        _shard(model)
    optimizers = [
        AdamW(student.parameters(), 0.1, teacher=teacher, student=student)
        for student, teacher in zip(students, teachers, strict=True)
    ]
    x = torch.randn(4, 6)
    for _ in range(3):
        for student, optimizer in zip(students, optimizers, strict=True):
            student(x).square().sum().backward()
            with fastssl.use_backend(backend):
                optimizer.step()
            optimizer.zero_grad()
        outputs = [teacher(x) for teacher in teachers]  # after which fully_shard leaves whole parameters there
        torch.testing.assert_close(*outputs)
        for student, teacher in zip(students, teachers, strict=True):
            with torch.no_grad():
                student(x)
            with fastssl.use_backend(backend):
                teacher.update(student)
    assert all(isinstance(p, DTensor) for p in teachers[1].module.parameters())
    for whole, sharded in (students, [teacher.module for teacher in teachers]):
        torch.testing.assert_close(_gathered(sharded.state_dict()), whole.state_dict())
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for place, state in states[0].items():
        torch.testing.assert_close(_gathered(states[1][place]), state)


def _low_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    student = _model(torch.bfloat16)
    teacher, whole = EMA(student, 0.9), EMA(student, 0.9)
    other = copy.deepcopy(student)
    _shard(student)
    _shard(teacher.module, mp_policy=policy)
    for model, of in ((student, teacher), (other, whole)):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01
        of.update(model)
    torch.testing.assert_close(_gathered(teacher.module.state_dict()), whole.module.state_dict())
    x = torch.randn(4, 6).bfloat16()
    torch.testing.assert_close(teacher(x), whole(x))


def _tensors() -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    target, source = torch.randn(5, 4), torch.randn(5, 4)
    expected = 0.75 * target + 0.25 * source
    for placement in (Shard(0), Shard(1), Replicate()):
        ours, other = (distribute_tensor(x.clone(), mesh, [placement]) for x in (target, source))
        ema_update_([ours, alone := target.clone()], [other, source], 0.75)
        torch.testing.assert_close([ours.full_tensor(), alone], [expected, expected])
    sharded, along, whole = (distribute_tensor(target, mesh, [x]) for x in (Shard(0), Shard(1), Replicate()))
    before = sharded.to_local().clone()
    for other, found in (
        (along, r"\(5, 4\) as \(Shard\(dim=0\),\) on .* and \(5, 4\) as \(Shard\(dim=1\),\)"),
        (whole, r"Shard.* and .*Replicate"),
        (target, r"Shard.* and a tensor that is not"),
    ):
        with pytest.raises(ValueError, match=r"targets\[0\] and sources\[0\] must be sharded alike, got .*" + found):
            ema_update_([sharded], [other], 0.5)
        with pytest.raises(ValueError, match=r"params\[0\] and exp_avgs\[0\] must be sharded alike, got .*" + found):
            adamw_ema_step_([sharded], [sharded], [other], [sharded], [sharded], [torch.tensor(0.0)], momentum=0.5)
    with pytest.raises(ValueError, match=r"targets\[0\] must not be a partial sum, got \(Partial"):
        ema_update_(*2 * [[DTensor.from_local(target, mesh, [Partial()])]], 0.5)
    assert torch.equal(sharded.to_local(), before)


def _sharded_before() -> None:
    with pytest.raises(ValueError, match="model must not be sharded by fully_shard yet"):
        EMA(_shard(_model()))
    student, other = _model(torch.bfloat16), _model(torch.bfloat16)
    distribute_module(student, init_device_mesh("cpu", (2,)))
    teacher, alone = EMA(student, 0.5), EMA(other, 0.5)
    for model in (student, other):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.5
    for of, model in ((teacher, student), (alone, other)):
        of.update(model)
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in teacher.module.parameters())
    torch.testing.assert_close(_gathered(teacher.module.state_dict()), alone.module.state_dict())
    with pytest.raises(ValueError, match="must be sharded alike"):
        teacher.update(other)


def _checkpoint(path: Path) -> None:
    student = _model()
    teacher, resumed = EMA(student, 0.9), EMA(student, 0.9)
    for model in (student, teacher.module, resumed.module):
        _shard(model)
    with torch.no_grad():
        for p in student.parameters():
            p += 1
    teacher.update(student)
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=path)
    dcp.load({"teacher": resumed.state_dict()}, checkpoint_id=path)
    torch.testing.assert_close(_gathered(resumed.state_dict()), _gathered(teacher.state_dict()))
    resumed.update(student)
    assert resumed.step == 2


def _all(path: Path) -> None:
    for backend in ("auto", "portable", "reference"):
        _fully_sharded(backend)
    _low_precision()
    _tensors()
    _sharded_before()
    _checkpoint(path)


def test_sharded_parameters(tmp_path):
    run_processes(partial(_all, tmp_path / "checkpoint"), 2, tmp_path)
