"""The modules of self-distillation, against the classes they replace and transcriptions of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastssl import nn as ours
from fastssl.functional import koleo_loss, prototype_distillation_loss, sinkhorn_knopp
from fastssl.integrations import dinov2

pytestmark = pytest.mark.usefixtures("device")

K = 37


def _logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _assert_same(mine: nn.Module, theirs: nn.Module, arguments: tuple, leaves: list[Tensor]) -> None:
    """Equal losses and gradients, and equal state afterwards."""
    losses = [module(*arguments) for module in (mine, theirs)]
    torch.testing.assert_close(losses[0], losses[1].squeeze(), rtol=1e-5, atol=1e-6)
    for x, y in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)
    expected = theirs.state_dict()
    assert list(mine.state_dict()) == list(expected)
    for name, x in mine.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7)


def test_a_warm_up_of_one_epoch_has_its_first_temperature():
    loss = ours.DINOLoss(K, warmup_teacher_temp=0.06, teacher_temp=0.04, warmup_teacher_temp_epochs=1)
    assert [loss.teacher_temp_of(epoch) for epoch in (0, 1, None)] == [0.06, 0.04, 0.04]


@pytest.mark.parametrize("teachers, students", [(2, 2), (2, 6), (1, 3)])
def test_dino_as_lightly(lightly, teachers, students, backend):
    options = dict(output_dim=K, warmup_teacher_temp=0.06, teacher_temp=0.04, warmup_teacher_temp_epochs=4)
    mine, theirs = ours.DINOLoss(**options), lightly.DINOLoss(**options)
    for step, arguments in enumerate([{}, *({"epoch": i} for i in (0, 2, 3, 4, 9)), {"teacher_temp": 0.07}]):
        teacher = list(_logits(teachers, 5, K, seed=step))
        student = [x.requires_grad_() for x in _logits(students, 5, K, seed=100 + step)]
        order = tuple(arguments.get(name) for name in ("teacher_temp", "epoch"))
        _assert_same(mine, theirs, (teacher, student, *order), student)
    restored = ours.DINOLoss(**options)
    restored.load_state_dict(theirs.state_dict())
    assert torch.equal(restored.center, theirs.center)


@pytest.mark.parametrize("teacher_temp", [None, 0.05])
def test_ibot_as_lightly(lightly, teacher_temp, backend):
    mine, theirs = ours.IBOTPatchLoss(K), lightly.IBOTPatchLoss(K)
    for step in range(3):
        mask = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(step)) < 0.4
        mask[1] = False  # an image of which nothing is masked
        rows = int(mask.sum())
        student = _logits(rows, K, seed=10 + step).requires_grad_()
        _assert_same(mine, theirs, (_logits(rows, K, seed=step), student, mask, teacher_temp), [student])


@pytest.mark.parametrize("low, queue", [(0, 0), (3, 0), (2, 7)])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_swav_as_lightly(lightly, low, queue, iterations, backend):
    scores = [x.tanh().requires_grad_() for x in _logits(2 + low, 6, K)]
    queues = list(_logits(2, queue, K, seed=1).tanh()) if queue else None
    modules = (loss.SwaVLoss(sinkhorn_iterations=iterations) for loss in (ours, lightly))
    leaves = [x.detach().requires_grad_() for x in scores]
    _assert_same(*modules, (leaves[:2], leaves[2:], queues), leaves)


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("views", [1, 3])
def test_msn_as_lightly(lightly, iterations, weight, views, backend):
    anchors, prototypes = (_logits(n, 12, seed=n).requires_grad_() for n in (views * 6, 9))
    modules = (loss.MSNLoss(0.1, iterations, weight) for loss in (ours, lightly))
    _assert_same(*modules, (anchors, _logits(6, 12), prototypes), [anchors, prototypes])


def _cross_entropy(p: Tensor, logits: Tensor, temperature: float = 0.1) -> Tensor:
    return -(p * (logits / temperature).log_softmax(-1)).sum(-1)


def test_sinkhorn_centers_move_nothing(backend):
    teacher, student = _logits(2, 8, K), _logits(2, 8, K, seed=1)
    loss = ours.DINOLoss(K, teacher_temp=0.05, center_mode="sinkhorn_knopp")
    P = sinkhorn_knopp(teacher, temperature=0.05)
    expected = (_cross_entropy(P[0], student[1]).mean() + _cross_entropy(P[1], student[0]).mean()) / 2
    torch.testing.assert_close(loss(list(teacher), list(student)), expected)
    assert not loss.center.any()


def test_center_once_per_step():
    """Several batches of one step move the center once, by the mean of all their rows."""
    batches = [_logits(2, n, K, seed=n) for n in (3, 5)]
    loss, whole = (ours.DINOLoss(K, center_once_per_step=once) for once in (True, False))
    for teacher in batches:
        loss(list(teacher), list(teacher))
        assert not loss.center.any()
    loss.step_center()
    whole.update_center(torch.cat(batches, 1))
    torch.testing.assert_close(loss.center, whole.center)
    center = loss.center.clone()
    loss.step_center()  # nothing has come since
    assert torch.equal(loss.center, center)
    patches = ours.IBOTPatchLoss(K, center_once_per_step=True)
    for teacher in batches:
        patches(teacher[0], teacher[1], torch.ones(1, 1, len(teacher[0]), dtype=torch.bool))
    patches.step_center()
    torch.testing.assert_close(patches.center.value, 0.1 * torch.cat([x[0] for x in batches]).mean(0, True))


def test_the_center_may_move_before_the_backward_pass():
    student = [x.requires_grad_() for x in _logits(2, 4, K)]
    loss = ours.DINOLoss(K)
    value = loss(list(_logits(2, 4, K, seed=1)), student)
    loss.update_center(_logits(2, 4, K, seed=2))
    assert all(g.any() for g in torch.autograd.grad(value, student))


def test_head(backend):
    torch.manual_seed(0)
    head = ours.DINOHead(10, K, hidden_dim=16, bottleneck_dim=6, freeze_last_layer=1)
    x = torch.randn(5, 10)
    features = head.features(x)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(head.prototypes.norm(dim=1), torch.ones(K))
    torch.testing.assert_close(head(x), features @ head.prototypes.T)
    learned = {name for name, p in head.named_parameters() if p.requires_grad}
    assert {name for name, _ in head.named_parameters()} - learned == {"last_layer.parametrizations.weight.original0"}
    assert ours.DINOHead(10, K, norm_last_layer=False).last_layer.parametrizations.weight.original0.requires_grad
    head(x).sum().backward()
    head.cancel_last_layer_gradients(1)
    assert any(p.grad is not None for p in head.last_layer.parameters())
    head.cancel_last_layer_gradients(0)
    assert all(p.grad is None for p in head.last_layer.parameters())
    assert all(p.grad is not None for p in head.mlp.parameters())


def test_head_loads_weights_of_the_older_names():
    """Those of torch.nn.utils.weight_norm, which the checkpoints of DINO and DINOv2 have."""
    theirs, head = nn.Linear(6, K, bias=False), ours.DINOHead(10, K, hidden_dim=16, bottleneck_dim=6)
    state = {name: x for name, x in head.state_dict().items() if name.startswith("mlp")}
    state |= {"last_layer.weight_g": torch.full((K, 1), 2.0), "last_layer.weight_v": theirs.weight.detach()}
    head.load_state_dict(state)
    torch.testing.assert_close(head.prototypes, 2 * nn.functional.normalize(theirs.weight.detach()))


def test_head_hands_its_prototypes_to_the_fused_loss(backend):
    torch.manual_seed(0)
    student, teacher = (ours.DINOHead(10, K, hidden_dim=16, bottleneck_dim=6).double() for _ in range(2))
    x = torch.randn(2, 5, 10).double()
    losses = [
        prototype_distillation_loss(
            student.features(x[0]), student.prototypes, teacher.features(x[1]), teacher.prototypes
        ),
        _cross_entropy((teacher(x[1]) / 0.04).softmax(-1), student(x[0])).mean(),
    ]
    torch.testing.assert_close(*losses)
    gradients = (torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad]) for loss in losses)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sinkhorn", [False, True])
def test_dinov2(sinkhorn, backend):
    """A step of its training loop, with its classes and with matrices of probabilities."""
    cls, patches = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    centers = torch.zeros(2, K)
    for step in range(3):
        t_cls, t_patch = _logits(6, K, seed=step), _logits(7, K, seed=10 + step)
        s_global, s_local = _logits(6, K, seed=20 + step), list(_logits(4, 3, K, seed=30 + step))
        mask = torch.zeros(2, 9, dtype=torch.bool)
        mask[0, :4], mask[1, 3:6] = True, True
        if sinkhorn:
            handles = (
                cls.sinkhorn_knopp_teacher(t_cls, 0.05),
                patches.sinkhorn_knopp_teacher(t_patch, 0.05, n_masked_patches_tensor=torch.tensor(7)),
            )
            P, Q = (sinkhorn_knopp(t, temperature=0.05) for t in (t_cls, t_patch))
        else:
            handles = cls.softmax_center_teacher(t_cls, 0.05), patches.softmax_center_teacher(t_patch[None], 0.05)[0]
            cls.update_center(t_cls)
            patches.update_center(t_patch[None])
            P, Q = (((t - c) / 0.05).softmax(-1) for t, c in zip((t_cls, t_patch), centers, strict=True))
            centers = 0.9 * centers + 0.1 * torch.stack([t_cls.mean(0), t_patch.mean(0)])
        for handle, probabilities in zip(handles, (P, Q), strict=True):
            torch.testing.assert_close(handle.materialize(), probabilities)
        views = handles[0].view(2, -1, K)
        assert views.shape == (2, 3, K)
        expected = sum(_cross_entropy(p, s).mean() for p in P.view(2, -1, K) for s in s_local)
        for teacher in (views, P.view(2, -1, K)):
            torch.testing.assert_close(cls(s_local, teacher), expected)
        swapped = _cross_entropy(P, s_global).mean()
        torch.testing.assert_close(cls([s_global], [views.flatten(0, 1)]), swapped)
        padded, s_patch = torch.cat([_logits(7, K, seed=40), torch.full((2, K), math.nan)]), _logits(2, 9, K, seed=50)
        weights = torch.tensor([1 / 4] * 4 + [1 / 3] * 3)
        expected = (_cross_entropy(Q, padded[:7]) * weights).sum() / 2
        for weight in (None, weights):
            loss = patches.forward_masked(padded, handles[1], mask, n_masked_patches=7, masks_weight=weight)
            torch.testing.assert_close(loss, expected)
        full = torch.zeros(2, 9, K)
        full[mask] = Q
        expected = (_cross_entropy(Q, s_patch[mask]) * weights).sum() / 2
        torch.testing.assert_close(patches(s_patch, full, mask), expected)


def test_dinov2_koleo():
    x = _logits(9, 5)
    torch.testing.assert_close(dinov2.KoLeoLoss()(x), ours.KoLeoLoss()(x))
    for topk, size in ((1, None), (3, None), (2, 3)):
        loss = dinov2.KoLeoLossDistributed(topk, size)
        torch.testing.assert_close(loss(x, eps=0.1), koleo_loss(x, eps=0.1, topk=topk, group_size=size))
        with torch.autocast("cpu"):
            assert loss(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="loss_group_size must be positive, got 0"):
        dinov2.KoLeoLossDistributed(loss_group_size=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ours.DINOLoss(0), "output_dim must be positive, got 0"),
        (lambda: ours.DINOLoss(K, teacher_temp=-1), "teacher_temp must be positive, got -1"),
        (lambda: ours.DINOLoss(K, center_mode="median"), "center_mode must be .*'sinkhorn_knopp'.*'median'"),
        (lambda: ours.DINOLoss(K, center_momentum=2), "center_momentum must be from 0 to 1, got 2"),
        (
            lambda: ours.DINOLoss(K)([_logits(2, 5)], [_logits(2, 5)] * 2),
            "teacher_out must have output_dim, 37, columns",
        ),
        (lambda: ours.DINOLoss(K)([_logits(2, K)], [_logits(2, K)]), "unlike numbers, got 1 and 1"),
        (lambda: ours.DINOLoss(K)([_logits(2, K)], [_logits(2, K)] * 2, epoch=-1), "epoch must not be negative"),
        (
            lambda: ours.IBOTPatchLoss(K)(_logits(2, K), _logits(2, K), torch.ones(1, 1, 3, dtype=torch.bool)),
            "same number of masked patches, got 3 in mask and 2 in student_out",
        ),
        (
            lambda: ours.IBOTPatchLoss(K)(_logits(2, K), _logits(2, K), torch.ones(1, 1, 2)),
            r"mask must be bool of shape \(B, H, W\), got torch.float32",
        ),
        (lambda: ours.SwaVLoss(sinkhorn_iterations=-1), "sinkhorn_iterations must not be negative, got -1"),
        (lambda: ours.SwaVLoss(sinkhorn_iterations=0)([_logits(2, K)], []), "at least two crops, got 1"),
        (lambda: ours.SwaVLoss()([], []), "high_resolution_outputs must have at least one crop"),
        (lambda: ours.SwaVLoss()([_logits(2, K)], [], [_logits(2, K)] * 2), "must be as many, got 2 and 1"),
        (lambda: ours.MSNLoss(0.0), "temperature must be positive, got 0"),
        (
            lambda: ours.MSNLoss()(_logits(5, 4), _logits(2, 4), _logits(3, 4)),
            "anchors must be a multiple of targets in number, got 5 and 2",
        ),
        (
            lambda: ours.MSNLoss()(_logits(4, 4), _logits(2, 5), _logits(3, 4)),
            r"anchors and targets must have the same number of features, got \(4, 4\) and \(2, 5\)",
        ),
        (lambda: ours.DINOHead(4, 0), "out_dim must be positive, got 0"),
        (lambda: dinov2.DINOLoss(K)([], [_logits(2, K)]), "student_output_list must have at least one view"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
