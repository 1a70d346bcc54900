"""The losses of DINO and iBOT: what they are, which views they compare, and gradients taken in the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastssl
from fastssl.functional import dino_loss, ibot_loss, prototype_distillation_loss
from tests.recorder import Recorder

pytestmark = pytest.mark.usefixtures("device")

INF, NAN = float("inf"), float("nan")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    return _normal(*shape, seed=seed).requires_grad_()


def test_dino_loss_is_lightlys(lightly, kernels):
    student, teacher, center = _leaf(6, 5, 33), _normal(2, 5, 33, seed=1), _normal(33, seed=2)
    criterion = lightly.DINOLoss(33, 0.07, 0.07, student_temp=0.2)
    criterion.center.data = center.expand(1, 1, 33)
    loss = criterion(list(teacher), list(student))
    ours = dino_loss(student, teacher, student_temperature=0.2, teacher_temperature=0.07, center=center)
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, loss)), rtol=1e-4, atol=1e-6)


def test_ibot_loss_is_lightlys(lightly, kernels):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)[:, None]
    student, teacher, center = _leaf(6, 33), _normal(6, 33, seed=1), _normal(1, 33, seed=2)
    criterion = lightly.IBOTPatchLoss(33)
    criterion.center.center = center
    loss = criterion(teacher, student, mask)
    weights = (1 / mask.sum((1, 2), keepdim=True)).expand_as(mask)[mask]
    ours = ibot_loss(student, teacher, center=center, weights=weights) * len(weights) / len(mask)
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, loss)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [*range(1, 20), 31, 33, 63, 64, 65, 127, 128, 129, 511, 513, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_length_of_a_row(columns, dtype, kernels):
    """A row that starts at a cache line, and one that does not."""
    student, teacher, center = (3 * _normal(2, 3, columns)).to(dtype), _normal(2, 3, columns, seed=1).to(dtype), None
    center = _normal(columns, seed=2)
    x, t, c = (y.double() for y in (student, teacher, center))
    x.requires_grad_()
    expected = -(((t.flip(0) - c) / 0.04).softmax(-1) * (x / 0.1).log_softmax(-1)).sum((0, 2)) / 2
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    student.requires_grad_()
    loss = dino_loss(student, teacher, center=center, reduction="none")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=2 * eps, atol=1e-5)
    for value, times in ((loss.sum(), 1), (dino_loss(student, teacher, center=center), 3)):
        (found,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(times * found.double(), gradient, rtol=4 * eps, atol=2e-5)


@pytest.mark.parametrize("views", [(2, 2), (4, 2), (5, 1), (2, 3), (3, 3), (1, 2), (7, 4)])
def test_views_as_a_tensor_as_a_list_and_in_groups(views, backend):
    """The same bits, whatever the logits lie in."""
    s, t = views
    student, teacher = _leaf(s, 3, 37), _normal(t, 3, 37, seed=1)
    forms = [
        (student, teacher),
        (list(student), list(teacher)),
        ([student[: s // 2], *student[s // 2 :]], [teacher[:1], *teacher[1:2], teacher[2:]]),
        (iter(student), (x for x in teacher)),
    ]
    expected = sum(
        -((teacher[j] / 0.04).softmax(-1) * (student[i] / 0.1).log_softmax(-1)).sum(-1)
        for i in range(s) for j in range(t) if i != j
    ) / (s * t - min(s, t))  # fmt: skip
    results = []
    for form in forms:
        loss = dino_loss(*form, reduction="none")
        results.append((loss, *torch.autograd.grad(loss.sum(), student)))
    torch.testing.assert_close(
        results[0], (expected, *torch.autograd.grad(expected.sum(), student)), rtol=1e-5, atol=1e-5
    )
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


def test_a_view_without_a_teacher_takes_no_part(backend):
    """The only view of the teacher has the number of the student's first."""
    student, teacher = _normal(3, 2, 9), _normal(1, 2, 9, seed=1)
    student[0] = NAN
    student.requires_grad_()
    for reduction in ("mean", "none"):
        loss = dino_loss(student, teacher, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and not gradient[0].any() and gradient[1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_infinite_logits_and_nan(side, dtype, kernels):
    """As it is said in docs/bad-input.md, of float64's result: each row has its own."""
    student, teacher = (3 * _normal(9, 40, seed=seed).to(dtype) for seed in (0, 1))
    x = student if side == "student" else teacher
    for row, value in enumerate((NAN, INF, -INF), 1):
        x[row, 7] = value
    x[6] = -INF
    teacher[3, 7] = teacher[3].max() if side == "student" else -INF
    student[7, 7], teacher[7, 7] = -INF, -INF
    expected, (gradient,) = _float64(student, teacher)
    student.requires_grad_()
    loss = ibot_loss(student, teacher, reduction="none")
    assert torch.equal(loss.isnan(), expected.isnan()) and torch.equal(loss.isinf(), expected.isinf())
    assert expected.isnan().tolist()[:3] == [False, True, True]
    assert expected.isinf().sum() == (side == "student") and expected[6].isnan() and expected[7].isnan()
    settled, eps = expected.isfinite(), torch.finfo(dtype).eps
    torch.testing.assert_close(loss[settled].double(), expected[settled], rtol=max(1e-5, eps), atol=1e-5)
    for value in (loss.sum(), ibot_loss(student, teacher, reduction="sum")):
        (found,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(found.double(), gradient, rtol=max(1e-4, eps), atol=1e-5, equal_nan=True)


def _float64(student: Tensor, teacher: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = student.double().requires_grad_()
    loss = -((teacher.double() / 0.04).softmax(-1) * (x / 0.1).log_softmax(-1)).sum(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)


@pytest.mark.parametrize("student_slope", [-20, 0, 20])
@pytest.mark.parametrize("teacher_slope", [-20, 0, 20])
def test_rows_that_rise_and_fall(student_slope, teacher_slope, kernels):
    """A row's maximum is found at its end, at its beginning, or by and by; a part of it may be at minus infinity."""
    slope = torch.linspace(-1, 1, 2100)
    student = student_slope * slope + _normal(3, 2100)
    teacher = teacher_slope * slope + _normal(3, 2100, seed=1)
    student, teacher = student - 40, teacher - 40  # below what the end of a row is padded with
    teacher[1, :600], teacher[2, 1000:] = -INF, -INF
    expected, (gradient,) = _float64(student, teacher)
    loss = ibot_loss(student.requires_grad_(), teacher, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), student)[0].double(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e30, 1e37])
def test_huge_logits(scale, kernels):
    """A softmax is then a maximum."""
    student, teacher = scale * _normal(5, 70), scale * _normal(5, 70, seed=1)
    expected, (gradient,) = _float64(student, teacher)
    student.requires_grad_()
    loss = ibot_loss(student, teacher, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), student)[0].double(), gradient, rtol=1e-6, atol=1e-6)


def test_logits_at_the_end_of_the_range(kernels):
    """Their distance is more than float32 holds, and what 1 / temperature makes of an exponent may be."""
    student = torch.tensor([3e38, -3e38, 0.0]).repeat(23)[:67].repeat(2, 1)
    teacher = torch.full_like(student, -1.0).scatter(1, torch.tensor([[1], [65]]), 0.0)
    x = student.double().requires_grad_()
    expected = -((teacher.double() / 0.04).softmax(-1) * (x / 10).log_softmax(-1)).sum(-1)
    student.requires_grad_()
    loss = ibot_loss(student, teacher, student_temperature=10, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    gradients = (torch.autograd.grad(value.sum(), z)[0].double() for value, z in ((loss, student), (expected, x)))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
    student = teacher.clone().requires_grad_()
    loss = ibot_loss(student, teacher, student_temperature=3.5e-39, teacher_temperature=3.5e-39)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_even(dtype, kernels):
    """At the beginning of a row, and at an end that is no whole vector."""
    eps, places = torch.finfo(dtype).eps, torch.tensor([[0, 1], [65, 66]]).repeat(2, 1)
    student = torch.full((4, 67), -1000.0).scatter(1, places, 0.0).to(dtype).requires_grad_()
    teacher = torch.full((4, 67), -1000.0).scatter(1, places[:, :1], 0.0).to(dtype)
    weights = 2 + eps * torch.tensor([1.0, 1.0, 3.0, 3.0])  # twice a tie between two numbers of the dtype
    options = {"student_temperature": 1, "teacher_temperature": 1, "weights": weights, "reduction": "sum"}
    (gradient,) = torch.autograd.grad(ibot_loss(student, teacher, **options), student)
    expected = torch.tensor([1.0, 1.0, 1 + 2 * eps, 1 + 2 * eps])
    assert torch.equal(gradient.float().gather(1, places), torch.stack([-expected, expected], 1))


@pytest.mark.parametrize("columns", [65536, 65537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_bypass_the_cache(dtype, columns, kernels):
    """Of more than 32 MiB, in rows that begin at a cache line, and in rows that do not."""
    if kernels == "portable":
        pytest.skip("has no such path")
    rows = (1 << 25) // (dtype.itemsize * columns) + 2
    student, teacher = (_normal(1, columns, seed=seed).to(dtype).expand(rows, -1) for seed in (0, 1))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(ibot_loss(student, teacher, reduction="sum"), student)
    expected = 10 * ((student[0].double() / 0.1).softmax(-1) - (teacher[0].double() / 0.04).softmax(-1))
    torch.testing.assert_close(gradient[0].double(), expected, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-6)
    assert torch.equal(gradient, gradient[:1].expand(rows, -1))


def test_logits_far_from_zero_lose_nothing(kernels):
    """Half of a log-sum-exp of 1e5 is rounding error where it is added to a product as large."""
    student, teacher = 1e4 + _normal(5, 70).bfloat16().float(), _normal(5, 70, seed=1)
    loss = ibot_loss(student, teacher, reduction="none")
    torch.testing.assert_close(loss.double(), _float64(student, teacher)[0], rtol=1e-5, atol=0)


def test_reductions_are_of_the_mean_over_pairs(backend):
    student, teacher = _normal(4, 3, 9), _normal(2, 3, 9, seed=1)
    losses = dino_loss(student, teacher, reduction="none")
    torch.testing.assert_close(dino_loss(student, teacher, reduction="sum"), losses.sum())
    torch.testing.assert_close(dino_loss(student, teacher), losses.mean())


def test_one_prototype(kernels):
    student = _leaf(3, 4, 1)
    loss = dino_loss(student, _normal(2, 4, 1))
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction, backend):
    student, views = _leaf(0, 5), _leaf(3, 0, 5)
    for x, loss in (
        (student, ibot_loss(student, student.detach(), weights=torch.ones(0), reduction=reduction)),
        (views, dino_loss(views, views.detach()[:2], reduction=reduction)),
    ):
        assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape
        assert loss.shape == (0,) if reduction == "none" else loss.isnan() if reduction == "mean" else loss == 0


@pytest.mark.parametrize("temperature", [0.0, -0.1, NAN])
@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
def test_a_tensor_that_is_no_temperature(name, temperature, chosen):
    with fastssl.use_backend(chosen):
        assert ibot_loss(_normal(3, 5), _normal(3, 5), **{name: torch.tensor(temperature)}).isnan()


def test_constants_get_no_gradient(backend):
    student, teacher, center = _leaf(2, 3, 5), _leaf(2, 3, 5, seed=1), _leaf(5, seed=2)
    temperature = torch.tensor(0.1, requires_grad=True)
    dino_loss(student, teacher, center=center, teacher_temperature=temperature).backward()
    assert student.grad.any() and teacher.grad is center.grad is temperature.grad is None


# Gradients taken in the forward pass

BACKWARD = {"distillation_loss_backward", "distillation_loss_backward_portable"}
SCALED = {"scale_", "scale_portable_"}


def _loss(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A leaf, and a loss of it."""
    x = _normal(3, 4, 50).to(dtype).requires_grad_()
    return x, dino_loss(x, _normal(2, 4, 50, seed=1).to(dtype))


def _reference_gradient() -> Tensor:
    with fastssl.use_backend("reference"):
        x, loss = _loss()
        return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("factor", [1.0, 0.3, 65536.0, 0.0, -2.0])
def test_a_loss_weight(factor, backend):
    x, loss = _loss()
    with Recorder() as ran:
        (gradient,) = torch.autograd.grad(factor * loss, x)
    assert ran & SCALED and not ran & BACKWARD
    torch.testing.assert_close(gradient, factor * _reference_gradient(), rtol=1e-4, atol=1e-6 * abs(factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_scale(dtype, backend):
    """In float16 a gradient may be too small before it is multiplied."""
    x = (0.01 * _normal(64, 3000)).to(dtype).requires_grad_()
    teacher, weights = (0.01 * _normal(64, 3000, seed=1)).to(dtype), torch.full((64,), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(ibot_loss(x, teacher, weights=weights)).backward()
    y = x.detach().double().requires_grad_()
    with fastssl.use_backend("reference"):
        (expected,) = torch.autograd.grad(ibot_loss(y, teacher.double(), weights=weights.double()), y)
    assert expected.abs().median() < 1e-6
    error = (x.grad.double() / 2**14 - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_what_was_handed_out_is_not_touched_again(backend):
    x, loss = _loss()
    with Recorder() as ran:
        (first,) = torch.autograd.grad(loss, x, 2 * torch.ones(()), retain_graph=True)
        assert not ran & BACKWARD
        copy = first.clone()
        (second,) = torch.autograd.grad(-3 * loss, x, retain_graph=True)
        assert ran & BACKWARD
        (third,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, copy)
    torch.testing.assert_close([first / 2, second / -3, third], [_reference_gradient()] * 3, rtol=1e-4, atol=1e-6)


def test_gradients_accumulate(backend):
    """In a leaf's `grad`, which may be the very memory that was handed out."""
    x, loss = _loss()
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 3 * _reference_gradient(), rtol=1e-4, atol=1e-6)


def test_the_gradient_is_kept_once(backend):
    """What the forward pass took is neither copied nor held when it has been handed out."""
    x, loss = _loss()
    [[[piece]]] = loss.grad_fn.taken
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert gradient.data_ptr() == piece.data_ptr() and not loss.grad_fn.taken


def test_many_prototypes_a_center_and_a_second_backward_pass(kernels):
    """In several blocks of prototypes, each with its part of the center; gradients of another factor than the first."""
    x, w, y, v = _leaf(7, 16), _leaf(1500, 16, seed=1), _normal(7, 16, seed=2), _normal(1500, 16, seed=3)
    center, weights = _normal(1500, seed=4), _normal(7, seed=5).abs()
    loss = prototype_distillation_loss(x, w, y, v, center=center, weights=weights)
    with fastssl.use_backend("reference"):
        expected = ibot_loss(x @ w.T, y @ v.T, center=center, weights=weights)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(expected, (x, w))
    for factor in (2.0, -3.0):
        found = torch.autograd.grad(factor * loss, (x, w), retain_graph=True)
        torch.testing.assert_close(found, tuple(factor * g for g in gradients), rtol=1e-4, atol=1e-5)


def test_second_derivatives(backend):
    def product() -> tuple[Tensor, ...]:
        x, loss = _loss()
        (gradient,) = torch.autograd.grad(2 * loss, x, create_graph=True)
        return gradient.detach(), *torch.autograd.grad((gradient * _normal(3, 4, 50, seed=3)).sum(), x)

    results = product()
    with fastssl.use_backend("reference"):
        torch.testing.assert_close(results, product(), rtol=1e-4, atol=1e-5)


def test_checkpoint(backend):
    x, teacher = _leaf(6, 50), _normal(6, 50, seed=1)
    losses = ibot_loss(x, teacher), checkpoint(ibot_loss, x, teacher, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in losses))


def test_float16_leaves_its_gradient_to_the_backward_pass(backend):
    x, loss = _loss(torch.float16)
    with Recorder() as ran:
        torch.autograd.grad(loss, x)
    assert ran & BACKWARD and not ran & SCALED


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("as_tensors", [True, False])
def test_temperatures_and_rows_that_change_are_compiled_twice(reduction, as_tensors):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ibot_loss, fullgraph=True, backend=counter)
    for i in range(12):
        student, teacher = _leaf(5 + 3 * i, 20), _normal(5 + 3 * i, 20, seed=1)
        temperature = torch.tensor(0.04 + i / 100) if as_tensors else 0.04 + i / 100
        results = []
        for function in (compiled, ibot_loss):
            loss = function(student, teacher, teacher_temperature=temperature, reduction=reduction)
            results.append((loss.detach(), *torch.autograd.grad(2 * loss.sum(), student)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("as_tensors", [True, False])
def test_multi_crop_with_schedules_is_compiled_twice(as_tensors):
    """Views in lists, as a training loop has them, temperatures and a center that change at every step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dino_loss, fullgraph=True, backend=counter)
    for i in range(12):
        student = [_leaf(4, 20, seed=v) for v in range(5)]
        teacher, center = list(_normal(2, 4, 20, seed=5)), _normal(20, seed=i)
        numbers = {"student_temperature": 0.1 + i / 50, "teacher_temperature": 0.04 + i / 100}
        if as_tensors:
            numbers = {name: torch.tensor(value) for name, value in numbers.items()}
        results = []
        for function in (compiled, dino_loss):
            loss = function(student, teacher, center=center, **numbers)
            results.append((loss.detach(), *torch.autograd.grad(2 * loss, student)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_features_of_changing_rows_are_compiled_twice():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prototype_distillation_loss, fullgraph=True, backend=counter)
    student_prototypes, teacher_prototypes = _leaf(20, 6), _normal(20, 6, seed=1)
    for i in range(8):
        student, teacher = _leaf(5 + 3 * i, 6), _normal(5 + 3 * i, 6, seed=1)
        arguments = student, student_prototypes, teacher, teacher_prototypes
        numbers = {"teacher_temperature": 0.04 + i / 100, "weights": _normal(len(student), seed=2).abs()}
        results = []
        for function in (compiled, prototype_distillation_loss):
            loss = function(*arguments, **numbers)
            results.append((loss.detach(), *torch.autograd.grad(2 * loss, arguments[:2])))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2
