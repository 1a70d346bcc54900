"""Inputs for the losses of self-distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastssl.reference.distillation import dino_loss, ibot_loss
from fastssl.reference.samples._inputs import generator, leaf, scalar_bad_inputs, sized
from fastssl.reference.samples._spec import COMPILED, EDGE, POISONED, RAGGED, SHAPES, TRACED, BadInput, OpSpec, Sample

_SIZES = [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (65, 129), (33, 24), (7, 1000)]


def _dino_loss_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    # Of views of the student, of views of the teacher, and of images.
    for s, t, batch, dim in [(2, 1, 1, 1), (2, 2, 1, 8), (3, 2, 2, 3), (10, 2, 5, 64), (3, 3, 6, 129), (2, 5, 4, 33)]:
        tags = {
            TRACED: batch == 1 or dim == 3,
            SHAPES: min(s, t, batch, dim) > 1,
            COMPILED: batch == 5,
            RAGGED: dim >= 64,
        }
        yield Sample(
            f"{s} and {t} views, {batch}x{dim}",
            (leaf(rows(s, batch, dim)), rows(t, batch, dim)),
            tags={tag for tag, holds in tags.items() if holds},
        )
    student, teacher = rows(4, 7, 30), rows(2, 7, 30)
    yield Sample("5x7x64", (leaf(rows(5, 7, 64)), rows(2, 7, 64)), {"reduction": "none"}, tags={RAGGED})
    yield Sample("sum", (leaf(student), teacher), {"reduction": "sum"})
    yield Sample("views", ([leaf(x) for x in rows(4, 2, 5)], list(rows(2, 2, 5))), tags={TRACED, SHAPES, COMPILED})
    groups = [leaf(rows(2, 3, 5)), leaf(rows(3, 5)), leaf(rows(3, 3, 5))], [rows(1, 3, 5), rows(3, 5)]
    yield Sample("groups of views", groups, tags={TRACED, SHAPES})
    yield Sample("teacher alone in a list", (leaf(student), [teacher[0]]))
    for center in (rows(30), rows(1, 30)):
        yield Sample(f"center {tuple(center.shape)}", (leaf(student), teacher), {"center": center}, tags={EDGE})
    yield Sample("center, small", (leaf(rows(2, 2, 3)), rows(2, 2, 3)), {"center": rows(3)}, tags={TRACED})
    yield Sample("float32 center", (leaf(student), teacher), {"center": rows(30).float()})
    yield from _temperatures(student, teacher)
    yield Sample("confident", (leaf(10 * student), 10 * teacher), tags={EDGE})
    yield Sample("the teacher's logits", (leaf(teacher), teacher), {"student_temperature": 0.04})
    strided = leaf(rows(9, 4, 60)).transpose(0, 1)[:, :7, ::2], rows(30, 7, 2).permute(2, 1, 0)
    yield Sample("strided", strided, tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 1, 30)).expand(3, 7, 30), rows(1, 7, 30).expand(2, 7, 30)), tags={TRACED})
    yield Sample("poisoned", (leaf(rows(5, 6, 16)), rows(4, 6, 16)), tags={POISONED})
    some = [leaf(student[0]), student[1], leaf(student[2])], list(teacher)
    yield Sample("some views differentiable", some, {"reduction": "none"}, tags={TRACED})
    yield Sample("empty", (leaf(student[:, :0]), teacher[:, :0]), {"reduction": "sum"}, tags={TRACED})


def _ibot_loss_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for count, dim in _SIZES:
        yield Sample(f"{count} of {dim}", (leaf(rows(count, dim)), rows(count, dim)), tags=sized(count, dim))
    student, teacher = rows(33, 30), rows(33, 30)
    yield Sample("33x16", (leaf(student[:, :16]), teacher[:, :16]), {"reduction": "none"})
    yield Sample("sum", (leaf(student), teacher), {"reduction": "sum"})
    yield Sample("weights", (leaf(student), teacher), {"weights": rows(33).abs()}, tags={EDGE})
    yield Sample("weights, small", (leaf(rows(4, 3)), rows(4, 3)), {"weights": rows(4).abs()}, tags={TRACED})
    weights = torch.tensor([0, 1e-30, -1, 1e4], device=device)[torch.arange(33, device=device) % 4]
    if dtype != torch.float16:  # which holds neither 1e-30 nor what 1e4 makes of the gradient
        yield Sample("float32 weights", (leaf(student), teacher), {"weights": weights, "reduction": "sum"})
    learnable = leaf(rows(7))
    yield Sample("learnable weights", (leaf(student[:7]), teacher[:7]), {"weights": learnable}, tags={TRACED})
    yield Sample("center", (leaf(student), teacher), {"center": rows(30)}, tags={EDGE})
    yield Sample("center, small", (leaf(rows(4, 3)), rows(4, 3)), {"center": rows(1, 3)}, tags={TRACED})
    yield from _temperatures(student, teacher)
    yield Sample("confident", (leaf(10 * student), 10 * teacher), tags={EDGE})
    yield Sample("transposed", (leaf(rows(24, 33)).T, rows(24, 33).T), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], rows(66, 50)[1::2, 25:49]), tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), rows(9, 1).expand(9, 24)), tags={TRACED})
    yield Sample("empty", (leaf(student[:0]), teacher[:0]), {"reduction": "sum"}, tags={TRACED})


def _temperatures(student: torch.Tensor, teacher: torch.Tensor) -> Iterator[Sample]:
    for temperatures in ((0.01, 1.0), (5.0, 0.005)):
        named = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
        yield Sample(f"temperatures {temperatures}", (leaf(student), teacher), named)
    learnable = torch.tensor(0.2, device=student.device, requires_grad=True)
    named = {"student_temperature": learnable, "teacher_temperature": torch.tensor(0.05, device=student.device)}
    small = student[:3, :5] if student.dim() == 2 else student[:3, :2, :5]
    yield Sample(
        "learnable temperature", (leaf(small), teacher[:, ..., :5][..., : small.shape[-2], :]), named, {TRACED}
    )


def _bad_inputs(*shape: int) -> Iterator[BadInput]:
    x = torch.randn(*shape)

    def bad(label: str, a: Any, b: Any, error: type[Exception], match: str, **others: Any) -> BadInput:
        return BadInput(label, (a, b), others, error, match)

    yield bad("rows differ", x, x[..., :5, :], ValueError, r"student_logits and .* rows .*\(8, 16\) and \(5, 16\)")
    yield bad("prototypes differ", x, x[..., :8], ValueError, r"student_logits and .* prototypes.*\(8, 16\).*\(8, 8\)")
    yield bad("one dimension", x, x.flatten(), ValueError, rf"teacher_logits .*K\), got \({x.numel()},\)")
    yield bad("no prototypes", x[..., :0], x[..., :0], ValueError, r"student_logits .*at least one feature.*8, 0\)")
    yield bad("dtypes differ", x, x.double(), ValueError, r"student_logits and teacher_logits .*float32.*float64")
    yield bad("integers", x.long(), x, ValueError, "student_logits .*floating.*int64")
    yield bad("no logits", x, None, TypeError, "teacher_logits must be .*NoneType")
    yield bad("devices differ", x, x.to("meta"), ValueError, "student_logits and teacher_logits .*device.*cpu.*meta")
    for center, error, match in (
        (torch.zeros(15), ValueError, r"center must have shape \(16,\) or \(1, 16\), got \(15,\)"),
        (torch.zeros(16, 1), ValueError, r"center must have shape .*got \(16, 1\)"),
        (torch.zeros(16).long(), ValueError, "center must have a floating-point dtype.*int64"),
        (torch.zeros(16, device="meta"), ValueError, "center and student_logits.* same device"),
        (0.0, TypeError, "center must be a Tensor, got float"),
    ):
        yield bad(f"center {getattr(center, 'dtype', 'number')} {getattr(center, 'shape', '')}"
                  f"{getattr(center, 'device', '')}", x, x, error, match, center=center)  # fmt: skip
    for name in ("student_temperature", "teacher_temperature"):
        yield from scalar_bad_inputs(name, x, x)
        yield bad(f"{name} zero", x, x, ValueError, f"{name} must not be zero, got 0", **{name: 0})
        yield bad(f"{name} negative", x, x, ValueError, f"{name} must be positive, got -0.1", **{name: -0.1})
        yield bad(f"{name} tiny", x, x, ValueError, f"1 / {name} must be finite in torch.float32", **{name: 1e-45})
    yield bad("reduction", x, x, ValueError, "reduction .*'none', 'mean' or 'sum'.*'average'", reduction="average")


def _dino_loss_bad_inputs() -> Iterator[BadInput]:
    yield from _bad_inputs(2, 8, 16)
    x = torch.randn(2, 8, 16)
    for label, student, teacher, error, match in (
        ("one view", x[:1], x[:1], ValueError, "must have views of unlike numbers, got 1 and 1"),
        ("one view in lists", [x[0]], [x[:1]], ValueError, "must have views of unlike numbers, got 1 and 1"),
        ("no views", x[:0], x, ValueError, "must have views of unlike numbers, got 0 and 2"),
        ("an empty list", x, [], ValueError, "teacher_logits must have at least one view, got an empty list"),
        ("no tensor in a list", [x[0], 1.0], x, TypeError, r"student_logits\[1\] must be a Tensor, got float"),
        ("four dimensions", [x[0], x[None]], x, ValueError, r"student_logits\[1\] .*\(V, B, K\), got \(1, 2, 8, 16\)"),
        ("one row in a list", [x[0], x[1, 0]], x, ValueError, r"student_logits\[1\] must have shape .*\(16,\)"),
        ("a view of fewer rows", [x[0], x[1, :3]], x, ValueError, r"\[0\] and student_logits\[1\] .*rows"),
        ("a view of another dtype", x, [x[0], x[1].half()], ValueError, r"and teacher_logits\[1\] .*dtype"),
    ):
        yield BadInput(label, (student, teacher), {}, error, match)


def _ibot_loss_bad_inputs() -> Iterator[BadInput]:
    yield from _bad_inputs(8, 16)
    x = torch.randn(8, 16)
    for label, weights, error, match in (
        ("weights too few", torch.ones(7), ValueError, r"weights must have shape \(8,\), .*got \(7,\)"),
        ("weights of columns", torch.ones(8, 1), ValueError, r"weights must have shape \(8,\), .*got \(8, 1\)"),
        ("weights integers", torch.ones(8).long(), ValueError, "weights must have a floating-point dtype.*int64"),
        ("weights on meta", torch.ones(8, device="meta"), ValueError, "weights and student_logits .*same device"),
        ("weights numbers", [1.0] * 8, TypeError, "weights must be a Tensor, got list"),
    ):
        yield BadInput(label, (x, x), {"weights": weights}, error, match)
    yield BadInput("views", (x[None], x[None]), {}, ValueError, r"student_logits .*\(N, K\), got \(1, 8, 16\)")
    yield BadInput("lists", ([x], [x]), {}, TypeError, "student_logits must be a Tensor, got list")


def _magnitude(sample: Sample) -> float:
    """The largest logit over its temperature."""
    temperatures = (
        torch.as_tensor(sample.kwargs.get(f"{side}_temperature", default)).item()
        for side, default in (("student", 0.1), ("teacher", 0.04))
    )
    largest = (
        max((view.detach().abs().max().item() for view in views if view.numel()), default=0) for views in sample.args
    )
    return max(x / temperature for x, temperature in zip(largest, temperatures, strict=True))


for _name, _reference, _samples, _bad in (
    ("dino_loss", dino_loss, _dino_loss_samples, _dino_loss_bad_inputs),
    ("ibot_loss", ibot_loss, _ibot_loss_samples, _ibot_loss_bad_inputs),
):
    OpSpec(
        _name,
        "distillation",
        _reference,
        _samples,
        _bad,
        _magnitude,
        reductions=("none", "mean", "sum"),
        op="distillation_loss",
        multiplies=False,
    )
