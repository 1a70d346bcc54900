"""Inputs for the losses of self-distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastssl.reference.distillation import dino_loss, ibot_loss, prototype_distillation_loss
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
        ("one view", x[:1], x[:1], ValueError, "at least two views, of unlike numbers, got 1 and 1"),
        ("one view in lists", [x[0]], [x[:1]], ValueError, "at least two views, of unlike numbers, got 1 and 1"),
        ("no views", x[:0], x, ValueError, "at least two views, of unlike numbers, got 0 and 2"),
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


def _prototype_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)

    def sample(label: str, count: int, dim: int, prototypes: int, tags: set[str] = frozenset(), **named: Any) -> Sample:
        """Features of length about 1, and prototypes, as of a head that normalises."""
        student, teacher = (rows(count, dim, scale=dim**-0.5) for _ in range(2))
        w, v = (rows(prototypes, dim) for _ in range(2))
        return Sample(label, (leaf(student), leaf(w), teacher, v), named, tags)

    for count, dim, prototypes in [
        (1, 1, 1),
        (2, 3, 4),
        (3, 2, 1),
        (5, 8, 64),
        (33, 32, 65),
        (65, 24, 300),
        (4, 70, 1000),
        (7, 16, 33),
    ]:
        yield sample(f"{count}x{dim}, {prototypes}", count, dim, prototypes, sized(count, prototypes, dim))
    yield sample("33x32, 64 rows", 33, 32, 64, reduction="none")
    yield sample("sum", 33, 30, 65, reduction="sum")
    yield sample("center", 33, 30, 65, {EDGE}, center=rows(65))
    yield sample("center, small", 4, 3, 5, {TRACED}, center=rows(1, 5))
    yield sample("weights", 33, 30, 65, {EDGE}, weights=rows(33).abs())
    yield sample("weights, small", 4, 3, 5, {TRACED}, weights=rows(4).abs())
    yield sample("learnable weights", 4, 3, 5, {TRACED}, weights=leaf(rows(4)))
    for temperatures in ((0.01, 1.0), (5.0, 0.005)):
        named = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
        yield sample(f"temperatures {temperatures}", 33, 30, 65, **named)
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield sample("learnable temperature", 3, 4, 5, {TRACED}, student_temperature=learnable)
    x, w = rows(24, 33, scale=0.2), rows(65, 48)
    yield Sample("transposed", (leaf(x).T, leaf(w[:, ::2]), x.T, rows(24, 65).T), tags={TRACED})
    expanded = leaf(x[:1]).expand(9, 33), leaf(rows(1, 33)).expand(5, 33), x[:9], rows(5, 33)
    yield Sample("expanded", expanded, tags={TRACED})
    yield Sample("sizes of their own", (leaf(x), leaf(rows(40, 33)), rows(24, 7), rows(40, 7)))
    yield Sample("prototypes alone", (x[:4, :3], leaf(rows(5, 3)), x[:4, :3], rows(5, 3)), tags={TRACED})
    yield Sample("features alone", (leaf(x[:4, :3]), rows(5, 3), rows(4, 3), rows(5, 3)), tags={TRACED})
    yield sample("empty", 0, 3, 5, {TRACED}, reduction="sum")
    for s, t, batch, dim, prototypes in [(2, 2, 2, 3, 5), (10, 2, 5, 8, 70), (2, 5, 4, 33, 30), (3, 3, 40, 16, 130)]:
        tags = {TRACED} if dim == 3 else set()
        views = rows(s, batch, dim, scale=dim**-0.5), rows(t, batch, dim, scale=dim**-0.5)
        prototypes = rows(prototypes, dim), rows(prototypes, dim)
        arguments = leaf(views[0]), leaf(prototypes[0]), views[1], prototypes[1]
        yield Sample(f"{s} and {t} views", arguments, tags=tags)
        yield Sample(
            f"{s} and {t} views, weights", arguments, {"weights": rows(batch).abs(), "reduction": "sum"}, tags=tags
        )
    views = [leaf(rows(2, 3)), leaf(rows(2, 2, 3)), rows(2, 3)], [rows(2, 3), rows(1, 2, 3)]
    yield Sample("groups of views", (views[0], leaf(rows(5, 3)), views[1], rows(5, 3)), tags={TRACED})


def _prototype_bad_inputs() -> Iterator[BadInput]:
    x, w = torch.randn(8, 16), torch.randn(12, 16)

    def bad(label: str, args: tuple[Any, ...], error: type[Exception], match: str, **named: Any) -> BadInput:
        return BadInput(label, args, named, error, match)

    yield bad("rows differ", (x, w, x[:5], w), ValueError, "student and teacher must have as many rows, got 8 and 5")
    yield bad("prototypes differ", (x, w, x, w[:7]), ValueError, "_prototypes must have as many rows.*got 12 and 7")
    yield bad("no prototypes", (x, w[:0], x, w[:0]), ValueError, "must have .* at least one, got 0 and 0")
    yield bad("features differ", (x, w[:, :8], x, w), ValueError, "student and student_prototypes .*16 and 8")
    yield bad("teacher's differ", (x, w, x, w[:, :8]), ValueError, "teacher and teacher_prototypes .*16 and 8")
    yield bad("no features", (x[:, :0], w[:, :0], x, w), ValueError, r"student .*at least one feature.*\(8, 0\)")
    yield bad("one dimension", (x, w[0], x, w), ValueError, r"student_prototypes .*\(K, D\), got \(16,\)")
    yield bad("views of one", (x, w, x[None], w), ValueError, r"teacher must have shape \(N, D\), got \(1, 8, 16\)")
    yield bad("one view", (x[None], w, x[None], w), ValueError, "at least two views, of unlike numbers, got 1 and 1")
    yield bad("a view of another size", ([x, x[:, :8]], w, [x], w), ValueError, r"student\[1\] and student_prototypes")
    yield bad("a view of fewer rows", ([x, x[:5]], w, [x], w), ValueError, r"\[0\] and student\[1\] .*rows.*8 and 5")
    yield bad("dtypes differ", (x, w.double(), x, w), ValueError, "student and student_prototypes .*float32.*float64")
    yield bad("integers", (x.long(), w, x, w), ValueError, "student .*floating.*int64")
    yield bad("no tensor", (x, None, x, w), TypeError, "student_prototypes must be a Tensor, got NoneType")
    yield bad("a number", (1.0, w, x, w), TypeError, "student must be .*float")
    yield bad("devices differ", (x, w, x, w.to("meta")), ValueError, "student and teacher_prototypes .*cpu.*meta")
    args = x, w, x, w
    yield bad("center", args, ValueError, r"center must have shape \(12,\) or \(1, 12\), got \(8,\)", center=x[:, 0])
    yield bad("weights", args, ValueError, r"weights must have shape \(8,\), .*got \(12,\)", weights=w[:, 0])
    for name in ("student_temperature", "teacher_temperature"):
        yield from scalar_bad_inputs(name, *args)
        yield bad(f"{name} negative", args, ValueError, f"{name} must be positive, got -0.1", **{name: -0.1})
    yield bad("reduction", args, ValueError, "reduction .*'none', 'mean' or 'sum'.*'average'", reduction="average")


def _prototype_magnitude(sample: Sample) -> float:
    """The largest logit over its temperature, and the largest number that it is multiplied by for a gradient."""
    x, w, y, v = ([z] if isinstance(z, torch.Tensor) else z for z in sample.args)
    logits = ([z.detach().double() @ u[0].detach().double().T for z in views] for views, u in ((x, w), (y, v)))
    factor = max((z.detach().abs().max().item() for z in (*x, *w) if z.numel()), default=0)
    return _magnitude(Sample(sample.label, tuple(logits), sample.kwargs)) * max(1.0, factor)


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

OpSpec(
    "prototype_distillation_loss",
    "distillation",
    prototype_distillation_loss,
    _prototype_samples,
    _prototype_bad_inputs,
    _prototype_magnitude,
    reductions=("none", "mean", "sum"),
)
