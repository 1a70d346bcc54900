"""Inputs for moving averages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.reference.ema import adamw_ema_step_, ema_update_
from fastssl.reference.samples._inputs import generator
from fastssl.reference.samples._spec import EDGE, SHAPES, TRACED, BadInput, OpSpec, Sample

_SHAPES = [(3,), (2, 5), (), (0,), (129, 7)]


def _ema_update_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)

    def tensors() -> list[Tensor]:
        return [normal(*shape) for shape in _SHAPES]

    for momentum in (0.0, 0.3, 0.996, 1.0):
        yield Sample(f"momentum={momentum}", (tensors(), tensors(), momentum), tags={EDGE})
    for size in (2, 70001):
        yield Sample(f"{size} elements", ([normal(size)], [normal(size)], 0.5), tags={SHAPES})
    yield Sample("tensor", (tensors(), tensors(), torch.tensor(0.9, device=device)), tags={TRACED})
    yield Sample("transposed", ([normal(5, 9).T], [normal(9, 5)], 0.9), tags={TRACED})
    yield Sample("expanded source", ([normal(5, 9)], [normal(9).expand(5, 9)], 0.9), tags={TRACED})
    yield Sample("float32 targets", ([normal(7).float()], [normal(7)], 0.9), tags={TRACED})
    yield Sample("float32 sources", ([normal(7)], [normal(7).float()], 0.9), tags={TRACED})
    infinite = torch.tensor([1.0, -float("inf"), float("inf")], device=device, dtype=dtype)
    yield Sample("infinite", ([infinite], [infinite.clone()], 0.9), tags={EDGE})
    yield Sample("empty", ([], [], 0.9))


def _ema_update_bad_inputs() -> Iterator[BadInput]:
    x, y = [torch.randn(3)], [torch.randn(3)]

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        arguments = {"targets": x, "sources": y, "momentum": 0.9, **changes}
        return BadInput(label, tuple(arguments.values()), {}, error, match)

    yield bad("no list", "targets must be a list of tensors, got float", TypeError, targets=1.0)
    yield bad("no tensor", r"sources\[0\] must be a Tensor, got float", TypeError, sources=[1.0])
    yield bad("momentum large", "momentum must be from 0 to 1, got 1.5", momentum=1.5)
    yield bad("momentum text", "momentum must be a number", TypeError, momentum="0.9")
    yield bad("devices differ", r"targets\[0\] and sources\[0\] .*device", sources=[y[0].to("meta")])


_IN_PLACE = {"multiplies": False, "autocast": "inputs"}
OpSpec("ema_update_", "ema", ema_update_, _ema_update_samples, _ema_update_bad_inputs, written=(0,), **_IN_PLACE)


def _adamw_ema_step_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)

    def lists(*shapes: tuple[int, ...], teacher: torch.dtype = dtype) -> tuple[list[Tensor], ...]:
        params, grads, exp_avgs, squares, ema_params = ([normal(*shape) for shape in shapes] for _ in range(5))
        steps = [torch.tensor(float(i + 1)) for i in range(len(shapes))]
        return params, grads, exp_avgs, [x.square() for x in squares], [x.to(teacher) for x in ema_params], steps

    hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}
    yield Sample("of many shapes", lists(*_SHAPES), hyper, {EDGE, TRACED})
    for size in (2, 4099):
        yield Sample(f"{size} elements", lists((size,)), hyper, {SHAPES})
    yield Sample("16-bit teacher", lists((7, 5), teacher=torch.bfloat16), hyper, {TRACED})
    for momentum in (0.0, 1.0):
        yield Sample(f"momentum={momentum}", lists((7, 5)), {**hyper, "momentum": momentum}, {EDGE})
    yield Sample("no decay", lists((7, 5)), {**hyper, "weight_decay": 0.0, "betas": (0.0, 0.5)}, {EDGE})


def _adamw_ema_step_bad_inputs() -> Iterator[BadInput]:
    lists = [[torch.ones(3)] for _ in range(5)] + [[torch.tensor(1.0)]]
    hyper = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        return BadInput(label, tuple(lists), {**hyper, **changes}, error, match)

    yield bad("lr negative", "lr must .*got -1", lr=-1.0)
    yield bad("beta one", "betas.* must .*1.0", betas=(0.9, 1.0))
    yield bad("eps nan", "eps must .*nan", eps=float("nan"))
    yield bad("weight decay text", "weight_decay must be a number, got str", TypeError, weight_decay="0")
    yield bad("momentum large", "momentum must be from 0 to 1, got 2", momentum=2.0)


OpSpec(
    "adamw_ema_step_",
    "ema",
    adamw_ema_step_,
    _adamw_ema_step_samples,
    _adamw_ema_step_bad_inputs,
    dtypes=(torch.float32, torch.float64),
    written=(0, 2, 3, 4, 5),
    **_IN_PLACE,
)
