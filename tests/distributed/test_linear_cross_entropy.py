"""linear_cross_entropy over processes that share out the words: together they compute what one computes with all."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastssl
from fastssl.distributed import rank, world_size
from fastssl.functional import linear_cross_entropy
from tests.distributed.processes import needs_gloo, run_processes

pytestmark = needs_gloo
WORDS = (5, 40, 1, 12)  # of each process
NAMED = (
    {},
    {"reduction": "sum"},
    {"reduction": "none", "bias": True},
    {"bias": True, "weight": True, "label_smoothing": 0.2},
    {"normalize": True, "temperature": 0.3, "label_smoothing": 0.1, "bias": True},
)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    along = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape) if value.dim() else None
    first = torch.autograd.grad(value, leaves, along, create_graph=True)
    second = torch.autograd.grad(sum((g.square()).sum() for g in first), leaves)
    return [x.detach() for x in (*first, *second)]


def _check(dtype: torch.dtype, backend: str, bias: bool = False, weight: bool = False, **named: object) -> None:
    words = WORDS[: world_size()]
    mine = slice(sum(words[: rank()]), sum(words[: rank() + 1]))
    x, w, b = (_normal(*shape, seed=i).to(dtype) for i, shape in enumerate(((4, 6, 8), (sum(words), 8), (sum(words),))))
    labels = torch.randint(sum(words), (4, 6), generator=torch.Generator().manual_seed(3))
    labels[labels % 4 == 1] = -100
    class_weight = _normal(sum(words), seed=4).abs() if weight else None
    temperature = torch.tensor(named.pop("temperature", 1.0), dtype=dtype)
    results = []
    for part, group in ((slice(None), None), (mine, dist.group.WORLD)):
        leaves = [z.clone().requires_grad_() for z in (x, w[part], temperature, *([b[part]] if bias else []))]
        with fastssl.use_backend(backend):
            value = linear_cross_entropy(
                leaves[0],
                leaves[1],
                labels,
                temperature=leaves[2],
                linear_bias=leaves[3] if bias else None,
                weight=class_weight[part] if weight else None,
                group=group,
                **named,
            )
            count = len(leaves)
            results.append([value.detach(), *_gradients(value, leaves)])
    expected, found = results
    for i in (2, 2 + count, *((4, 4 + count) if bias else ())):  # by the words
        expected[i] = expected[i][mine]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _check_all() -> None:
    for named in NAMED:
        _check(torch.float64, "portable", **named)
        _check(torch.float32, "auto", **named)
    _check_bad_input()


def _check_bad_input() -> None:
    x, w, labels = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 5 * world_size() - 1, -100, 3])
    of = functools.partial(linear_cross_entropy, group=dist.group.WORLD)
    assert of(x, w, labels).isfinite()
    assert of(x, w, labels.fill_(-100)).isnan()
    with pytest.raises(IndexError, match=f"target must be from 0 to below {5 * world_size()}, .*got 70"):
        of(x, w, labels.fill_(70))
    with pytest.raises(ValueError, match="target must be labels with group"):
        of(x, w, torch.rand(4, 5))
    with pytest.raises(ValueError, match="weight must be given on every process of group or on none, got it on 1"):
        of(x, w, labels.fill_(0), weight=torch.ones(5) if rank() == 1 else None)
    with pytest.raises(ValueError, match="input and target must have the same shape"):
        of(x[: 3 + rank() % 2], w, labels[: 3 + rank() % 2].fill_(0))


@pytest.mark.parametrize("processes", [2, 4])
def test_together_they_are_one(processes, tmp_path):
    run_processes(_check_all, processes, tmp_path)
