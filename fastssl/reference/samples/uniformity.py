"""Inputs for uniformity."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastssl.reference.samples._inputs import generator, leaf, scalar_bad_inputs, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample
from fastssl.reference.uniformity import uniformity


def _uniformity_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for count, dim in [(2, 3), (3, 1), (5, 64), (32, 128), (65, 129), (129, 16)]:
        yield Sample(f"{count}x{dim}", (leaf(rows(count, dim)),), tags=sized(count, dim))
    x = rows(33, 24)
    for t in (0.5, 40.0, -1.0):
        yield Sample(f"t={t}", (leaf(x),), {"t": t})
    learnable = torch.tensor(1.5, device=device, requires_grad=True)
    yield Sample("learnable t", (leaf(x[:7, :6]),), {"t": learnable}, tags={TRACED})
    yield Sample("near", (leaf(rows(1, 24) + rows(33, 24, scale=1e-2)),))
    yield Sample("large", (leaf(100 * x),))
    yield Sample("transposed", (leaf(rows(24, 33)).T,), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25],), tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24),), tags={TRACED})
    if dtype != torch.float16:  # F.normalize's 1e-12 is 0 in float16, where eager PyTorch divides 0 by 0
        zero = x.clone()
        zero[3] = 0
        yield Sample("zero row", (leaf(zero),), tags={EDGE})


def _uniformity_bad_inputs() -> Iterator[BadInput]:
    x = torch.randn(8, 16)
    for label, rows, error, match in (
        ("one dimension", x[0], ValueError, r"x .*\(N, D\).*\(16,\)"),
        ("no features", x[:, :0], ValueError, r"x .*at least one feature.*\(8, 0\)"),
        ("integers", x.long(), ValueError, r"x .*floating.*int64"),
        ("not a tensor", x.tolist(), TypeError, r"x .*Tensor.*list"),
    ):
        yield BadInput(label, (rows,), {}, error, match)
    yield from scalar_bad_inputs("t", x)


def _uniformity_magnitude(sample: Sample) -> float:
    """The largest |S_ij|."""
    return 2 * abs(torch.as_tensor(sample.kwargs.get("t", 2.0)).item())


OpSpec(
    "uniformity",
    "uniformity",
    uniformity,
    _uniformity_samples,
    _uniformity_bad_inputs,
    _uniformity_magnitude,
    op="self_logsumexp",
)
