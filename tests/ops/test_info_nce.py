"""What holds for InfoNCE in particular."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastssl
from fastssl.functional import info_nce
from tests.inputs import normal, seeded

CONSTANT_KEYS = {
    "in batch": {},
    "smoothed": {"label_smoothing": 0.1},
    "queue": {"negative_keys": (20, 8)},
    "queue and batch": {"negative_keys": (20, 8), "in_batch_negatives": True},
    "paired": {"negative_keys": (9, 3, 8), "negative_mode": "paired"},
    "ids": {"negative_keys": (20, 8), "negative_ids": torch.arange(-2, 43).view(9, 5).clamp_max(19)},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("options", CONSTANT_KEYS.values(), ids=CONSTANT_KEYS)
def test_constant_keys_may_move_on_before_the_backward_pass(options, normalize, backend):
    q, keys = normal(9, 8).requires_grad_(), [normal(9, 8, seed=1)]
    if shape := options.get("negative_keys"):
        keys.append(normal(9, 24, seed=2).view(shape) if len(shape) == 3 else normal(*shape, seed=2))
    options = {name: value for name, value in options.items() if name != "negative_keys"}

    def loss() -> torch.Tensor:
        return info_nce(q, *keys, normalize=normalize, **options)

    (expected,) = torch.autograd.grad(loss(), q)
    output = loss()
    for x in keys:
        x.fill_(7)
    torch.testing.assert_close(torch.autograd.grad(output, q)[0], expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_keys_that_the_backward_pass_reads_may_not(symmetric, kernels):
    q, k = normal(9, 8).requires_grad_(), normal(9, 8, seed=1).requires_grad_()
    for key in (k, k.detach().clone()) if symmetric else (k,):
        output = info_nce(q, key, normalize=False, symmetric=symmetric)
        with torch.no_grad():
            key.fill_(7)
        with pytest.raises(RuntimeError, match="modified"):
            output.backward()


def test_a_second_derivative_wants_the_keys(kernels):
    q, k = normal(9, 8).requires_grad_(), normal(9, 8, seed=1)
    output = info_nce(q, k)
    k.fill_(7)
    with pytest.raises(RuntimeError, match="positive_key was modified in place.*second derivative"):
        torch.autograd.grad(output, q, create_graph=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count, dim", [(1, 1), (3, 33), (5, 64), (64, 31), (70, 256)])
def test_named_keys_are_the_gathered_ones(count, dim, normalize, kernels):
    """Ids drawn with repetition, few of the keys more often than others, some rows' all of one key."""
    shapes = (21, dim), (21, dim), (90, dim)
    exact = [normal(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    ids = (torch.rand(21, count, generator=seeded(5)).square() * 80).long()
    ids[3], ids[4:, 0], ids[5] = 7, 7, torch.arange(count)
    options = {"temperature": 0.3, "normalize": normalize, "reduction": "none"}
    with fastssl.use_backend("reference"):
        paired = info_nce(*exact[:2], exact[2][ids], negative_mode="paired", **options)
    expected = paired, *torch.autograd.grad(paired.sum(), exact)
    leaves = [x.detach().float().requires_grad_() for x in exact]
    loss = info_nce(*leaves, negative_ids=ids, **options)
    for found, right in zip((loss, *torch.autograd.grad(loss.sum(), leaves)), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=2e-5, atol=2e-6 + 2e-5 * right.abs().max().item())


def test_ids_below_zero_are_no_keys(backend):
    """What they would name changes nothing; a query without keys has loss 0."""
    q, k, keys = (normal(rows, 24, seed=rows).requires_grad_() for rows in (6, 7, 9))
    k, ids = k[:6], torch.tensor([[1, 2, -1], [-1, -1, -1], [-7, 8, 3], [3, 3, 3], [7, -1, 5], [-1, -2, 4]])
    keys.data[[0, 6]] = float("nan")
    loss = info_nce(q, k, keys, negative_ids=ids, reduction="none")
    for i, row in enumerate(ids):
        own = row[row >= 0][None]
        alone = info_nce(q[i : i + 1], k[i : i + 1], keys, negative_ids=own, reduction="none")
        torch.testing.assert_close(loss[i : i + 1], alone)
    assert loss[1] == 0
    if fastssl.ops.current_backend() != "reference":  # which normalises all keys, and so has NaN times 0
        of_queries, gradient = torch.autograd.grad(loss.sum(), (q, keys))
        assert of_queries.isfinite().all()
        assert ((gradient != 0).any(1) == torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1]).bool()).all()
        assert gradient[[1, 2, 3, 4, 5, 7, 8]].isfinite().all()


@pytest.mark.parametrize(
    "options, key",
    [({"temperature": -0.004}, 1.0), ({}, 0.0), ({}, 1e-14), ({"normalize": False}, float("-inf"))],
    ids=str,
)
def test_extreme_keys_by_id(options, key, backend):
    """Exponents of hundreds, of either sign; a key of little or no length; and one that cannot be, alone or not. There
    are as many keys as ids, but no query has keys of its own."""
    q, k, keys = normal(3, 8).abs(), normal(3, 8, seed=1).abs(), normal(6, 8, seed=2)
    keys[4], ids = key, torch.tensor([[4, 4], [4, 0], [1, 2]])
    leaves = [z.requires_grad_() for z in (q, k, keys)]
    loss = info_nce(*leaves, negative_ids=ids, reduction="none", **options)
    wide = [z.detach().double().requires_grad_() for z in leaves]
    with fastssl.use_backend("reference"):
        expected = info_nce(*wide, negative_ids=ids, reduction="none", **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    if key > float("-inf"):
        for found, right in zip(*map(torch.autograd.grad, (loss.sum(), expected.sum()), (leaves, wide)), strict=True):
            torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


@pytest.mark.parametrize("ids", [[[0, 9]], [[9, -1]], [[10**12, 0]]])
def test_ids_out_of_range(ids, backend):
    ids = torch.tensor(ids).expand(4, 2)
    with pytest.raises(IndexError, match=f"negative_ids must be below 9, got {ids.max()}"):
        info_nce(normal(4, 8), normal(4, 8), normal(9, 8), negative_ids=ids)


def test_gathered_keys_are_never_stored(kernels):
    """No tensor has more than some of B x K x D = 2,000 x 60 x 64 elements."""
    q, k, keys = (normal(rows, 64, seed=rows).requires_grad_() for rows in (2000, 2001, 500))
    ids = torch.randint(500, (2000, 60), generator=seeded(1))
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(results) if isinstance(x, Tensor))
            return results

    with Sizes():
        info_nce(q, k[:2000], keys, negative_ids=ids).backward()
    assert 2000 * 64 <= max(sizes) <= 2001 * 64


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"normalize": False}])
def test_a_single_pair_has_nothing_to_smooth(options, backend):
    for seed in range(8):
        q, k = (normal(1, 24, seed=2 * seed + i).requires_grad_() for i in range(2))
        loss = info_nce(q, k, label_smoothing=0.3, temperature=0.01, **options)
        for zero in (loss, *torch.autograd.grad(loss, (q, k))):
            torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=0)


def test_positives_far_above_all_negatives():
    x, y = (torch.eye(32).mul(20).requires_grad_() for _ in range(2))
    loss = info_nce(x, y, temperature=0.5, normalize=False)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (x, y)))
