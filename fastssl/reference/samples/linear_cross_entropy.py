"""Inputs for the cross-entropy of a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastssl.reference.linear_cross_entropy import linear_cross_entropy
from fastssl.reference.samples._inputs import generator, leaf, scalar_bad_inputs, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows, source = generator(dtype, device), torch.Generator().manual_seed(0)

    def labels(*shape: int, classes: int, ignored: float = 0.0) -> Tensor:
        drawn = torch.randint(classes, shape, generator=source)
        return drawn.where(torch.rand(shape, generator=source) >= ignored, -100).to(device)

    def sample(
        label: str, count: int, dim: int, classes: int, tags: set[str] = frozenset(), ignored: float = 0.0, **named: Any
    ) -> Sample:
        x, w = rows(count, dim), rows(classes, dim, scale=dim**-0.5)
        return Sample(label, (leaf(x), leaf(w), labels(count, classes=classes, ignored=ignored)), named, tags)

    for count, dim, classes in [(1, 1, 1), (2, 3, 4), (3, 2, 1), (5, 8, 64), (33, 32, 65), (65, 24, 300), (7, 16, 33)]:
        yield sample(f"{count}x{dim}, {classes}", count, dim, classes, sized(count, classes, dim))
    yield sample("some ignored", 65, 30, 70, {EDGE}, ignored=0.7)
    yield sample("some ignored, small", 4, 3, 5, {TRACED}, ignored=0.5)
    yield sample("none labelled", 4, 3, 5, {TRACED}, ignored=1.0, reduction="sum")
    yield sample("bias", 65, 30, 70, linear_bias=leaf(rows(70)), ignored=0.3)
    yield sample("bias, small", 4, 3, 5, {TRACED}, linear_bias=leaf(rows(5)))
    yield sample("class weights", 65, 30, 70, weight=rows(70).abs())
    yield sample("label smoothing", 65, 30, 70, {EDGE}, ignored=0.3, label_smoothing=0.2, linear_bias=leaf(rows(70)))
    smoothed = {"label_smoothing": 0.3, "weight": rows(5).abs(), "reduction": "sum"}
    yield sample("label smoothing, small", 4, 3, 5, {TRACED}, ignored=0.3, **smoothed)
    yield sample("cosines", 65, 30, 70, {EDGE}, ignored=0.3, normalize=True, temperature=0.1)
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield sample("cosines, small", 4, 3, 5, {TRACED}, normalize=True, temperature=learnable)
    yield sample("temperature", 33, 30, 70, temperature=torch.tensor(2.0, device=device, requires_grad=True))
    x, w = rows(24, 33), rows(65, 48, scale=0.2)
    y = labels(33, classes=65)
    yield Sample("transposed", (leaf(x).T, leaf(w[:, ::2]), y), tags={TRACED})
    yield Sample("expanded", (leaf(x[:1]).expand(9, 33), leaf(rows(1, 33)).expand(5, 33), y[:9] % 5), tags={TRACED})
    yield Sample("one row", (leaf(x[0]), leaf(rows(5, 33)), y[0] % 5), tags={TRACED})
    yield Sample("texts", (leaf(rows(2, 3, 4)), leaf(rows(5, 4)), labels(2, 3, classes=5, ignored=0.3)), tags={TRACED})
    yield Sample("confident", (leaf(5 * w[:33]), leaf(w), torch.arange(33, device=device)), tags={EDGE})
    yield Sample("weight alone", (x[:4, :3], leaf(rows(5, 3)), y[:4] % 5), tags={TRACED})
    yield Sample("input alone", (leaf(x[:4, :3]), rows(5, 3), y[:4] % 5), tags={TRACED})
    yield Sample("empty", (leaf(x[:0]), leaf(rows(5, 33)), y[:0]), {"reduction": "sum"}, tags={TRACED})
    soft = {"label_smoothing": 0.2, "weight": rows(70).abs(), "linear_bias": leaf(rows(70))}
    distribution = rows(33, 70, scale=2).softmax(1)
    yield Sample("distributions", (leaf(rows(33, 30)), leaf(rows(70, 30, scale=0.2)), distribution), soft)
    distribution = leaf(rows(4, 5).softmax(1))
    yield Sample("distributions, small", (leaf(rows(4, 3)), leaf(rows(5, 3)), distribution), tags={TRACED})
    named = {"normalize": True, "temperature": 0.5, "label_smoothing": 0.1}
    yield Sample("distributions, cosines", (leaf(rows(4, 3)), leaf(rows(5, 3)), distribution), named, {TRACED})


def _bad_inputs() -> Iterator[BadInput]:
    x, w, y = torch.randn(8, 16), torch.randn(12, 16), torch.arange(8)

    def bad(label: str, args: tuple[Any, ...], error: type[Exception], match: str, **named: Any) -> BadInput:
        return BadInput(label, args, named, error, match)

    yield bad("features differ", (x[:, :8], w, y), ValueError, r"input and linear_weight .*\(8, 8\) and \(12, 16\)")
    yield bad("no features", (x[:, :0], w[:, :0], y), ValueError, r"input .*at least one feature.*\(8, 0\)")
    yield bad("no classes", (x, w[:0], y), ValueError, r"linear_weight .*at least one row.*\(0, 16\)")
    yield bad("a number", (x.sum(), w, y), ValueError, r"input must have shape \(..., D\), got \(\)")
    yield bad("weight of three", (x, w[None], y), ValueError, r"linear_weight .*\(V, D\), got \(1, 12, 16\)")
    yield bad("dtypes differ", (x, w.double(), y), ValueError, "input and linear_weight .*float32.*float64")
    yield bad("integers", (x.long(), w, y), ValueError, "input .*floating.*int64")
    yield bad("no tensor", (x, None, y), TypeError, "linear_weight must be a Tensor, got NoneType")
    yield bad("devices differ", (x, w.to("meta"), y), ValueError, "input and linear_weight .*cpu.*meta")
    yield bad("labels of another device", (x, w, y.to("meta")), ValueError, "target and input .*meta.*cpu")
    yield bad("labels int32", (x, w, y.int()), ValueError, "target must be int64, or floating-point.*int32")
    yield bad("labels a list", (x, w, [0] * 8), TypeError, "target must be a Tensor, got list")
    yield bad("too few labels", (x, w, y[:7]), ValueError, r"target must have shape \(8,\), of labels, got \(7,\)")
    yield bad("labels of columns", (x, w, y[:, None]), ValueError, r"target must have shape \(8,\).*got \(8, 1\)")
    soft = torch.rand(8, 11)
    yield bad("too few classes", (x, w, soft), ValueError, r"target must have shape \(8, 12\), of dist.*got \(8, 11\)")
    yield bad("float labels", (x, w, y.float()), ValueError, r"target must have shape \(8, 12\), of dist.*got \(8,\)")
    args = x, w, y
    for name in ("linear_bias", "weight"):
        of_rows = torch.ones(8), rf"{name} must have shape \(12,\), .*got \(8,\)"
        yield bad(f"{name} of rows", args, ValueError, of_rows[1], **{name: of_rows[0]})
        yield bad(f"{name} integers", args, ValueError, f"{name} .*floating.*int64", **{name: torch.ones(12).long()})
        yield bad(f"{name} number", args, TypeError, f"{name} must be a Tensor, got float", **{name: 1.0})
        yield bad(f"{name} device", args, ValueError, f"{name} and linear.*", **{name: torch.ones(12, device="meta")})
    bias = torch.ones(12).double()
    yield bad("bias of another dtype", args, ValueError, "input and linear_bias .*dtype.*float64", linear_bias=bias)
    for smoothing in (-0.1, 1.1, float("nan")):
        match = f"label_smoothing must be from 0 to 1, got {smoothing}"
        yield bad(f"label_smoothing {smoothing}", args, ValueError, match, label_smoothing=smoothing)
    yield bad("smoothing text", args, TypeError, "label_smoothing must be a number, got str", label_smoothing="0")
    yield bad("ignore_index", args, TypeError, "ignore_index must be an integer, got float", ignore_index=0.5)
    yield bad("normalize", args, TypeError, "normalize must be True or False, got 1", normalize=1)
    yield from scalar_bad_inputs("temperature", *args)
    yield bad("temperature zero", args, ValueError, "temperature must not be zero, got 0", temperature=0)
    yield bad("temperature negative", args, ValueError, "temperature must be positive, got -0.1", temperature=-0.1)
    yield bad("reduction", args, ValueError, "reduction .*'none', 'mean' or 'sum'.*'average'", reduction="average")


def _magnitude(sample: Sample) -> float:
    """The largest logit, and the largest number that it is multiplied by for a gradient."""
    x, w = (z.detach().double() for z in sample.args[:2])
    factor = max((z.abs().max().item() for z in (x, w) if z.numel()), default=0)
    if sample.kwargs.get("normalize"):
        x, w = (torch.nn.functional.normalize(z, dim=-1) for z in (x, w))
        factor = 1
    logits = x @ w.T / torch.as_tensor(sample.kwargs.get("temperature", 1)).item()
    if (bias := sample.kwargs.get("linear_bias")) is not None:
        logits = logits + bias.detach().double()
    largest = logits.abs().max().item() if logits.numel() else 0
    return max(1.0, largest) * max(1.0, factor)


OpSpec(
    "linear_cross_entropy",
    "linear_cross_entropy",
    linear_cross_entropy,
    _samples,
    _bad_inputs,
    _magnitude,
    reductions=("none", "mean", "sum"),
)
