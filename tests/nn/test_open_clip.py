"""open_clip's losses: those of distillation and of captions, and those that subclasses make of logits and labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import rank, world_size
from fastssl.nn import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from tests.distributed.processes import mean_of_all, peer, run_processes

BATCH = 5


class ClipOfLogits(ClipLoss):
    def get_logits(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return super().get_logits(*args, **kwargs)


class SigLipOfLogits(SigLipLoss):
    def get_ground_truth(self, *args, **kwargs) -> Tensor:
        return super().get_ground_truth(*args, **kwargs)


class DistillOfLogits(DistillClipLoss):
    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return super().dist_loss(teacher_logits, student_logits)


def _rows(batch: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1).to(dtype).requires_grad_()


def _scalar(value: float, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.full(shape, value, requires_grad=True)


def _distill_inputs(batch: int = 9, dim: int = 12, width: int = 12, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    student, teacher = ([_rows(batch, d, seed + i, dtype) for i in (0, 1)] for d, seed in ((dim, 0), (width, 2)))
    return [*student, _scalar(9.0), *teacher, _scalar(14.0)]


def _step(loss: Callable[..., Tensor | tuple], inputs: list[Tensor]) -> list[Tensor]:
    """Values, and gradients of those of the inputs that have one: of the first value and twice the second."""
    values = loss(*inputs)
    values = values if isinstance(values, tuple) else (values,)
    total = sum((i + 1) * value for i, value in enumerate(values))
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return [*(v.detach() for v in values), *torch.autograd.grad(total, leaves)]


def _assert_agree(first: list[Tensor], second: list[Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize(("batch", "dim", "width"), [(1, 4, 4), (9, 12, 12), (33, 16, 24), (40, 24, 16)])
def test_distillation(batch, dim, width, backend):
    """In float64, from stored logits; the teacher's gradients, too."""
    inputs = _distill_inputs(batch, dim, width)
    exact = _step(DistillOfLogits(), [x.detach().double().requires_grad_() for x in inputs])
    _assert_agree([x.double() for x in _step(DistillClipLoss(), inputs)], exact, atol=2e-5)


def test_distillation_of_open_clip(open_clip, backend):
    inputs = _distill_inputs(17, 12, 20)
    _assert_agree(_step(DistillClipLoss(), inputs), _step(open_clip.DistillClipLoss(), inputs))
    for loss in (DistillClipLoss(), open_clip.DistillClipLoss()):
        assert list(loss(*inputs, output_dict=True)) == ["contrastive_loss", "distill_loss"]


def test_distillation_stores_no_logits():
    """Of 4096 pairs they would take 64 MiB each."""
    inputs = _distill_inputs(4096, 16, 24)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sum(DistillClipLoss()(*inputs)).backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 1 << 23


def test_distillation_from_a_teacher_in_bfloat16():
    student, teacher = _distill_inputs()[:3], [x.detach() for x in _distill_inputs(dtype=torch.bfloat16)[3:]]
    exact = _step(DistillOfLogits(), [*student, *(x.float() for x in teacher)])
    _assert_agree(_step(DistillClipLoss(), [*student, *teacher]), exact)
    with torch.autocast("cpu", torch.bfloat16):
        values = DistillClipLoss()(*student, *teacher)
    assert all(value.dtype == torch.float32 for value in values)
    _assert_agree(list(values), exact[:2], rtol=0.02)


def test_distillation_compiles():
    inputs = _distill_inputs()
    compiled = torch.compile(DistillClipLoss(), fullgraph=True, backend="aot_eager")
    _assert_agree(_step(compiled, inputs), _step(DistillClipLoss(), inputs))


def test_distillation_of_no_pairs():
    assert all(value.isnan() for value in DistillClipLoss()(*_distill_inputs(0)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({3: torch.ones(8, 12)}, ValueError, r"same shape.* rows, got \(8, 12\), \(9, 12\), \(9, 12\)"),
        (
            {3: torch.ones(8, 12), 4: torch.ones(8, 12)},
            ValueError,
            r"got \(8, 12\), \(8, 12\), \(9, 12\)",
        ),
        ({4: [1.0]}, TypeError, "dist_text_features must be a Tensor, got list"),
        (
            {3: torch.ones(9, 12, device="meta")},
            ValueError,
            "dist_image_features must be on the same device",
        ),
        ({5: "1"}, TypeError, "dist_logit_scale must be a number"),
        ({2: float("nan")}, ValueError, "logit_scale must be finite, got nan"),
    ],
)
def test_bad_arguments_of_distillation(change, error, match):
    inputs = [change.get(i, x) for i, x in enumerate(_distill_inputs())]
    with pytest.raises(error, match=match):
        DistillClipLoss()(*inputs)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.5, 3)])
def test_captions_of_open_clip(weights, open_clip):
    tokens = torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(6, 4, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = [_rows(6, 8, 0), _rows(6, 8, 1), logits, tokens, _scalar(9.0)]
    if not weights[1]:
        inputs = [x.detach() if x is not logits else x for x in inputs]
    losses = [module(*weights, pad_id=3) for module in (CoCaLoss, open_clip.CoCaLoss)]
    _assert_agree(*(_step(loss, inputs) for loss in losses))
    for loss in losses:
        assert list(loss(*inputs, output_dict=True)) == ["contrastive_loss", "caption_loss"]
        assert not loss.state_dict()


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"])
def test_signatures_of_open_clip(name, open_clip):
    """But for what one version of it has and another has not."""
    ours, theirs = globals()[name], getattr(open_clip, name)
    for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
        pair = [
            [(p.name, p.default, p.kind) for p in inspect.signature(getattr(module, method)).parameters.values()]
            for module in (ours, theirs)
        ]
        versions = {"use_horovod", "chunk_size"}
        assert [p for p in pair[0] if p[0] not in versions] == [p for p in pair[1] if p[0] not in versions], method


@pytest.mark.parametrize("bias", [None, -3.0])
def test_logits_and_labels_of_open_clip(bias, open_clip):
    inputs = _rows(7, 8, 0), _rows(7, 8, 1), _scalar(9.0)
    _assert_agree(*(module().get_logits(*inputs, bias) for module in (ClipLoss, open_clip.ClipLoss)))
    _assert_agree(*([module().get_logits(*inputs, bias)] for module in (SigLipLoss, open_clip.SigLipLoss)))
    assert torch.equal(*(module().get_ground_truth("cpu", 7) for module in (ClipLoss, open_clip.ClipLoss)))
    for negative_only in (False, True):
        arguments = "cpu", torch.float32, 7, negative_only
        labels = [module().get_ground_truth(*arguments) for module in (SigLipLoss, open_clip.SigLipLoss)]
        assert torch.equal(*labels)


@pytest.mark.parametrize("bias", [False, True])
def test_subclasses_have_the_same_loss(bias):
    inputs = [_rows(7, 8, 0), _rows(7, 8, 1), _scalar(9.0, (1,)), *([_scalar(-3.0)] if bias else [None])]
    for loss, of_logits in ((ClipLoss, ClipOfLogits), (SigLipLoss, SigLipOfLogits)):
        _assert_agree(_step(loss(), inputs), _step(of_logits(), inputs))


def test_what_a_subclass_overrides_counts():
    """A margin for the positives, and labels that are smoothed."""

    class Margin(ClipLoss):
        def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
            logits = super().get_logits(image_features, text_features, logit_scale, logit_bias)
            return tuple(x - 0.3 * logit_scale * torch.eye(len(x)) for x in logits)

    class Smooth(SigLipLoss):
        def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
            return 0.9 * super().get_ground_truth(device, dtype, num_logits, negative_only)

    class MarginDistill(Margin, DistillClipLoss):
        pass

    image, text, scale = _rows(7, 8, 0), _rows(7, 8, 1), _scalar(9.0)
    logits = scale * image @ text.T - 0.3 * scale * torch.eye(7)
    expected = (F.cross_entropy(logits, torch.arange(7)) + F.cross_entropy(logits.T, torch.arange(7))) / 2
    torch.testing.assert_close(Margin()(image, text, scale), expected)
    torch.testing.assert_close(MarginDistill()(image, text, scale, text, image, 3.0)[0], expected)
    labels = 0.9 * (2 * torch.eye(7) - 1)
    expected = -F.logsigmoid(labels * (scale * image @ text.T - 2)).sum() / 7
    torch.testing.assert_close(Smooth()(image, text, scale, -2.0), expected)


@pytest.mark.parametrize(("chunk_size", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_bad_chunk_size(chunk_size, error):
    with pytest.raises(error, match="chunk_size must "):
        SigLipLoss(chunk_size=chunk_size)


def test_chunk_size():
    inputs = [_rows(7, 8, 0), _rows(7, 8, 1), _scalar(9.0), _scalar(-3.0)]
    loss = SigLipLoss(chunk_size=4)
    assert loss.chunk_size == 4
    _assert_agree(_step(loss, inputs), _step(SigLipLoss(), inputs))


def _check_processes() -> None:
    """Process by process, what open_clip's flags say, from stored logits, and its classes where they are."""
    place, theirs = {"rank": rank(), "world_size": world_size()}, peer("open_clip")
    mine = slice(rank() * BATCH, (rank() + 1) * BATCH)
    whole = _distill_inputs(world_size() * BATCH, 8, 12)
    inputs = [x if x.dim() == 0 else x[mine].detach().requires_grad_() for x in whole]
    pair = [inputs[0], inputs[1], inputs[2]]
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            flags = dict(local_loss=local_loss, gather_with_grad=gather_with_grad, **place)
            cases: list[tuple[nn.Module, list[nn.Module], list[Tensor]]] = [
                (DistillClipLoss(**flags), [DistillOfLogits(**flags)], inputs),
                (ClipLoss(**flags), [ClipOfLogits(**flags)], pair),
            ]
            if theirs is not None:
                cases[0][1].append(theirs.DistillClipLoss(**flags))
                logits = [module(**flags).get_logits(*pair) for module in (ClipLoss, theirs.ClipLoss)]
                _assert_agree(*logits)
                labels = [
                    module(**flags).get_ground_truth("cpu", len(logits[0][0])) for module in (ClipLoss, theirs.ClipLoss)
                ]
                assert torch.equal(*labels)
            for loss, others, arguments in cases:
                ours = _step(loss, arguments)
                for other in others:
                    expected = _step(other, arguments)
                    if local_loss and gather_with_grad:  # of scales, our gradients are the processes' mean
                        values = len(expected) - len(arguments)
                        expected = [
                            mean_of_all(x) if i >= values and x.dim() == 0 else x for i, x in enumerate(expected)
                        ]
                    _assert_agree(ours, expected, atol=5e-6)
    arguments = [*pair, _scalar(-3.0)]
    _assert_agree(_step(SigLipLoss(**place), arguments), _step(SigLipOfLogits(**place), arguments))
    unlike = [x[: BATCH - rank()].detach() if x.dim() else x for x in inputs]
    losses = [(DistillClipLoss, 6), (DistillOfLogits, 6), (ClipOfLogits, 3)]
    for loss, count in losses:
        with pytest.raises(ValueError, match="must have the same shape, dtype.* on every process of group"):
            loss(**place)(*unlike[:count])
    teacher = (
        [*(x.detach() for x in inputs[:3]), *unlike[3:5], inputs[5]]
        if rank() == 0
        else [*(x.detach() for x in inputs[:3]), *(x.detach().double() for x in inputs[3:5]), inputs[5]]
    )
    with pytest.raises(ValueError, match="dist_image_features .*torch.float32.* on 0 and .*torch.float64.* on 1"):
        DistillClipLoss(**place)(*teacher)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")
def test_processes(tmp_path):
    run_processes(_check_processes, 2, tmp_path)
