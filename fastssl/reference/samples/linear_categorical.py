"""Inputs for drawing from a linear layer's logits, and what holds of the result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.reference.linear_categorical import linear_categorical
from fastssl.reference.samples._inputs import generator, scalar_bad_inputs, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for count, dim, classes in [(1, 1, 1), (2, 3, 4), (5, 8, 64), (33, 17, 65), (3, 7, 300)]:
        yield Sample(
            f"{count}x{dim}, {classes}", (rows(count, dim), rows(classes, dim)), {}, sized(count, classes, dim)
        )
    x, w, bias = rows(33, 30), rows(70, 30, scale=0.2), rows(70)
    bias[::3] = float("-inf")
    yield Sample("bias", (x, w), {"linear_bias": bias, "temperature": 0.5})
    yield Sample(
        "texts", (rows(2, 3, 4), rows(9, 8)[:, ::2]), {"temperature": torch.tensor(2.0, device=device)}, {TRACED}
    )
    yield Sample("transposed", (rows(4, 9).T, rows(4, 5).T), tags={TRACED})
    likes = rows(128, 8)
    likes = torch.cat([likes, likes + rows(128, 8, scale=2e-3)])  # rounding decides between two
    yield Sample("cold", (rows(64, 8), likes), {"temperature": 1e-3}, {TRACED})
    nothing = torch.full((70,), float("-inf"), dtype=dtype, device=device)
    yield Sample("no class", (x, w), {"linear_bias": nothing}, {EDGE})
    yield Sample("empty", (x[:0], w), {}, {TRACED})


def _check(sample: Sample, ids: Tensor) -> None:
    """A class with a logit above minus infinity and, where noise is small beside logits, the one with the largest."""
    (x, w), options = sample.args, sample.kwargs
    assert ids.shape == x.shape[:-1] and ids.dtype == torch.int64
    logits = x.double() @ w.double().T
    if (bias := options.get("linear_bias")) is not None:
        logits = logits + bias.double()
    some = (logits > float("-inf")).any(-1)
    assert (ids[~some] == -1).all() and (ids[some] >= 0).all() and (ids < len(w)).all()
    drawn = logits.gather(-1, ids.clamp_min(0)[..., None])[..., 0]
    assert (drawn[some] > float("-inf")).all()
    below = (logits.amax(-1) - drawn)[some] / options.get("temperature", 1.0)
    assert (below < 50).all()  # once in e^50


def _bad_inputs() -> Iterator[BadInput]:
    x, w = torch.randn(8, 16), torch.randn(12, 16)

    def bad(label: str, args: tuple, match: str, error: type[Exception] = ValueError, **named: object) -> BadInput:
        return BadInput(label, args, named, error, match)

    yield bad("features differ", (x[:, :8], w), r"input and linear_weight .*\(8, 8\) and \(12, 16\)")
    yield bad("no classes", (x, w[:0]), r"linear_weight .*at least one row.*\(0, 16\)")
    yield bad("a number", (x.sum(), w), r"input must have shape \(..., D\), got \(\)")
    yield bad("dtypes differ", (x, w.double()), "input and linear_weight .*float32.*float64")
    yield bad("integers", (x.long(), w), "input .*floating.*int64")
    yield bad("no tensor", (x, None), "linear_weight must be a Tensor, got NoneType", TypeError)
    yield bad("devices differ", (x, w.to("meta")), "input and linear_weight .*cpu.*meta")
    yield bad("bias of rows", (x, w), r"linear_bias must have shape \(12,\), .*got \(8,\)", linear_bias=torch.ones(8))
    yield bad("bias a number", (x, w), "linear_bias must be a Tensor, got float", TypeError, linear_bias=1.0)
    yield from scalar_bad_inputs("temperature", x, w)
    yield bad("temperature zero", (x, w), "temperature must not be zero, got 0", temperature=0)
    yield bad("temperature negative", (x, w), "temperature must be positive, got -0.1", temperature=-0.1)
    yield bad("generator", (x, w), "generator must be a torch.Generator.*got int", TypeError, generator=1)


OpSpec(
    "linear_categorical",
    "linear_categorical",
    linear_categorical,
    _samples,
    _bad_inputs,
    check=_check,
    autocast="inputs",
)
