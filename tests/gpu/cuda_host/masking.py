"""Masks, and tokens gathered, scattered and restored: csrc/cuda/masking.cu."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.cuda_host.common.operations import (
    DEVICE,
    DTYPES,
    LIBRARY,
    assert_aborts,
    assert_as_accurate,
    assert_launches,
    cuda,
    layouts,
    permutations,
    portable,
)


def _combinations(shape: tuple[int, ...]) -> list[tuple[torch.dtype, int]]:
    """Each dtype with one of `layouts`, another one for each shape."""
    return [(dtype, (SHAPES.index(shape) + i) % 4) for i, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize(
    "batch, length, keep",
    [(4, 1, 0), (3, 2, 1), (7, 64, 16), (2, 65, 65), (2, 257, 3), (1, 600, 150), (0, 5, 2), (5, 0, 0)],
)
def test_masking_ids(batch, length, keep):
    for seed in (torch.tensor(0), torch.tensor(2**62 - 1), torch.tensor(-12345)):
        results = [op(seed, batch, length, keep) for op in (cuda.masking_ids, portable.masking_ids_portable)]
        assert all(map(torch.equal, *results))


def test_launches():
    x, row, ids = torch.ones(33, 2, 4), torch.ones(4), permutations(33, 6)
    assert_launches("masking_ids", torch.tensor(0), 33, 6, 2)
    assert_launches("gather_tokens", x, ids[:, :5] // 3)
    assert_launches("scatter_tokens", x, ids[:, :2], 6, row)
    assert_launches("restore_tokens", x, ids, row, torch.ones(6, 4))
    assert_launches("restore_tokens_backward", torch.ones(33, 6, 4), ids, [33, 2, 4], True)


SHAPES = ((3, 7, 5), (1, 1, 1), (2, 130, 16), (2, 3, 300), (1, 70, 129), (40, 3, 8), (0, 4, 3), (2, 0, 3), (2, 3, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_and_scatter(shape):
    batch, length, dim = shape
    count = length + 2 if length else 0
    for dtype, layout in _combinations(shape):
        ids = torch.randint(max(length, 1), (batch, count)).to((torch.int64, torch.int32)[layout % 2])
        x, tokens = (layouts(*size, dim, dtype=dtype)[layout] for size in ((batch, length), (batch, count)))
        assert torch.equal(cuda.gather_tokens(x, ids), x.gather(1, ids.long()[:, :, None].expand(-1, -1, dim)))
        fill = torch.randn(dim)
        results = [op(tokens, ids, length, fill) for op in (cuda.scatter_tokens, portable.scatter_tokens_portable)]
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        args = tokens[:, : length // 2], permutations(batch, length + 1)[:, : length // 2], length + 1, fill
        assert torch.equal(cuda.scatter_tokens(*args), portable.scatter_tokens_portable(*args))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_restore(shape):
    batch, length, dim = shape
    for dtype, layout in _combinations(shape):
        keep = (length + 1) // 2
        ids = permutations(batch, length).to((torch.int64, torch.int32)[layout % 2])
        x, grad = (layouts(batch, n, dim, dtype=dtype)[layout] for n in (keep, length))
        mask_token, pos_embed = torch.randn(dim), torch.randn(length, dim).to(dtype)
        for positions in (None, pos_embed):
            args = x, ids, mask_token, positions
            assert torch.equal(cuda.restore_tokens(*args), portable.restore_tokens_portable(*args))
        for positions in (False, True):
            args = grad, ids, [batch, keep, dim], positions
            assert_as_accurate("restore_tokens_backward", *args)
        if length > 1:  # a token that several places show, and one that none does
            ids[:, 0] = ids[:, 1]
            args = grad, ids, [batch, keep, dim], True
            assert_as_accurate("restore_tokens_backward", *args)


def test_gradients_of_many_samples_are_summed_in_parts():
    for batch in (32, 33, 97):
        grad, ids = torch.randn(batch, 9, 12), permutations(batch, 9)
        for positions in (False, True):
            args = grad, ids, [batch, 4, 12], positions
            assert_as_accurate("restore_tokens_backward", *args)


X, IDS = torch.randn(2, 4, 3, device=DEVICE), torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)


@pytest.mark.skipif(not LIBRARY, reason="leaves a GPU unusable")
@pytest.mark.parametrize(
    "call",
    [
        lambda: cuda.gather_tokens(X, IDS + 4),
        lambda: cuda.gather_tokens(X, IDS - 1),
        lambda: cuda.scatter_tokens(X, IDS + 5, 5, X[0, 0]),
        lambda: cuda.scatter_tokens(X, IDS - 1, 5, X[0, 0]),
        lambda: cuda.restore_tokens(X, IDS - 1, X[0, 0], None),
        lambda: cuda.restore_tokens_backward(X, IDS - 1, [2, 3, 3], True),
    ],
)
def test_ids_out_of_range_are_asserted(call):
    assert_aborts(call)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: cuda.masking_ids(torch.tensor(0.5), 1, 2, 1), "seed must be one int64, got Float"),
        (lambda: cuda.masking_ids(torch.tensor(5), 1, 2, 3), "keep must be from 0 to length, got 3 of 2"),
        (lambda: cuda.gather_tokens(X[0], IDS), r"ids must have shape \(B, K\).*got \[2, 4\] and \[4, 3\]"),
        (lambda: cuda.gather_tokens(X, IDS.float()), "ids must be int64 or int32, got Float"),
        (lambda: cuda.scatter_tokens(X[:, :2], IDS, 5, X[0, 0]), "as many columns as there are tokens"),
        (lambda: cuda.scatter_tokens(X, IDS, -1, X[0, 0]), "length must be from 0 to 2.30, got -1"),
        (lambda: cuda.scatter_tokens(X, IDS, 5, X[0]), r"fill must have one element.*got shape \[4, 3\]"),
        (lambda: cuda.scatter_tokens(X.long(), IDS, 5, X[0, 0]), "tokens must be of 16, 32 or 64 bits.*got Long"),
        (lambda: cuda.restore_tokens(X, IDS, X[0], None), "mask_token must have one element"),
        (lambda: cuda.restore_tokens(X, IDS, X[0, 0], X), r"pos_embed must have one row.*\[2, 4, 3\]"),
        (lambda: cuda.restore_tokens_backward(X, IDS, [2, -1, 3], True), "from 0 to 2.30 tokens, got -1"),
        (lambda: cuda.restore_tokens_backward(X, IDS, [2, 3], True), r"size_x_visible must be \[2, K, 3\], got"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
