"""Inputs for the nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.reference.samples._inputs import generator, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample
from fastssl.reference.topk_similarity import topk_similarity


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for m, n, dim, k in [(1, 1, 1, 1), (2, 3, 4, 2), (5, 7, 64, 3), (65, 129, 33, 129), (3, 300, 16, 10)]:
        yield Sample(f"{k} of {m}x{n}x{dim}", (rows(m, dim), rows(n, dim), k), tags=sized(m, n, dim))
    query, bank = rows(9, 24), rows(40, 24)
    yield Sample("not normalized", (query, bank, 5), {"normalize": False})
    yield Sample("transposed", (rows(24, 9).T, rows(24, 40).T, 5), tags={TRACED})
    yield Sample("sliced", (rows(18, 50)[::2, 1:25], rows(80, 50)[1::2, 25:49], 5), tags={TRACED})
    if dtype != torch.float16:  # which rounds normalize's 1e-12 to 0
        yield Sample("zero row", (torch.cat([query, torch.zeros_like(query[:1])]), bank, 5), tags={EDGE})
    yield Sample("empty", (query[:0], bank, 5), tags={TRACED})


def _bad_inputs() -> Iterator[BadInput]:
    x, y = torch.randn(8, 16), torch.randn(9, 16)
    yield BadInput("features differ", (x, y[:, :8], 2), {}, ValueError, r"query and bank .*same number.*\(9, 8\)")
    yield BadInput("one dimension", (x, y[0], 2), {}, ValueError, r"bank .*\(N, D\).*\(16,\)")
    yield BadInput("dtypes differ", (x, y.half(), 2), {}, ValueError, "query and bank .*same dtype.*float32.*float16")
    yield BadInput("integers", (x.long(), y.long(), 2), {}, ValueError, "query .*floating.*int64")
    yield BadInput("not a tensor", (x.tolist(), y, 2), {}, TypeError, "query .*Tensor.*list")
    yield BadInput("none", (x, y, 0), {}, ValueError, "k must be .*1.*got 0")
    yield BadInput("too many", (x, y, 10), {}, ValueError, "k must be .*9.*got 10")
    yield BadInput("a float", (x, y, 2.0), {}, TypeError, "k must be an integer, got float")


def _check(sample: Sample, values: Tensor, indices: Tensor) -> None:
    """Values are the largest similarities, descending; indices name rows that have them, each once."""
    query, bank, k = sample.args
    similarity, order = topk_similarity(query.double(), bank.double(), bank.shape[0], **sample.kwargs)
    of_row = torch.empty_like(similarity).scatter_(1, order, similarity)
    assert indices.dtype == torch.int64 and values.shape == indices.shape == (query.shape[0], k)
    assert all(len(set(row)) == k for row in indices.tolist())
    size = max(similarity.abs().max().item(), 1) if similarity.numel() else 1
    tolerance = 4 * torch.finfo(values.dtype).eps * size * query.shape[1] ** 0.5
    assert ((values - similarity[:, :k]).abs() <= tolerance).all()
    assert ((values - of_row.gather(1, indices)).abs() <= tolerance).all()
    assert (values.diff(dim=1) <= 0).all()


OpSpec(
    "topk_similarity",
    "topk_similarity",
    topk_similarity,
    _samples,
    _bad_inputs,
    op="",
    check=_check,
    multiplies=None,  # which PyTorch computes
    autocast="inputs",
)
