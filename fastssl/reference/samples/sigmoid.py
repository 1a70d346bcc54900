"""Inputs for the sigmoid contrastive loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastssl.reference.samples._inputs import (
    generator,
    largest_norm,
    leaf,
    pair_bad_inputs,
    scalar_bad_inputs,
    sized,
    unit_generator,
)
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample
from fastssl.reference.sigmoid import siglip_loss


def _siglip_loss_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows, unit = generator(dtype, device), unit_generator(dtype, device)
    for batch, dim in [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (65, 129), (129, 16)]:
        yield Sample(
            f"{batch}x{dim}", (leaf(unit(batch, dim)), leaf(unit(batch, dim)), 10.0, -10.0), tags=sized(batch, dim)
        )
    x, y = unit(33, 24), unit(33, 24)
    for scale in (0.0, -1.0):
        yield Sample(f"scale={scale}", (leaf(x), leaf(y), scale), tags={EDGE})
    for bias in (10.0, -50.0):
        yield Sample(f"bias={bias}", (leaf(x), leaf(y), 10.0, bias), {"reduction": "sum"})
    scalars = (torch.tensor(value, device=device, requires_grad=True) for value in (5.0, -3.0))
    yield Sample("learnable scale and bias", (leaf(x[:5, :4]), leaf(y[:5, :4]), *scalars), tags={TRACED})
    yield Sample("learnable bias", (x, y, 10.0, torch.tensor(-10.0, device=device, requires_grad=True)), tags={TRACED})
    yield Sample("confident", (leaf(x), leaf(x + rows(33, 24, scale=1e-3)), 100.0, -90.0))
    yield Sample("scale=100.0", (leaf(x), leaf(y), 100.0), tags={EDGE})
    yield Sample("large rows", (leaf(6 * rows(33, 24)), leaf(rows(33, 24)), 1.0))
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 33)).T, 1.0, -1.0), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49], 1.0), tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24)), 1.0), tags={TRACED})
    yield Sample("only images differentiable", (leaf(x), y, 10.0, -10.0))
    zero = x.clone()
    zero[3] = 0
    yield Sample("zero row", (leaf(zero), leaf(y), 10.0, -10.0), tags={EDGE})
    yield Sample("empty", (leaf(x[:0]), leaf(y[:0]), 10.0), {"reduction": "sum"}, tags={TRACED})


def _siglip_loss_bad_inputs() -> Iterator[BadInput]:
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    yield from pair_bad_inputs("image_features", "text_features", 10.0)
    yield from scalar_bad_inputs("logit_scale", x, y)
    yield from scalar_bad_inputs("logit_bias", x, y, 10.0)
    for reduction in ("none", "average"):
        match = f"reduction .*'mean' or 'sum'.*'{reduction}'"
        yield BadInput(f"reduction {reduction}", (x, y, 10.0), {"reduction": reduction}, ValueError, match)


def _siglip_loss_magnitude(sample: Sample) -> float:
    """The largest |S_ij| that lengths allow."""
    x, y, scale, *bias = sample.args
    largest = abs(torch.as_tensor(scale).item()) * largest_norm(x) * largest_norm(y)
    return largest + (abs(torch.as_tensor(bias[0]).item()) if bias else 0)


OpSpec(
    "siglip_loss",
    "sigmoid",
    siglip_loss,
    _siglip_loss_samples,
    _siglip_loss_bad_inputs,
    _siglip_loss_magnitude,
    reductions=("sum", "mean"),
)
