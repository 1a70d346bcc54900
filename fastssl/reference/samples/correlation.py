"""Inputs for the losses on correlations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastssl.reference.correlation import (
    barlow_twins,
    covariance_loss,
    cross_correlation,
    redundancy_loss,
    variance_loss,
    vicreg,
)
from fastssl.reference.samples._inputs import generator, leaf, pair_bad_inputs, sized
from fastssl.reference.samples._spec import TRACED, BadInput, OpSpec, Sample


def _views(dtype: torch.dtype, device: str, size: float = 1.0) -> Iterator[Sample]:
    """Two views, with features whose deviation is about `size`, more rows than features and fewer."""
    normal = generator(dtype, device)

    def rows(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(*shape, scale=size * scale)

    for batch, dim in [(2, 1), (2, 3), (3, 2), (5, 64), (33, 16), (32, 128), (65, 129), (129, 64)]:
        yield Sample(f"{batch}x{dim}", (leaf(rows(batch, dim)), leaf(rows(batch, dim))), tags=sized(batch, dim))
    x = rows(40, 24)
    yield Sample("identical views", (leaf(x), leaf(x.clone())))
    yield Sample("only one view differentiable", (leaf(x), x + rows(40, 24, scale=0.5)))
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 33)).T), tags={TRACED})
    yield Sample("transposed, of few rows", (leaf(rows(33, 24)).T, leaf(rows(33, 24)).T), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49]), tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24))), tags={TRACED})
    dead = x.clone()
    dead[:, 3], dead[:, 7] = 0, 0.3
    yield Sample("constant columns", (leaf(dead), leaf(rows(40, 24))))
    zero = rows(20, 40)
    zero[3], zero[7] = 0, 0
    yield Sample("zero rows", (leaf(zero), leaf(rows(20, 40))))
    far = rows(24, 40) + 30 * size
    yield Sample("far from zero", (leaf(far), leaf(rows(24, 40) - 30 * size)))
    orthogonal = torch.linalg.qr(generator(torch.float32, device)(65, 17))[0][:, 1:] * size * 65**0.5
    yield Sample("hardly correlated", (leaf(orthogonal.to(dtype)), leaf((orthogonal + 1e-3 * size).to(dtype))))
    # A float16 loss is at most 65504.
    large = 1e3 if dtype != torch.float16 else 4.0
    yield Sample("large", (leaf(rows(33, 16, scale=large)), leaf(rows(33, 16, scale=large))))
    yield Sample("large, of few rows", (leaf(rows(12, 24, scale=large)), leaf(rows(12, 24, scale=large))))
    yield Sample("tiny", (leaf(rows(33, 16, scale=1e-3)), leaf(rows(33, 16, scale=1e-3))))
    yield Sample("tiny, of few rows", (leaf(rows(12, 24, scale=1e-3)), leaf(rows(12, 24, scale=1e-3))))
    for label, shape in (("near each other", (40, 24)), ("near each other, of few rows", (24, 40))):
        near = rows(*shape) + 3 * size
        yield Sample(label, (leaf(near), leaf(near + rows(*shape, scale=1e-2))))


def _pair_samples(options: dict[str, dict], dtype: torch.dtype, device: str, size: float = 1.0) -> Iterator[Sample]:
    """Of two views, and with options by their labels."""
    yield from _views(dtype, device, size)
    rows = generator(dtype, device)
    for i, (label, kwargs) in enumerate(options.items()):
        batch, dim = ((4, 2), (3, 4))[i % 2]
        z = rows(batch, dim, scale=size), rows(batch, dim, scale=size)
        yield Sample(label, tuple(map(leaf, z)), kwargs)


def _view_samples(options: dict[str, dict], dtype: torch.dtype, device: str, size: float = 1.0) -> Iterator[Sample]:
    """Those of one view."""
    for sample in _pair_samples(options, dtype, device, size):
        if sample.label not in ("identical views", "only one view differentiable", "32x128", "far from zero"):
            yield Sample(sample.label, sample.args[:1], sample.kwargs, sample.tags)


def _number_bad_inputs(name: str, *views: Tensor) -> Iterator[BadInput]:
    for number in (float("nan"), float("inf")):
        yield BadInput(f"{name} {number}", views, {name: number}, ValueError, f"{name} .*finite.*{number}")
    yield BadInput(f"{name} tensor", views, {name: torch.ones(())}, TypeError, f"{name} .*number.*Tensor")


def _bad_inputs(views: int, *numbers: str) -> Iterator[BadInput]:
    if views == 2:
        yield from pair_bad_inputs("z_a", "z_b")
    else:
        z = torch.randn(8, 16)
        yield BadInput("three dimensions", (z[None],), {}, ValueError, r"z .*\(B, D\).*\(1, 8, 16\)")
        yield BadInput("no features", (z[:, :0],), {}, ValueError, r"z .*at least one feature.*\(8, 0\)")
        yield BadInput("integers", (z.long(),), {}, ValueError, "z .*floating.*int64")
        yield BadInput("not a tensor", (z.tolist(),), {}, TypeError, "z .*Tensor.*list")
    for rows in (0, 1):
        few = torch.ones(rows, 8)
        yield BadInput(f"{rows} rows", (few,) * views, {}, ValueError, rf"z\w* .*at least 2 rows.*\({rows}, 8\)")
    z = (torch.randn(8, 16),) * views
    for name in numbers:
        yield from _number_bad_inputs(name, *z)
    if "eps" in numbers:
        yield BadInput("eps negative", z, {"eps": -1e-5}, ValueError, "eps .*negative.*-1e-05")


def _vicreg_bad_inputs() -> Iterator[BadInput]:
    yield from _bad_inputs(2, "lambda_param", "mu_param", "nu_param", "eps")
    z = torch.randn(8, 16)
    for name, match in (("invariance_reduction", "'mean' or 'batchmean'"), ("variance_reduction", "'mean' or 'sum'")):
        yield BadInput(name, (z, z), {name: "none"}, ValueError, f"{name} .*{match}.*'none'")


def _options(sample: Sample, **defaults: float) -> list[float]:
    return [sample.kwargs.get(name, value) for name, value in defaults.items()]


def _barlow_twins_magnitude(sample: Sample) -> float:
    """The norm of the gradient's terms, that of each row times the row's length."""
    eps, unbiased = _options(sample, eps=1e-5, unbiased=False)
    views = [z.detach().double() for z in sample.args]
    return max(2 / len(z) * (z.norm() * (z.var(0, unbiased=unbiased) + eps).rsqrt().norm()).item() for z in views)


def _vicreg_magnitude(lambda_param: float, mu_param: float, nu_param: float, sample: Sample) -> float:
    """The norm of the gradient's terms, that of each row times the row's length."""
    lambda_param, mu_param, nu_param, eps, unbiased = _options(
        sample, lambda_param=lambda_param, mu_param=mu_param, nu_param=nu_param, eps=1e-4, unbiased=True
    )
    norms = []
    for z in (z.detach().double() for z in sample.args):
        variance = z.var(0, unbiased=unbiased)
        of_variance = mu_param / 2 / (variance + eps).sqrt()
        weight = (2 * lambda_param + of_variance + 4 * nu_param * variance) / z.numel()
        norms.append((z.norm(dim=1) * (weight * z).norm(dim=1)).norm().item())
    return max(norms)


_UNBIASED = {"unbiased": {"unbiased": True, "eps": 1e-3}}
_BIASED = {"biased": {"unbiased": False}}
OpSpec(
    "barlow_twins",
    "correlation",
    barlow_twins,
    partial(
        _pair_samples,
        {
            **_UNBIASED,
            "heavy redundancy": {"lambda_param": 1.0},
            "no redundancy": {"lambda_param": 0.0},
            "algorithm 1": {"unbiased": True, "eps": 0.0},
        },
    ),
    partial(_bad_inputs, 2, "lambda_param", "eps"),
    _barlow_twins_magnitude,
)
OpSpec(
    "vicreg",
    "correlation",
    vicreg,
    partial(
        _pair_samples,
        {
            **_BIASED,
            "weights": {"lambda_param": 3.0, "mu_param": 7.0, "nu_param": 11.0, "eps": 0.05},
            "no covariance": {"nu_param": 0.0},
            "as in the paper": {"invariance_reduction": "batchmean", "variance_reduction": "sum"},
        },
        size=0.8,
    ),
    _vicreg_bad_inputs,
    partial(_vicreg_magnitude, 25.0, 25.0, 1.0),
)
OpSpec(
    "covariance_loss",
    "correlation",
    covariance_loss,
    partial(_view_samples, _BIASED),
    partial(_bad_inputs, 1),
    partial(_vicreg_magnitude, 0.0, 0.0, 1.0),
    op="variance_covariance",
)
OpSpec(
    "variance_loss",
    "correlation",
    variance_loss,
    partial(_view_samples, {**_BIASED, "eps": {"eps": 0.1}}, size=0.8),
    partial(_bad_inputs, 1, "eps"),
    partial(_vicreg_magnitude, 0.0, 2.0, 0.0),
    op="variance_covariance",
    multiplies=False,
)
OpSpec(
    "redundancy_loss",
    "correlation",
    redundancy_loss,
    partial(_pair_samples, _UNBIASED),
    partial(_bad_inputs, 2, "eps"),
    _barlow_twins_magnitude,
    op="barlow_twins",
)
OpSpec(
    "cross_correlation",
    "correlation",
    cross_correlation,
    partial(_pair_samples, _UNBIASED),
    partial(_bad_inputs, 2, "eps"),
    _barlow_twins_magnitude,
    op="",
    multiplies=None,  # which PyTorch computes
)
