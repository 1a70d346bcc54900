"""The module EMA: a teacher and its student."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastssl.nn import EMA
from fastssl.optim import AdamW

pytestmark = pytest.mark.usefixtures("device")

SCHEDULES = ({}, {"schedule": "cosine", "total_steps": 4}, {"schedule": "warmup"})


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


@pytest.mark.parametrize("gamma, power", [(1.0, 2 / 3), (5.0, 1.0)])
def test_warm_up(gamma, power):
    student = _model()
    teacher = EMA(student, 0.7, schedule="warmup", warmup_gamma=gamma, warmup_power=power)
    momenta = [teacher.update(student) for _ in range(30)]
    expected = [min(0.7, 1 - 1 / (1 + k / gamma) ** power) for k in range(30)]
    assert momenta == pytest.approx(expected, abs=1e-12) and momenta[0] == 0 and momenta[-1] == 0.7


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


class _Extremes(nn.Module):
    """What a model may hold beside weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.register_buffer("positions", torch.arange(3).expand(2, 3))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("cache", torch.full((2,), math.inf), persistent=False)
        self.register_buffer("late", None)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_masks_of_infinity_stay(schedule, backend):
    student = _Extremes()
    teacher = EMA(student, 0.9, **schedule)
    for _ in range(3):
        with torch.no_grad():
            student.weight += 1
        teacher.update(student)
    assert torch.equal(teacher.module.mask, student.mask) and teacher.module.weight.isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_text_tower_of_open_clip(schedule, open_clip_transformer):
    """Its attention mask is half -inf; here it is in the state_dict, as in older checkpoints, or not."""
    for persistent in (False, True):
        student = open_clip_transformer.TextTransformer(
            context_length=8, vocab_size=50, width=16, heads=2, layers=1, output_dim=8
        )
        student.register_buffer("attn_mask", student.attn_mask, persistent=persistent)
        teacher, fused = EMA(student, 0.5, **schedule), EMA(student, 0.5, **schedule)
        optimizer = AdamW(student.parameters(), 0.1, teacher=fused, student=student)
        tokens = torch.randint(1, 50, (2, 8))
        for _ in range(3):
            student(tokens).square().sum().backward()
            optimizer.step()
            teacher.update(student)
        for ours in (teacher, fused):
            assert torch.equal(ours.module.attn_mask, student.attn_mask) and ours.module.attn_mask.isinf().any()
            assert ours(tokens).isfinite().all() and all(p.isfinite().all() for p in ours.module.parameters())
        torch.testing.assert_close(teacher.state_dict(), fused.state_dict())


def test_what_is_averaged_and_what_is_copied(timm):
    """As timm has it: complex and integer tensors are copied, and what no state_dict has is each model's own."""
    student = _Extremes()
    teacher, other = EMA(student, 0.9), timm.utils.ModelEmaV3(nn.Sequential(*[student]), 0.9)
    other.module[0].expanded = other.module[0].expanded.clone()  # timm cannot write expanded buffers
    other.module[0].positions = other.module[0].positions.clone()
    with torch.no_grad():
        for x in (student.weight, student.phase, student.codes, student.cache):
            x += 1
        student.positions, student.flag = student.positions + 1, torch.tensor(True)
    other.module[0].mask.zero_()  # timm makes NaN of infinity
    kept, student.mask = student.mask, torch.zeros(3, 3)
    teacher.module.mask.zero_()
    teacher.update(student)
    other.update(nn.Sequential(student))
    torch.testing.assert_close(teacher.module.state_dict(), other.module[0].state_dict())
    assert torch.equal(teacher.module.phase, student.phase) and torch.equal(teacher.module.positions, student.positions)
    assert teacher.module.cache.isinf().all() and kept.isinf().any()


def test_buffers_that_come_later_or_change_their_size():
    student = _Extremes()
    teacher = EMA(student, 0.9)
    before = copy.deepcopy(teacher.state_dict())
    student.cache = torch.ones(7)  # each model's own
    teacher.update(student)
    student.late = torch.ones(2)
    with pytest.raises(ValueError, match="model must have the teacher's 7 tensors, got 8; not in both: late"):
        teacher.update(student)
    student.late, student.mask = None, torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"mask of model must have the teacher's shape \(3, 3\), got \(4, 4\)"):
        teacher.update(student)
    assert teacher.step == 1
    torch.testing.assert_close({**teacher.state_dict(), "step": before["step"]}, before)


def test_a_teacher_takes_what_a_low_precision_model_takes():
    """Its output is that of a model of the teacher's weights, rounded; `module` keeps the digits."""
    student = _model().bfloat16()
    teacher, x = EMA(student, 0.999), torch.randn(4, 6).bfloat16()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01)
    teacher.update(student)
    rounded = copy.deepcopy(teacher.module).bfloat16()
    assert torch.equal(teacher(x), rounded(x)) and teacher(x).dtype == torch.bfloat16
    assert teacher.module(x.float()).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in teacher.module.parameters())
    assert torch.equal(torch.compile(teacher, backend="aot_eager", fullgraph=True)(x), rounded(x))
    before = teacher.module[1].running_mean.clone()
    teacher.train()
    rounded.train()
    assert torch.equal(teacher(x), rounded(x))
    assert not torch.equal(teacher.module[1].running_mean, before)
    torch.testing.assert_close(teacher.module[1].running_mean, rounded[1].running_mean.float())
    assert teacher.module[1].num_batches_tracked == 1


@pytest.mark.parametrize("prefix", ["", "method."])
def test_loads_the_models_state_dict_and_timms(prefix, timm):
    student, other = _model(), _model()
    _train(other)
    expected = {f"module.{name}": x.clone() for name, x in other.state_dict().items()}
    for state in (other.state_dict(), timm.utils.ModelEmaV3(other).state_dict(), EMA(other).state_dict()):
        teacher = EMA(student)
        for _ in range(2):
            teacher.update(student)
        owner = nn.ModuleDict({"method": teacher}) if prefix else teacher
        owner.load_state_dict({f"{prefix}{name}": x for name, x in state.items()})
        torch.testing.assert_close(teacher.state_dict(), {**expected, "step": state.get("step", torch.tensor(2))})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*odd"):
        EMA(student).load_state_dict(other.state_dict() | {"odd": torch.ones(2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        EMA(student).load_state_dict({"step": torch.tensor(1)})


def test_a_model_with_a_step_and_a_module_of_its_own():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.register_buffer("step", torch.tensor(7.0))

    student = Model()
    teacher = EMA(student)
    teacher.update(student)
    state = copy.deepcopy(student.state_dict())
    state["step"] += 1
    teacher.load_state_dict(state)
    assert teacher.step == 1 and teacher.module.step == 8
    again = EMA(student)
    again.load_state_dict(teacher.state_dict())
    assert again.step == 1 and again.module.step == 8


def test_distributed_checkpoints_load_its_step(tmp_path):
    student = _model()
    teacher, resumed = (EMA(student, 0.9, schedule="cosine", total_steps=10) for _ in range(2))
    for _ in range(3):
        teacher.update(student)
    resumed.update(student)
    dcp.save({"teacher": teacher.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"teacher": resumed.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    assert resumed.step == 3 and resumed.update(student) == teacher.update(student)
    assert resumed.step == 4


@pytest.mark.parametrize("warmup", [False, True])
def test_steps_are_counted_as_timm_counts_them(warmup, timm):
    student = _model()
    teacher = EMA(student, decay=0.7, schedule="warmup" if warmup else None)
    other = timm.utils.ModelEmaV3(student, decay=0.7, use_warmup=warmup)
    for step in (0, 1, 2, 3, 7, 100):
        _train(student)
        assert teacher.update(student, step=step) == pytest.approx(other.get_decay(step), abs=1e-12)
        other.update(student, step=step)
        assert teacher.step == step
        torch.testing.assert_close(teacher.module.state_dict(), other.module.state_dict())
    assert teacher.update(student) == teacher.decay == 0.7 and teacher.step == 101
    for step, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="step must"):
            teacher.update(student, step)


def test_momentum_is_also_called_decay():
    student = _model()
    teacher = EMA(student, decay=0.9)
    assert teacher.momentum == teacher.decay == teacher.update(student) == 0.9
    teacher.decay = 0.8
    assert teacher.momentum == teacher.update(student) == copy.deepcopy(teacher).momentum == 0.8
    for name in ("momentum", "decay"):
        with pytest.raises(ValueError, match=f"{name} must be from 0 to 1, got 2"):
            setattr(teacher, name, 2)
    with pytest.raises(ValueError, match="momentum or decay must be given, not both, got 0.5 and 0.9"):
        EMA(student, 0.5, decay=0.9)


@pytest.mark.parametrize("how", ["schedule", "number", "step"])
def test_update_compiles_once_or_twice(how):
    """Whatever changes the momentum at every step."""
    student = _model()
    options = {"schedule": "cosine", "total_steps": 30} if how == "schedule" else {}
    teacher, eager = (EMA(student, 0.9, **options) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    update = torch.compile(lambda *step: teacher.update(student, *step), fullgraph=True, backend=counter)
    for i in range(12):
        _train(student)
        if how == "number":
            teacher.momentum = eager.momentum = 0.5 + i / 100
        step = [i + 1] if how == "step" else []
        assert float(update(*step)) == pytest.approx(eager.update(student, *step), abs=1e-12)
        torch.testing.assert_close(teacher.state_dict(), eager.state_dict())
    assert counter.frame_count <= 3  # two, of which PyTorch starts the first anew if it makes a tensor of the number
    assert teacher.update(student) == eager.update(student)


def test_models_without_a_moving_average():
    sparse, short = nn.Linear(2, 2), nn.Linear(2, 2)
    sparse.register_buffer("adjacency", torch.eye(2).to_sparse())
    short.register_buffer("codes", torch.ones(2).to(torch.float8_e4m3fn))
    for model, match in (
        (nn.LazyLinear(2), "model must be initialised, but weight waits for a first batch"),
        (sparse, "model .* averaged, but adjacency must be a dense tensor"),
        (short, "model .* averaged, but codes must be of 16, 32 or 64 bits, floating-point, got .*(8|char)"),
    ):
        with pytest.raises(ValueError, match=match):
            EMA(model)


def test_parameters_that_are_tied_and_buffers_that_share_memory():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.register_buffer("row", model[0].weight.data[0])
    model.register_buffer("element", model.row[1])
    teacher = EMA(model, 0.0)
    with torch.no_grad():
        model[0].weight += 1
    teacher.update(model)
    assert teacher.module[1].weight is teacher.module[0].weight
    torch.testing.assert_close(teacher.module.state_dict(), model.state_dict())


def test_bad_teachers():
    student = _model()
    with pytest.raises(ValueError, match="momentum must be from 0 to 1, got 2"):
        EMA(student, 2)
    with pytest.raises(ValueError, match="schedule must be None, 'cosine' or 'warmup', got 'linear'"):
        EMA(student, schedule="linear")
    for options in (
        {"schedule": "cosine"},
        {"total_steps": 5},
        {"schedule": "cosine", "total_steps": 0},
        {"schedule": "warmup", "total_steps": 5},
    ):
        with pytest.raises(ValueError, match="total_steps must be"):
            EMA(student, **options)
    for options in ({"schedule": "warmup", "warmup_gamma": 0}, {"warmup_gamma": 2.0}):
        with pytest.raises(ValueError, match="warmup_gamma must be positive, and is for 'warmup' alone, got [02]"):
            EMA(student, **options)
    for options, match in (
        ({"model": [student]}, "model must be a Module, got list"),
        ({"total_steps": "5", "schedule": "cosine"}, "total_steps must be an integer, got str"),
        ({"update_buffers": 1}, "update_buffers must be True or False, got 1"),
        ({"momentum": None}, "momentum must be a number, got NoneType"),
    ):
        with pytest.raises(TypeError, match=match):
            EMA(**{"model": student, **options})
    with pytest.raises(TypeError, match="model must be a Module, got OrderedDict"):
        EMA(student).update(student.state_dict())
    with pytest.raises(TypeError, match="warmup_power must be a number, got str"):
        EMA(student, schedule="warmup", warmup_power="1")
    teacher = EMA(student)
    before = copy.deepcopy(teacher.state_dict())
    for other, match in (
        (nn.Linear(6, 5), "model must have the teacher's 9 tensors, got 2; not in both: 0.bias, "),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(6), nn.Linear(5, 2)), r"1.weight .* shape \(5,\), got \(6,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            teacher.update(other)
    student[1].num_batches_tracked = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"1.num_batches_tracked of model must have .*\(\), got \(2,\)"):
        teacher.update(student)
    torch.testing.assert_close(teacher.state_dict(), before)
