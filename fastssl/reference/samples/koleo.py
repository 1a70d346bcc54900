"""Inputs for KoLeo."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastssl.reference.koleo import koleo_loss
from fastssl.reference.samples._inputs import generator, leaf, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for count, dim in [(2, 3), (5, 64), (32, 128), (65, 129), (129, 16)]:
        yield Sample(f"{count}x{dim}", (leaf(rows(count, dim)),), tags=sized(count, dim))
    x = rows(36, 24)
    for topk in (2, 35):
        yield Sample(f"topk={topk}", (leaf(x),), {"topk": topk})
    for size, topk in ((36, 1), (9, 3), (2, 1)):
        yield Sample(f"groups of {size}", (leaf(x),), {"group_size": size, "topk": topk})
    yield Sample("small groups", (leaf(rows(6, 6)),), {"group_size": 3, "topk": 2}, tags={TRACED})
    yield Sample("eps above some norms", (leaf(x),), {"eps": 5.0})
    yield Sample("large", (leaf(100 * x),))
    yield Sample("transposed", (leaf(rows(24, 33)).T,), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25],), tags={TRACED})
    if dtype != torch.float16:  # which holds no eps, where eager PyTorch divides 0 by 0
        zero = x.clone()
        zero[3] = 0
        yield Sample("zero row", (leaf(zero),), tags={EDGE})


def _bad_inputs() -> Iterator[BadInput]:
    x = torch.randn(8, 16)
    for label, rows, error, match in (
        ("one dimension", x[0], ValueError, r"features .*\(N, D\).*\(16,\)"),
        ("no features", x[:, :0], ValueError, r"features .*at least one feature.*\(8, 0\)"),
        ("integers", x.long(), ValueError, r"features .*floating.*int64"),
        ("not a tensor", x.tolist(), TypeError, r"features .*Tensor.*list"),
        ("one row", x[:1], ValueError, r"topk must be below .*1, got 1"),
    ):
        yield BadInput(label, (rows,), {}, error, match)
    for label, options, error, match in (
        ("negative eps", {"eps": -1.0}, ValueError, r"eps must not be negative, got -1.0"),
        ("infinite eps", {"eps": float("inf")}, ValueError, r"eps must be finite, got inf"),
        ("huge eps", {"eps": 1e300}, ValueError, r"eps must be finite in torch.float32, got 1e\+300"),
        ("text for eps", {"eps": "1"}, TypeError, r"eps must be a number, got str"),
        ("no neighbour", {"topk": 0}, ValueError, r"topk must be positive, got 0"),
        ("too many neighbours", {"topk": 8}, ValueError, r"topk must be below .*8, got 8"),
        ("too many in a group", {"topk": 4, "group_size": 4}, ValueError, r"topk must be below .*4, got 4"),
        ("half a neighbour", {"topk": 1.5}, TypeError, r"topk must be an integer, got float"),
        ("no group", {"group_size": 0}, ValueError, r"group_size must be positive, got 0"),
        ("ragged groups", {"group_size": 3}, ValueError, r"group_size must divide .*8, got 3"),
        ("half a group", {"group_size": 4.0}, TypeError, r"group_size must be an integer, got float"),
    ):
        yield BadInput(label, (x,), options, error, match)


OpSpec("koleo_loss", "koleo", koleo_loss, _samples, _bad_inputs, multiplies=False)
