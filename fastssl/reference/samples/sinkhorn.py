"""Inputs for Sinkhorn-Knopp and the center of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastssl.reference.distillation import sinkhorn_center, sinkhorn_knopp, update_center_
from fastssl.reference.samples._inputs import generator, scalar_bad_inputs, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample


def _sinkhorn_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for count, prototypes in [(1, 1), (2, 3), (3, 1), (5, 64), (33, 128), (65, 129), (129, 2100)]:
        yield Sample(f"{count}x{prototypes}", (rows(count, prototypes, scale=0.1),), tags=sized(count, prototypes))
    logits = rows(33, 24)
    for iterations in (1, 2, 10):
        yield Sample(f"{iterations} iterations", (logits,), {"iterations": iterations}, tags={EDGE})
    for temperature in (0.04, 1.0, 1e4):
        yield Sample(f"temperature={temperature}", (logits,), {"temperature": temperature})
    yield Sample("temperature tensor", (logits,), {"temperature": torch.tensor(0.1, device=device)}, tags={TRACED})
    large = 100 * logits  # of which exponentials at 0.04 have exponents of thousands
    yield Sample("large", (large,))
    apart = logits.clone()  # one row is far below the others, and one prototype
    apart[3], apart[:, 5] = -50, -60
    yield Sample("apart", (apart,))
    yield Sample("views", (rows(2, 9, 24, scale=0.1),), tags={TRACED})
    yield Sample("transposed", (rows(24, 33, scale=0.1).T,), tags={TRACED})
    yield Sample("sliced", (rows(66, 50, scale=0.1)[::2, 1:25],), tags={TRACED})
    yield Sample("expanded", (rows(1, 24).expand(9, 24),), tags={TRACED})


def _sinkhorn_center_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    yield from _sinkhorn_samples(dtype, device)
    rows = generator(dtype, device)
    views = [rows(count, 24, scale=0.1) for count in (5, 0, 9)]
    yield Sample("list", (views,), tags={TRACED})
    yield Sample("list of views", ([views[0], rows(2, 4, 24, scale=0.1)],), tags={TRACED})


def _sinkhorn_knopp_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    yield from _sinkhorn_samples(dtype, device)
    yield Sample("empty", (generator(dtype, device)(0, 24),), tags={TRACED})


def _update_center_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for count, prototypes in [(1, 1), (2, 3), (3, 1), (5, 64), (33, 128), (65, 129), (129, 2100)]:
        center = rows(1, prototypes)[0].float()
        yield Sample(f"{count}x{prototypes}", (center, rows(count, prototypes)), tags=sized(count, prototypes))
    center, logits = rows(1, 24), rows(33, 24)
    for momentum in (0.0, 0.25, 1.0):
        yield Sample(f"momentum={momentum}", (center, logits, momentum), tags={EDGE})
    yield Sample("momentum tensor", (center, logits, torch.tensor(0.5, device=device)), tags={TRACED})
    yield Sample("strided center", (rows(24, 2).T[1], logits), tags={TRACED})
    yield Sample("views", (center, rows(2, 9, 24)), tags={TRACED})
    yield Sample("list", (center, [rows(5, 24), rows(0, 24), rows(2, 4, 24)]), tags={TRACED})
    yield Sample("transposed", (center, rows(24, 33).T), tags={TRACED})
    yield Sample("large mean", (center, 1000 + logits), tags={EDGE})
    yield Sample("empty", (center, logits[:0]), tags={TRACED})


def _logits_bad_inputs(make: Callable[..., tuple[object, ...]]) -> Iterator[BadInput]:
    x = torch.randn(8, 16)
    for label, logits, error, match in (
        ("one dimension", x[0], ValueError, r"teacher_logits .*\(N, K\) or \(V, B, K\).*\(16,\)"),
        ("no prototypes", x[:, :0], ValueError, r"teacher_logits .*at least one feature.*\(8, 0\)"),
        ("integers", x.long(), ValueError, r"teacher_logits .*floating.*int64"),
        ("number", 1.0, TypeError, r"teacher_logits .*float"),
    ):
        yield BadInput(label, make(logits), {}, error, match)


def _list_bad_inputs(make: Callable[..., tuple[object, ...]]) -> Iterator[BadInput]:
    x = torch.randn(8, 16)

    def bad(label: str, second: object, match: str, error: type[Exception] = ValueError) -> BadInput:
        return BadInput(label, make([x, second]), {}, error, match)

    yield BadInput("empty list", make([]), {}, ValueError, "teacher_logits .*at least one tensor.*empty list")
    yield bad("list of numbers", 1.0, r"teacher_logits\[1\] must be a Tensor, got float", TypeError)
    yield bad("one of one dimension", x[0], r"teacher_logits\[1\] .*\(N, K\)")
    yield bad("prototypes differ", x[:, :8], r"teacher_logits\[0\] and .*\[1\] .*same number of prototypes.*\(8, 8\)")
    yield bad("dtypes differ", x.half(), r"teacher_logits\[0\] and .*\[1\] .*same dtype.*float32.*float16")
    yield bad("devices differ", x.to("meta"), r"teacher_logits\[0\] and .*\[1\] .*same device.*cpu.*meta")


def _sinkhorn_bad_inputs() -> Iterator[BadInput]:
    x = torch.randn(8, 16)
    yield from _logits_bad_inputs(lambda logits: (logits,))
    yield from scalar_bad_inputs("temperature", x)
    yield BadInput("temperature zero", (x,), {"temperature": 0.0}, ValueError, "temperature must not be zero, got 0")
    yield BadInput("temperature negative", (x,), {"temperature": -1.0}, ValueError, "temperature .*positive, got -1")
    yield BadInput("no iterations", (x,), {"iterations": 0}, ValueError, "iterations must be positive, got 0")
    yield BadInput("iterations float", (x,), {"iterations": 3.0}, TypeError, "iterations must be an integer, got float")
    yield BadInput("group", (x,), {"group": "all"}, ValueError, "group must be None .*not initialised")


def _sinkhorn_center_bad_inputs() -> Iterator[BadInput]:
    yield from _sinkhorn_bad_inputs()
    yield from _list_bad_inputs(lambda logits: (logits,))


def _sinkhorn_knopp_bad_inputs() -> Iterator[BadInput]:
    yield from _sinkhorn_bad_inputs()
    yield BadInput("list", ([torch.randn(8, 16)],), {}, TypeError, "teacher_logits must be a Tensor, got list")


def _update_center_bad_inputs() -> Iterator[BadInput]:
    center, x = torch.zeros(16), torch.randn(8, 16)
    yield from _logits_bad_inputs(lambda logits: (center, logits))
    yield from _list_bad_inputs(lambda logits: (center, logits))
    for label, other, error, match in (
        ("center list", center.tolist(), TypeError, "center must be a Tensor, got list"),
        ("center integers", center.long(), ValueError, "center must have a floating.*int64"),
        ("center short", center[:8], ValueError, r"center must have shape \(16,\) or \(1, 16\).*\(8,\)"),
        ("center expanded", center[:1].expand(16), ValueError, "center must have no two elements in one place"),
        ("center elsewhere", center.to("meta"), ValueError, "center and teacher_logits .*same device.*meta.*cpu"),
    ):
        yield BadInput(label, (other, x), {}, error, match)
    yield BadInput("momentum 2", (center, x, 2.0), {}, ValueError, "momentum must be from 0 to 1, got 2")
    yield BadInput("momentum vector", (center, x, torch.ones(2)), {}, ValueError, r"momentum .*one.* element.*\(2,\)")
    yield BadInput("momentum text", (center, x, "1"), {}, TypeError, "momentum .*number.*str")
    yield BadInput("group", (center, x), {"group": "all"}, ValueError, "group must be None .*not initialised")


def _temperature(sample: Sample) -> float:
    """What multiplies the logarithms."""
    return torch.as_tensor(sample.kwargs.get("temperature", 0.04)).item()


def _largest_exponent(sample: Sample) -> float:
    """Of exp(logits / temperature): rounding a center moves it by so many units in the last place."""
    logits: Tensor = sample.args[0]
    largest = logits.double().abs().max().item() if logits.numel() else 0.0
    return 1 + largest / _temperature(sample)


OpSpec(
    "sinkhorn_center",
    "distillation",
    sinkhorn_center,
    _sinkhorn_center_samples,
    _sinkhorn_center_bad_inputs,
    _temperature,
    op="assignment_sums",
    multiplies=False,
    autocast="inputs",
)
OpSpec(
    "sinkhorn_knopp",
    "distillation",
    sinkhorn_knopp,
    _sinkhorn_knopp_samples,
    _sinkhorn_knopp_bad_inputs,
    _largest_exponent,
    op="assignments",
    multiplies=False,
    autocast="inputs",
)
OpSpec(
    "update_center_",
    "distillation",
    update_center_,
    _update_center_samples,
    _update_center_bad_inputs,
    op="column_sums",
    written=(0,),
    multiplies=False,
    autocast="inputs",
)
