"""What holds for Barlow Twins and VICReg in particular."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastssl
from fastssl import functional, reference
from fastssl.functional import (
    barlow_twins,
    covariance_loss,
    cross_correlation,
    redundancy_loss,
    variance_loss,
    vicreg,
)
from fastssl.ops import correlation
from fastssl.reference import OPS, Sample
from tests.accuracy import (
    Results,
    assert_as_accurate_as_eager,
    evaluate,
    relative_error,
    truth_and_eager,
    with_gradients,
    with_tensors,
)
from tests.inputs import FLOATS, alike, normal

SIZES = (2, 3, 17, 33, 64, 129, 257)
DIMS = (1, 2, 15, 33, 64, 130, 257)
LOSSES = {"barlow_twins": barlow_twins, "vicreg": vicreg}


def _run(name: str, dual: bool, *views: Tensor, derive: bool = True, options: tuple = ()) -> tuple[Tensor, ...]:
    """The operation of the function `name`, with its defaults, by the algorithm that is asked for."""
    z = views[0]
    options = (
        options
        or {
            "barlow_twins": (1.0, 5e-3, 1e-5, False),
            "vicreg": (25.0, 25.0, 1.0, 1e-4, True),
            "covariance_loss": (0.0, 1.0, 1.0, True),
            "variance_loss": (1.0, 0.0, 1e-4, True),
        }[name]
    )
    op = getattr(correlation, OPS[name].op)
    return op(*views, *options, dual, derive, str(z.dtype).removeprefix("torch."))


@functools.cache
def _ragged(name: str, rows: int, dim: int, dtype: torch.dtype) -> tuple[Sample, tuple[Results, Results]]:
    views = (z.requires_grad_() for z in alike(rows, dim, dtype=dtype))
    sample = Sample("ragged", tuple(views) if name in LOSSES else (next(views),))
    return sample, truth_and_eager(OPS[name], sample)


def _assert_both_algorithms_accurate(name: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    sample, yardstick = _ragged(name, rows, dim, dtype)
    for dual in (True, False):
        results = evaluate(lambda *views, dual=dual: _run(name, dual, *views)[0], sample)
        assert_as_accurate_as_eager(OPS[name], sample, results, yardstick)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
@pytest.mark.sanitized
def test_every_edge_of_a_tile(name, rows, kernels):
    for dim in DIMS:
        _assert_both_algorithms_accurate(name, rows, dim, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_edges_of_tiles_in_16_bits(name, dtype, kernels):
    for rows, dim in ((2, 33), (17, 257), (33, 1), (257, 65)):
        _assert_both_algorithms_accurate(name, rows, dim, dtype)


@pytest.mark.parametrize("name", ["covariance_loss", "variance_loss"])
def test_edges_of_tiles_of_one_view(name, kernels):
    for rows, dim in ((3, 33), (17, 257), (65, 1), (257, 130)):
        _assert_both_algorithms_accurate(name, rows, dim, torch.float32)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
@pytest.mark.parametrize("rows, dim", [(300, 400), (30, 1200), (1200, 30)])
def test_the_algorithms_agree(name, rows, dim, kernels):
    """On every output, and in every run."""
    views = [z.requires_grad_() for z in alike(rows, dim)]
    results = []
    for dual in (True, True, False, False):
        loss, *parts = (x for x in _run(name, dual, *views) if x.dim() == 0)
        assert not any(x.requires_grad for x in parts)
        results.append([loss.detach(), *parts, *torch.autograd.grad(loss, views)])
    for first, again in (results[:2], results[2:]):
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for x, y in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("rows, dim", [(4, 2), (3, 3)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_derivatives_of_both_algorithms(rows, dim, dual, unbiased):
    """First and second ones, with weights that tell the arguments apart."""
    views = [z.requires_grad_() for z in alike(rows, dim, dtype=torch.float64)]
    for name, options in (("barlow_twins", (0.7, 0.3, 0.1)), ("vicreg", (3.0, 5.0, 2.0, 0.1))):
        run = functools.partial(_run, name, dual, options=(*options, unbiased))
        assert torch.autograd.gradcheck(lambda *z, run=run: run(*z)[0], views)
        assert torch.autograd.gradgradcheck(lambda *z, run=run: run(*z)[0], views)
    run = functools.partial(_run, "covariance_loss", dual, options=(5.0, 2.0, 0.1, unbiased))
    assert torch.autograd.gradcheck(lambda z: run(z)[0], views[:1])
    assert torch.autograd.gradgradcheck(lambda z: run(z)[0], views[:1])


@pytest.mark.parametrize("dtype, variant", [(torch.float32, ""), (torch.bfloat16, "_portable")])
@pytest.mark.parametrize("dual", [True, False])
def test_opcheck_of_both_algorithms(dtype, dual, variant):
    views = [z.requires_grad_() for z in alike(9, 8, dtype=dtype)]
    precision = str(dtype).removeprefix("torch.")
    for name, args in (
        ("barlow_twins", (*views, 1.0, 0.1, 1e-5, False)),
        ("vicreg", (*views, 2.0, 3.0, 4.0, 1e-4, True)),
        ("variance_covariance", (views[0], 2.0, 3.0, 1e-4, True)),
    ):
        op = getattr(torch.ops.fastssl, name + variant).default
        torch.library.opcheck(op, (*with_tensors(args), dual, True, precision))
        detached = (x.detach() if isinstance(x, Tensor) else x for x in with_tensors(args))
        torch.library.opcheck(op, (*detached, dual, False, precision))


@pytest.mark.parametrize("rows, dim", [(100, 300), (300, 100)])
@pytest.mark.parametrize("precision, bound", [("highest", 2e-6), ("high", 2e-3), ("medium", 5e-3)])
def test_gradient_error_of_each_precision(precision, bound, rows, dim, kernels):
    views = alike(rows, dim)
    torch.set_float32_matmul_precision(precision)
    for function, naive in (
        (redundancy_loss, reference.correlation.redundancy_loss),
        (vicreg, reference.correlation.vicreg),
        (lambda a, b: covariance_loss(a + b), lambda a, b: reference.correlation.covariance_loss(a + b)),
    ):
        results = with_gradients(function, *views)
        truth = with_gradients(naive, *(z.double() for z in views))
        for result, true in zip(results, truth, strict=True):
            assert relative_error(result, true) < bound
        if precision == "medium":  # and the products are indeed of bfloat16
            assert relative_error(results[1], truth[1]) > 1e-5


@pytest.mark.parametrize("rows, dim", [(10, 30), (30, 10)])
def test_autocast_rounds_the_products(rows, dim, kernels):
    """Of the forward pass, and of the backward pass."""
    views = alike(rows, dim)
    for function in (redundancy_loss, lambda a, b: covariance_loss(a + b)):
        exact = with_gradients(function, *views)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = with_gradients(function, *views)
        assert all(1e-6 < relative_error(x, y.double()) < 1e-2 for x, y in zip(rounded, exact, strict=True))


def test_what_is_off_the_diagonal_keeps_its_digits(kernels):
    """Correlations of 1e-4 beside a diagonal of 1."""
    z = torch.cat([torch.ones(4096, 1), normal(4096, 64)], 1)
    z = torch.linalg.qr(z.double())[0][:, 1:] * 64
    views = [(z + 1e-4 * normal(4096, 64, seed=seed)).float() for seed in (1, 2)]
    for function, naive in (
        (redundancy_loss, reference.correlation.redundancy_loss),
        (lambda a, b: covariance_loss(a), lambda a, b: reference.correlation.covariance_loss(a)),
    ):
        result, expected = function(*views), naive(*(x.double() for x in views))
        assert 1e-10 < expected < 1e-7
        torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=0)


def test_one_feature_has_no_redundancy(kernels):
    for batch in (2, 3, 50):
        z_a, z_b = alike(batch, 1)
        assert redundancy_loss(z_a, z_b) == 0 and covariance_loss(z_a) == 0
        for gradient in with_gradients(redundancy_loss, z_a, z_b)[1:]:
            assert not gradient.any()


@pytest.mark.parametrize("rows, dim", [(33, 20), (12, 40)])
@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1])
def test_a_constant_feature_correlates_with_none(value, rows, dim, kernels):
    """It adds 1 to the invariance, and nothing else: not even rounding, magnified by 1 / sqrt(eps)."""
    views = alike(rows, dim)
    constant = torch.full((rows, 1), value)
    wider = [torch.cat([z[:, :3], constant, z[:, 3:]], 1) for z in views]
    loss, metrics = barlow_twins(*wider, return_metrics=True)
    expected, parts = barlow_twins(*views, return_metrics=True)
    torch.testing.assert_close(loss, expected + 1)
    torch.testing.assert_close(metrics["redundancy"], parts["redundancy"])
    torch.testing.assert_close(metrics["invariance"], parts["invariance"] + 1)
    torch.testing.assert_close(covariance_loss(wider[0]) * (dim + 1), covariance_loss(views[0]) * dim)
    torch.testing.assert_close(variance_loss(wider[0]) * (dim + 1), variance_loss(views[0]) * dim + 0.99)
    for name, function in LOSSES.items():
        truth = with_gradients(OPS[name].reference, *(z.double() for z in wider))
        for x, y in zip(with_gradients(function, *wider), truth, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("rows, dim", [(33, 20), (12, 40)])
@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e15])
def test_length_of_features_does_not_matter(scale, rows, dim, kernels):
    views = alike(rows, dim)
    loss = functools.partial(barlow_twins, eps=0.0, lambda_param=0.1)
    value, *gradients = with_gradients(loss, *views)
    scaled_value, *scaled = with_gradients(loss, *(z * scale for z in views))
    torch.testing.assert_close(scaled_value, value)
    for x, y in zip(scaled, gradients, strict=True):
        torch.testing.assert_close(x.double() * scale, y.double(), rtol=1e-4, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("rows, dim", [(40, 24), (24, 40)])
def test_far_from_zero(rows, dim, kernels):
    """The columns' means are subtracted before anything is squared; of 4096 a float32 has 11 bits left."""
    views = [z.mul(2**11).round().div(2**11) for z in alike(rows, dim)]  # which have no more
    far = [z + 4096.0 for z in views]
    for function in (*LOSSES.values(), redundancy_loss):
        for x, y in zip(with_gradients(function, *far), with_gradients(function, *views), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())


@pytest.mark.parametrize("rows, dim", [(9, 5), (5, 9)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_wherever_it_is(value, rows, dim, kernels):
    """Also where the weight is 0 of what would have met it."""
    for row, column in ((0, 0), (rows - 1, dim - 1)):
        z_a, z_b = alike(rows, dim)
        z_a[row, column] = value
        for loss in (
            barlow_twins(z_a, z_b),
            barlow_twins(z_b, z_a, lambda_param=0.0),
            vicreg(z_a, z_b, nu_param=0.0),
            vicreg(z_b, z_a, lambda_param=0.0, mu_param=0.0),
            covariance_loss(z_a),
            variance_loss(z_a),
            redundancy_loss(z_b, z_a),
        ):
            assert loss.isnan()


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(2, 70), dim=st.integers(1, 70), seed=st.integers(0, 2**30))
def test_symmetries(batch, dim, seed):
    """Under permutations of samples and features, exchanged views, and shifts; of Barlow Twins, scales too."""
    z_a, z_b = alike(batch, dim, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    samples, features = (torch.randperm(n, generator=generator) for n in (batch, dim))
    shift = torch.randn(dim, generator=generator)
    for loss in (
        functools.partial(barlow_twins, lambda_param=0.3),
        vicreg,
        lambda a, b: covariance_loss(a) + covariance_loss(b),
        lambda a, b: variance_loss(a) + variance_loss(b),
        redundancy_loss,
    ):
        expected = loss(z_a, z_b)
        # Two samples' standardised features are 1 and -1, wherever the difference is above sqrt(eps).
        close = {"rtol": 1e-3, "atol": 1e-3 * dim}
        torch.testing.assert_close(loss(z_b, z_a), expected, rtol=1e-4, atol=1e-5 * dim)
        torch.testing.assert_close(loss(z_a[samples], z_b[samples]), expected, **close)
        torch.testing.assert_close(loss(z_a[:, features], z_b[:, features]), expected, **close)
        torch.testing.assert_close(loss(z_a + shift, z_b + shift), expected, **close)
    scale = torch.rand(dim, generator=generator) + 0.5
    if batch > 2:
        of_scaled = barlow_twins(z_a * scale, z_b / scale, eps=0.0)
        torch.testing.assert_close(of_scaled, barlow_twins(z_a, z_b, eps=0.0), rtol=1e-3, atol=1e-3 * dim)
    torch.testing.assert_close(redundancy_loss(-z_a, z_b), redundancy_loss(z_a, z_b), rtol=1e-4, atol=1e-5 * dim)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(2, 60), dim=st.integers(1, 60), seed=st.integers(0, 2**30))
def test_losses_that_are_one_another(batch, dim, seed):
    z_a, z_b = alike(batch, dim, seed=seed)
    close = {"rtol": 1e-4, "atol": 1e-5 * dim}
    C = cross_correlation(z_a, z_b)
    squares = C.square().sum() - C.diagonal().square().sum()
    invariance = (C.diagonal() - 1).square().sum()
    torch.testing.assert_close(redundancy_loss(z_a, z_b), squares, **close)
    torch.testing.assert_close(barlow_twins(z_a, z_b, lambda_param=0.2), invariance + 0.2 * squares, **close)
    torch.testing.assert_close(barlow_twins(z_a, z_b, lambda_param=0.0), invariance, **close)
    terms = covariance_loss(z_a) + covariance_loss(z_b), variance_loss(z_a) + variance_loss(z_b)
    distance = (z_a - z_b).square()
    expected = 3 * distance.mean() + 5 * terms[1] / 2 + 7 * terms[0]
    weights = {"lambda_param": 3.0, "mu_param": 5.0, "nu_param": 7.0}
    torch.testing.assert_close(vicreg(z_a, z_b, **weights), expected, **close)
    paper = vicreg(z_a, z_b, **weights, invariance_reduction="batchmean", variance_reduction="sum")
    expected = 3 * distance.sum() / batch + 5 * terms[1] + 7 * terms[0]
    torch.testing.assert_close(paper, expected, **close)


@pytest.mark.parametrize("rows, dim", [(20, 10), (10, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_metrics(dtype, rows, dim, kernels):
    views = [z.requires_grad_() for z in alike(rows, dim, dtype=dtype)]
    paper = {"invariance_reduction": "batchmean", "variance_reduction": "sum"}
    for function, weights, options in (
        (barlow_twins, {"invariance": 1.0, "redundancy": 0.2}, {"lambda_param": 0.2}),
        (barlow_twins, {"invariance": 1.0, "redundancy": 0.0}, {"lambda_param": 0.0}),
        (vicreg, {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}, {}),
        (vicreg, {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}, paper),
    ):
        loss, metrics = function(*views, return_metrics=True, **options)
        assert torch.equal(loss, function(*views, **options))
        assert list(metrics) == list(weights)
        assert all(x.dtype == torch.float32 and x.shape == () and not x.requires_grad for x in metrics.values())
        total = sum(weight * metrics[name] for name, weight in weights.items())
        torch.testing.assert_close(loss.float(), total, rtol=max(1e-5, torch.finfo(dtype).eps), atol=0)
        with fastssl.use_backend("reference"):
            _, expected = function(*views, return_metrics=True, **options)
        for name, metric in metrics.items():
            if weights[name]:
                tolerance = 1e-5 if dtype != torch.bfloat16 else 0.03
                torch.testing.assert_close(metric, expected[name], rtol=tolerance, atol=tolerance)
            else:
                assert metric == 0
        loss.backward()


def test_metrics_compile():
    torch._dynamo.reset()
    for rows, dim in ((20, 10), (10, 20)):
        views = alike(rows, dim)
        for function in LOSSES.values():
            compiled = torch.compile(
                functools.partial(function, return_metrics=True), fullgraph=True, backend="aot_eager"
            )
            torch.testing.assert_close(compiled(*views), function(*views, return_metrics=True))


def test_compile_follows_a_schedule():
    """A weight that is another number at every step."""
    torch._dynamo.reset()
    views = alike(7, 10)
    for function in LOSSES.values():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for value in (0.5, 0.4, 0.3):
            result = compiled(*views, lambda_param=value)
            torch.testing.assert_close(result, function(*views, lambda_param=value))


@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_correlation(dtype):
    views = alike(30, 12, dtype=dtype)
    wide = [z.double() for z in views]
    for unbiased in (False, True):
        C = cross_correlation(*views, eps=0.1, unbiased=unbiased)
        assert C.dtype == dtype and C.shape == (12, 12)
        a, b = ((z - z.mean(0)) / (z.var(0, unbiased=unbiased) + 0.1).sqrt() for z in wide)
        torch.testing.assert_close(C.double(), a.T @ b / 30, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        C = cross_correlation(*views)
    assert C.dtype == torch.float32
    torch.testing.assert_close(C.double(), cross_correlation(*wide), rtol=1e-5, atol=1e-6)  # no product was rounded


def test_cross_correlation_is_differentiable():
    views = [z.requires_grad_() for z in alike(5, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(cross_correlation, views)
    assert torch.autograd.gradgradcheck(cross_correlation, views)
    torch.testing.assert_close(
        cross_correlation(views[0], views[0], eps=0.0).diagonal().detach(), torch.ones(3).double()
    )
    with pytest.raises(ValueError, match=r"z_a must have at least 2 rows, got shape \(1, 3\)"):
        cross_correlation(views[0][:1], views[1][:1])
    with pytest.raises(ValueError, match="eps must not be negative, got -1"):
        cross_correlation(*views, eps=-1)


@pytest.mark.parametrize("rows, dim", [(20, 10), (10, 20)])
def test_redundancy_of_a_view_with_itself(rows, dim, kernels):
    """Both gradients are its."""
    z = alike(rows, dim)[0]
    result = with_gradients(lambda z: redundancy_loss(z, z, unbiased=True), z)
    truth = with_gradients(lambda z: reference.correlation.redundancy_loss(z, z, unbiased=True), z.double())
    for x, y in zip(result, truth, strict=True):
        assert relative_error(x, y) < 1e-5


def test_redundancy_refuses():
    z = normal(4, 3)
    with pytest.raises(ValueError, match=r"z_a and z_b must have the same shape, got \(4, 3\) and \(4, 2\)"):
        redundancy_loss(z, z[:, :2])
    with pytest.raises(ValueError, match=r"z_a must have at least 2 rows, got shape \(1, 3\)"):
        redundancy_loss(z[:1], z[:1])
    with pytest.raises(TypeError, match="eps must be a number, got str"):
        redundancy_loss(z, z, eps="0")


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "covariance_loss"])
@pytest.mark.parametrize("dual", [True, False])
def test_what_is_kept(name, dual, kernels):
    views = alike(9, 5)[: 2 if name in LOSSES else 1]
    for derive in (True, False):
        kept = [x for x in _run(name, dual, *views, derive=derive) if x.dim()]
        assert [tuple(x.shape) for x in kept] == [(9 if derive else 0, 9 if dual else 5)] * len(views)
        assert all(x.dtype == torch.float32 for x in kept)


def test_use_backend_reference_is_the_formula():
    z_a, z_b = alike(9, 8)
    naive = reference.correlation
    with fastssl.use_backend("reference"):
        for name in ("barlow_twins", "vicreg", "redundancy_loss"):
            options = {"eps": 0.3, "unbiased": name != "vicreg"}
            result, expected = (getattr(module, name)(z_a, z_b, **options) for module in (functional, naive))
            assert torch.equal(result, expected)
        assert torch.equal(covariance_loss(z_a, unbiased=False), naive.covariance_loss(z_a, unbiased=False))
        assert torch.equal(variance_loss(z_a, eps=0.3), naive.variance_loss(z_a, eps=0.3))


def test_barlow_twins_standardises_as_batch_norm_does():
    views = alike(30, 12)
    a, b = (F.batch_norm(z, None, None, training=True) for z in views)
    torch.testing.assert_close(cross_correlation(*views), a.T @ b / 30)


@pytest.mark.parametrize("rows, dim", [(33, 20), (12, 40)])
def test_more_than_float32_holds_is_infinite(rows, dim, kernels):
    views = [torch.randn(rows, dim) * 1e10 for _ in range(2)]
    assert vicreg(*views).isinf() and covariance_loss(views[0]).isinf()
