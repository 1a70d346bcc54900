"""What holds for the most similar rows in particular."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastssl.functional import topk_similarity
from tests.inputs import normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_topk_similarity(dtype, normalize, monkeypatch):
    query, bank = normal(37, 12, dtype=dtype), normal(101, 12, seed=1, dtype=dtype)
    exact = [F.normalize(z.double()) if normalize else z.double() for z in (query, bank)]
    S = exact[0] @ exact[1].T
    module = importlib.import_module(topk_similarity.__module__)  # the package has a function of that name
    for columns, elements in ((1 << 14, 1 << 22), (7, 50), (13, 1)):
        monkeypatch.setattr(module, "_TOPK_COLUMNS", columns)
        monkeypatch.setattr(module, "_TOPK_ELEMENTS", elements)
        for k in (1, 5, 100, 101):
            values, indices = topk_similarity(query, bank, k, normalize=normalize)
            assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert indices.dtype == torch.int64 and values.shape == indices.shape == (37, k)
            close = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(values.double(), S.topk(k).values, **close)
            torch.testing.assert_close(S.gather(1, indices), S.topk(k).values, **close)
            assert (indices.sort(1).values.diff(dim=1) > 0).all()  # none twice


def test_topk_similarity_normalises_the_bank_once(monkeypatch):
    module, rows = importlib.import_module(topk_similarity.__module__), []
    monkeypatch.setattr(module, "_TOPK_COLUMNS", 10)
    monkeypatch.setattr(module, "_TOPK_ELEMENTS", 50)
    monkeypatch.setattr(module, "unit", lambda x: rows.append(len(x)) or F.normalize(x, dim=-1))
    topk_similarity(normal(37, 12), normal(101, 12), 3)
    blocks = -(-101 // 10)
    assert sum(rows) == 101 + 37 * blocks


def test_topk_similarity_of_equal_rows_and_none():
    values, indices = topk_similarity(normal(3, 4), normal(1, 4).expand(9, 4), 9)
    torch.testing.assert_close(values, values[:, :1].expand(3, 9))
    assert torch.equal(indices.sort(1).values, torch.arange(9).expand(3, 9))
    values, indices = topk_similarity(normal(0, 4), normal(9, 4), 2)
    assert values.shape == indices.shape == (0, 2)
    values, _ = topk_similarity(normal(3, 4).requires_grad_(), normal(9, 4).requires_grad_(), 2)
    assert not values.requires_grad


def test_topk_similarity_under_autocast_and_compile():
    query, bank = normal(9, 16), normal(50, 16, seed=1)
    expected = topk_similarity(query, bank, 3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(topk_similarity(query, bank, 3), expected)
    torch._dynamo.reset()
    compiled = torch.compile(topk_similarity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, bank, 3), expected)


@pytest.mark.parametrize(
    "args, error, match",
    [
        (
            (normal(8, 4), normal(9, 5), 1),
            ValueError,
            r"query and bank .*same number of features.*\(8, 4\) and \(9, 5\)",
        ),
        ((normal(8, 4), normal(9, 4).half(), 1), ValueError, "query and bank .*same dtype.*float32 and torch.float16"),
        ((normal(8, 4), normal(9, 4).to("meta"), 1), ValueError, "query and bank .*same device.*cpu and meta"),
        ((normal(4), normal(9, 4), 1), ValueError, r"query .*\(M, D\).*\(4,\)"),
        ((normal(8, 4), [1.0], 1), TypeError, "bank .*Tensor.*list"),
        ((normal(8, 4), normal(9, 4), 0), ValueError, "k must be from 1 to .*9, got 0"),
        ((normal(8, 4), normal(9, 4), 10), ValueError, "k must be from 1 to .*9, got 10"),
        ((normal(8, 4), normal(0, 4), 1), ValueError, "k must be from 1 to .*0, got 1"),
        ((normal(8, 4), normal(9, 4), 1.0), TypeError, "k must be an integer, got float"),
    ],
)
def test_topk_similarity_refuses(args, error, match):
    with pytest.raises(error, match=match):
        topk_similarity(*args)
