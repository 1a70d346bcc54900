"""Drawing from a linear layer's logits: as likely as the softmax says, and the same on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import linear_categorical
from tests.inputs import seeded

chisquare = pytest.importorskip("scipy.stats").chisquare
LEVEL = 1e-6  # of chi-square's tests


def _layer(count: int, dim: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (count, dim), (classes, dim), (classes,)
    return tuple(torch.randn(shape, generator=seeded(i)).to(dtype) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_classes_are_as_likely_as_the_softmax_says(temperature, backend):
    x, w, bias = _layer(1, 6, 12)
    bias[3] = float("-inf")
    with fastssl.use_backend(backend):
        ids = linear_categorical(x.expand(60000, 6), w, linear_bias=bias, temperature=temperature, generator=seeded(3))
    probability = ((x @ w.T + bias) / temperature).double().softmax(1)[0]
    some = probability * len(ids) > 5
    counts, expected = (torch.cat([n[some], n[~some].sum()[None]]) for n in (ids.bincount(minlength=12), probability))
    assert not (ids == 3).any()
    assert chisquare(counts[expected > 0], (expected * len(ids))[expected > 0]).pvalue > LEVEL


def test_rows_and_classes_are_drawn_by_themselves():
    """Two rows with the same logits, and two classes: all four pairs of draws are as likely."""
    x, w = torch.zeros(40000, 3), torch.zeros(2, 3)
    first, second = linear_categorical(x, w, generator=seeded(0)).view(2, -1)
    for other in (second, first.roll(1)):
        assert chisquare((2 * first + other).bincount(minlength=4)).pvalue > LEVEL
    assert not torch.equal(linear_categorical(x, w, generator=seeded(1)), linear_categorical(x, w, generator=seeded(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (33, 40, 65), (130, 24, 1100), (7, 16, 5000)], ids=str)
def test_a_seed_draws_the_same_everywhere(sizes, dtype):
    x, w, bias = _layer(*sizes, dtype)
    w = w / 4
    for named in ({}, {"linear_bias": bias, "temperature": 2.0}):
        results = []
        for backend, threads in (("auto", 1), ("auto", 2), ("portable", 2), ("reference", 1)):
            torch.set_num_threads(threads)
            with fastssl.use_backend(backend):
                results.append(linear_categorical(x, w, generator=seeded(4), **named))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_unlike_dtypes_under_autocast(backend):
    """Features of a layer, and a parameter."""
    x, w, _ = _layer(40, 8, 70)
    with fastssl.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        ids = [linear_categorical(*z, generator=seeded(4)) for z in ((x.bfloat16(), w), (x.bfloat16(), w.bfloat16()))]
    assert torch.equal(*ids)


@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_rows_without_a_distribution(backend):
    x, w, bias = _layer(40, 8, 70)
    x[3, 2], x[5] = float("nan"), 0
    with fastssl.use_backend(backend):
        assert (linear_categorical(x, w) == -1).nonzero().tolist() == [[3]]
        bias[:] = float("-inf")
        assert (linear_categorical(x, w, linear_bias=bias) == -1).all()
        assert (linear_categorical(x, w, temperature=torch.tensor(-1.0)) == -1).all()
        bias[69] = 0
        found = linear_categorical(x, w, linear_bias=bias)
        assert found[3] == -1 and (found == 69).sum() == 39
        bias[68] = float("inf")
        assert (linear_categorical(x, w, linear_bias=bias) == 68).sum() == 39
