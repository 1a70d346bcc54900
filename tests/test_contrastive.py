"""What holds for the softmax contrastive losses in particular."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from accuracy import Results, assert_as_accurate_as_eager, evaluate, public, truth_and_eager, unreduced
from hypothesis import given, settings
from hypothesis import strategies as st

import fastssl
from fastssl import reference
from fastssl.functional import nt_xent, similarity_logsumexp
from fastssl.reference import OPS, Sample

SIZES = (1, 3, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513)
DIMS = (1, 2, 15, 16, 17, 31, 33, 100, 128, 130, 257, 768)


def _rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _with_gradients(function, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output.sum(), leaves)


def _relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def _sample(name: str, *args: torch.Tensor, **kwargs) -> Sample:
    return unreduced(OPS[name], Sample(name, tuple(x.detach().requires_grad_() for x in args), kwargs))


def _assert_as_accurate_as_eager(name: str, *args: torch.Tensor, **kwargs) -> None:
    sample = _sample(name, *args, **kwargs)
    assert_as_accurate_as_eager(OPS[name], sample, evaluate(public(OPS[name]), sample))


@functools.cache
def _ragged(name: str, rows: int, columns: int, dim: int) -> tuple[Sample, tuple[Results, Results]]:
    x, y = _rows(rows, dim), _rows(columns, dim, seed=1)
    if name == "nt_xent":
        sample = _sample(name, x, y, temperature=0.2)
    else:
        exclude = torch.arange(rows) + columns // 2
        sample = _sample(name, F.normalize(x), F.normalize(y), exclude=exclude)
    return sample, truth_and_eager(OPS[name], sample)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", ["nt_xent", "similarity_logsumexp"])
def test_every_edge_of_a_tile(name, rows, kernels):
    columns = dict.fromkeys(DIMS, rows) if name == "nt_xent" else dict(zip(DIMS, SIZES, strict=False))
    for dim in DIMS:
        sample, yardstick = _ragged(name, rows, columns[dim], dim)
        assert_as_accurate_as_eager(OPS[name], sample, evaluate(public(OPS[name]), sample), yardstick)


@pytest.mark.parametrize("clusters", [None, 16])
@pytest.mark.parametrize("precision, bound", [("highest", 2e-6), ("high", 2e-3), ("medium", 5e-3)])
def test_gradient_error_of_each_precision(precision, bound, clusters, kernels):
    z1 = _rows(512, 128)
    z2 = z1 + 0.5 * _rows(512, 128, seed=1)
    if clusters:
        z1, z2 = (z + 2 * _rows(clusters, 128, seed=2).repeat(512 // clusters, 1) for z in (z1, z2))
    torch.set_float32_matmul_precision(precision)
    results = _with_gradients(nt_xent, z1, z2)
    truth = _with_gradients(reference.contrastive.nt_xent, z1.double(), z2.double())
    for gradient, true in zip(results[1:], truth[1:], strict=True):
        assert _relative_error(gradient, true) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_antipodal_pair_at_low_temperature(dtype, backend):
    """B = 1: the one similarity is exp(-100), or exp(100), which float32 cannot hold, and the loss is 0."""
    z = torch.ones(1, 4, dtype=dtype)
    for other in (-z, z):
        loss, dz1, dz2 = _with_gradients(lambda a, b: nt_xent(a, b, temperature=0.01), z, other)
        assert loss == 0
        assert dz1.abs().max() < 1e-5 and dz2.abs().max() < 1e-5


def test_a_pair_alone_has_no_loss(backend):
    for seed in range(20):
        for temperature in (0.1, 1.0, 7.0):
            assert nt_xent(_rows(1, 2, seed=seed), _rows(1, 2, seed=99 - seed), temperature=temperature) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, -0.01])
def test_antipodal_clusters(temperature, kernels):
    """Similarities from -1 / T to 1 / T in one row: a shift that is fixed for all rows under- or overflows."""
    pole = _rows(1, 8)
    z1 = torch.cat([pole.expand(40, 8), -pole.expand(1, 8)]) + 1e-3 * _rows(41, 8, seed=1)
    z2 = torch.cat([pole.expand(40, 8), pole]) + 1e-3 * _rows(41, 8, seed=2)
    _assert_as_accurate_as_eager("nt_xent", z1, z2, temperature=temperature)


def test_long_rows_that_are_not_normalised(kernels):
    """Similarities of up to a thousand, and of both signs."""
    rows = 5 * _rows(70, 40), 5 * _rows(70, 40, seed=1)
    _assert_as_accurate_as_eager("nt_xent", *rows, temperature=1.0, normalize=False)
    _assert_as_accurate_as_eager("similarity_logsumexp", *rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 33, 150])
def test_identical_rows(batch, dtype, backend):
    """Every row is every other: log(2B - 1), never below 0, and no gradient."""
    z = _rows(1, 16, dtype=dtype).expand(batch, 16)
    for temperature in (0.5, 0.05, 0.01):
        loss, dz1, _ = _with_gradients(lambda a, b, t=temperature: nt_xent(a, b, temperature=t, reduction="none"), z, z)
        assert (loss >= 0).all()
        expected = torch.full_like(loss, 2 * batch - 1).log()
        torch.testing.assert_close(loss, expected, rtol=torch.finfo(dtype).eps, atol=2e-5)
        assert dz1.abs().max() <= 4 * batch * torch.finfo(dtype).eps / temperature


@pytest.mark.parametrize("scale", [1e-10, 1e15, 1e30])
def test_length_of_rows_does_not_matter(scale, kernels):
    z1, z2 = _rows(17, 24), _rows(17, 24, seed=1)
    loss, dz1, _ = _with_gradients(nt_xent, z1, z2)
    scaled_loss, scaled_dz1, _ = _with_gradients(nt_xent, z1 * scale, z2)
    torch.testing.assert_close(scaled_loss, loss)
    torch.testing.assert_close(scaled_dz1.double() * scale, dz1.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [3e-13, 1e-14, 1e-30])
def test_rows_too_short_to_normalise(scale, kernels):
    """Divided by 1e-12 as they are, they keep a length, and their gradient is not projected."""
    _assert_as_accurate_as_eager("nt_xent", scale * F.normalize(_rows(17, 24)), _rows(17, 24, seed=1))


def test_all_rows_zero(backend):
    """S = 0: the loss of a guess, and F.normalize's gradient, which is not projected."""
    for result, expected in zip(
        _with_gradients(nt_xent, torch.zeros(9, 8), torch.zeros(9, 8)),
        _with_gradients(reference.contrastive.nt_xent, torch.zeros(9, 8), torch.zeros(9, 8)),
        strict=True,
    ):
        torch.testing.assert_close(result, expected)


def test_mean_of_an_empty_batch_is_nan(backend):
    assert nt_xent(torch.ones(0, 8), torch.ones(0, 8)).isnan()


@pytest.mark.parametrize("value, expected", [(0.0, "nan"), (float("inf"), "finite"), (float("nan"), "nan")])
def test_a_tensor_temperature_without_meaning(value, expected, backend):
    loss = nt_xent(_rows(5, 8), _rows(5, 8, seed=1), temperature=torch.tensor(value))
    assert loss.isnan() if expected == "nan" else loss.isfinite()


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 80), dim=st.integers(1, 70), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 2**30))
def test_symmetries(batch, dim, temperature, seed):
    """Of the losses under a permutation of the samples, a rotation of all rows, and a change of their lengths."""
    z1, z2 = _rows(batch, dim, seed=seed), _rows(batch, dim, seed=seed + 1)

    def losses(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nt_xent(a, b, temperature=temperature, reduction="none").view(2, batch)

    expected = losses(z1, z2)
    close = {"rtol": 1e-4, "atol": 1e-5 / temperature}
    assert (expected >= 0).all()
    torch.testing.assert_close(losses(z2, z1), expected.flip(0), **close)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses(z1[order], z2[order]), expected[:, order], **close)
    rotation = torch.linalg.qr(_rows(dim, dim, seed=seed).double())[0].float()
    torch.testing.assert_close(losses(z1 @ rotation, z2 @ rotation), expected, **close)
    lengths = torch.logspace(-3, 3, batch)[:, None]
    torch.testing.assert_close(losses(z1 * lengths, z2 / lengths), expected, **close)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 60), first=st.integers(1, 90), second=st.integers(1, 90), seed=st.integers(0, 2**30))
def test_logsumexp_of_two_queues_is_that_of_both(rows, first, second, seed):
    x, y = _rows(rows, 20, seed=seed), _rows(first + second, 20, seed=seed + 1)
    apart = torch.logaddexp(similarity_logsumexp(x, y[:first]), similarity_logsumexp(x, y[first:]))
    torch.testing.assert_close(similarity_logsumexp(x, y), apart, rtol=1e-5, atol=1e-5)


def test_nt_xent_is_a_logsumexp(backend):
    z1, z2 = F.normalize(_rows(70, 30)), F.normalize(_rows(70, 30, seed=1))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = torch.cat([a, b])
        positive = 2 * (z * z.roll(70, 0)).sum(1)
        return similarity_logsumexp(z, z, scale=2.0, exclude=torch.arange(140), offset=positive)

    for result, expected in zip(
        _with_gradients(loss, z1, z2),
        _with_gradients(lambda a, b: nt_xent(a, b, normalize=False, reduction="none"), z1, z2),
        strict=True,
    ):
        torch.testing.assert_close(result, expected)


def test_a_queue_may_move_on_before_the_backward_pass(backend):
    x, queue = _rows(9, 8).requires_grad_(), _rows(20, 8, seed=1)
    expected = torch.autograd.grad(similarity_logsumexp(x, queue).sum(), x)
    output = similarity_logsumexp(x, queue).sum()
    queue.fill_(7)
    torch.testing.assert_close(torch.autograd.grad(output, x, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="y was modified in place.*second derivative"):
        torch.autograd.grad(output, x, create_graph=True)


def test_a_y_that_needs_its_gradient_may_not(backend):
    x, y = _rows(9, 8), _rows(20, 8, seed=1).requires_grad_()
    output = similarity_logsumexp(x, y).sum()
    with torch.no_grad():
        y.fill_(7)
    with pytest.raises(RuntimeError, match="y was modified in place.*its gradient"):
        output.backward()


MEMORY = """
    import sys, torch, fastssl
    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
    def step(rows):
        z1, z2 = (torch.randn(rows // 2, 64).requires_grad_() for _ in range(2))
        with fastssl.use_backend(sys.argv[1]):
            fastssl.functional.nt_xent(z1, z2).backward()
    step(256)
    before = peak()
    for rows in map(int, sys.argv[2:]):
        step(rows)
        print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("backend, rows", [("auto", 32768), ("portable", 16384)])
def test_memory_is_linear_in_the_batch(backend, rows):
    """32,768 x 32,768 similarities would take 4,096 MiB; the rows and their gradients take 16."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), backend, str(rows // 2), str(rows)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    half, full = map(float, run.stdout.split())
    mebibytes = rows * 64 * 4 / 2**20
    assert full < 200
    assert full - half < 16 * mebibytes


def test_compile_follows_a_schedule():
    """A temperature, or scale, that is another number at every step."""
    torch._dynamo.reset()
    x, y = _rows(5, 8), _rows(5, 8, seed=1)
    for function, name in ((nt_xent, "temperature"), (similarity_logsumexp, "scale")):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for value in (0.5, 0.4, 0.3):
            torch.testing.assert_close(compiled(x, y, **{name: value}), function(x, y, **{name: value}))


def test_use_backend_reference_is_the_formula():
    z1, z2 = _rows(9, 8), _rows(9, 8, seed=1)
    with fastssl.use_backend("reference"):
        assert torch.equal(nt_xent(z1, z2), reference.contrastive.nt_xent(z1, z2))
