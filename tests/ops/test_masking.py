"""Random masks, and moving tokens: permutations, gather, scatter, restore."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

import fastssl
from benchmarks.ops.measure import extra_memory
from fastssl import _native
from fastssl.functional import (
    gather_tokens,
    random_masking,
    random_masking_ids,
    restore_tokens,
    scatter_tokens,
)
from fastssl.reference import masking as reference
from tests.inputs import DTYPES, seeded, some_ids

pytestmark = pytest.mark.usefixtures("device")

chisquare = pytest.importorskip("scipy.stats").chisquare
SHAPES = ((3, 7, 5), (1, 1, 1), (2, 196, 16), (5, 33, 1), (70, 40, 24), (9, 6, 1030), (0, 4, 3), (2, 0, 3))  # B, L, D


def _layouts(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same numbers contiguous, transposed, and with gaps."""
    x = torch.randn(*shape, generator=seeded()).to(dtype)
    gaps = torch.full((shape[0], 2 * shape[1] + 1, shape[2] + 3), math.nan, dtype=dtype)
    gaps[:, 1::2, 1:-2] = x
    return [x, x.transpose(1, 2).contiguous().transpose(1, 2), gaps[:, 1::2, 1:-2]]


@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("batch, length", [(4, 1), (3, 2), (7, 64), (2, 65), (300, 196), (0, 5), (5, 0)])
def test_ids_are_permutations(batch, length, mask_ratio, backend):
    ids_keep, mask, ids_restore = random_masking_ids(batch, length, mask_ratio, generator=seeded())
    keep = int(length * (1 - mask_ratio))
    assert ids_keep.shape == (batch, keep) and mask.shape == ids_restore.shape == (batch, length)
    assert ids_keep.dtype == ids_restore.dtype == torch.int64 and mask.dtype == torch.float32
    assert torch.equal(ids_restore.sort(1).values, torch.arange(length).expand(batch, length))
    assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(keep).expand(batch, keep))
    assert torch.equal(mask, (ids_restore >= keep).float())


def test_a_seed_draws_the_same_masks_with_all_kernels():
    for seed, length in itertools.product(range(20), (2, 7, 196, 1025)):
        results = []
        for name in ("auto", "portable"):
            with fastssl.use_backend(name):
                results.append(random_masking_ids(9, length, 0.75, generator=seeded(seed)))
        assert all(map(torch.equal, *results))


def test_seeds_and_samples_and_calls_differ(backend):
    draws = [random_masking_ids(8, 196, 0.75, generator=seeded(seed))[0] for seed in range(5)]
    rows = torch.cat(draws)
    assert torch.unique(rows, dim=0).shape[0] == len(rows)
    torch.manual_seed(3)
    first, second = random_masking_ids(2, 50, 0.5), random_masking_ids(2, 50, 0.5)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    assert torch.equal(random_masking_ids(2, 50, 0.5)[0], first[0])


@pytest.mark.parametrize("length, ratio", [(4, 0.0), (5, 0.6), (6, 0.5)])
def test_every_order_is_as_likely(length, ratio):
    """Of what stays, in its order: chi-square over all length! / masked! outcomes, at a level of one in a million."""
    count = 200_000
    ids_keep = random_masking_ids(count, length, ratio, generator=seeded(11))[0]
    code = sum(ids_keep[:, k] * length**k for k in range(ids_keep.shape[1]))
    _, observed = torch.unique(code, return_counts=True)
    assert len(observed) == math.perm(length, ids_keep.shape[1])
    assert chisquare(observed.tolist()).pvalue > 1e-6


def test_every_token_is_masked_as_often_in_any_sample():
    mask = random_masking_ids(20_000, 49, 0.75, generator=seeded(12))[1]
    assert chisquare(mask.sum(0).tolist(), [mask.sum().item() / 49] * 49).pvalue > 1e-6
    neighbours = (mask[:, 1:] * mask[:, :-1]).mean().item()
    assert neighbours == pytest.approx(37 / 49 * 36 / 48, abs=3e-3)
    samples = (mask[1:] * mask[:-1]).mean().item()
    assert samples == pytest.approx((37 / 49) ** 2, abs=3e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.sanitized
def test_gather_and_scatter(shape, dtype, kernels):
    batch, length, dim = shape
    count = 0 if length == 0 else length + 2
    for x, kind in itertools.product(_layouts(shape, dtype), (torch.int64, torch.int32)):
        ids = some_ids(batch, count, max(length, 1), kind)
        gathered = gather_tokens(x, ids)
        assert torch.equal(gathered, x.gather(1, ids.long()[:, :, None].expand(-1, -1, dim)))
        assert gathered.dtype == dtype and gathered.is_contiguous()
    for tokens in _layouts((batch, count, dim), dtype):
        fill = torch.randn(dim, generator=seeded(2))
        expected = torch.zeros(shape, dtype=torch.float64)
        expected.scatter_add_(1, ids.long()[:, :, None].expand(-1, -1, dim), tokens.double())
        taken = torch.zeros(batch, length, dtype=torch.bool).scatter_(1, ids.long(), True)
        expected = expected.where(taken[:, :, None], fill.to(dtype).double())
        result = scatter_tokens(tokens, ids, length, fill)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(scatter_tokens(tokens, ids, length)[~taken], tokens.new_zeros((~taken).sum(), dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.sanitized
def test_restore_undoes_masking(shape, dtype, positions, kernels):
    batch, length, dim = shape
    for x in _layouts(shape, dtype):
        leaves = x.detach().requires_grad_(), torch.randn(1, 1, dim), torch.randn(1, length, dim)
        leaves = tuple(t.requires_grad_() for t in leaves)
        image, mask_token, pos_embed = leaves
        visible, mask, ids_restore = random_masking(image, 0.6, generator=seeded())
        result = restore_tokens(visible, ids_restore.int(), mask_token, pos_embed if positions else None)
        expected = torch.where(mask[:, :, None] > 0, mask_token.to(dtype), image)
        if positions:
            expected = expected + pos_embed.to(dtype)
        assert torch.equal(result, expected) and result.is_contiguous()
        used = leaves[: 3 if positions else 2]
        cotangent = torch.randn(shape, generator=seeded(3)).to(dtype)
        gradients = torch.autograd.grad(result, used, cotangent)
        assert torch.equal(gradients[0], cotangent * (mask == 0)[:, :, None])  # each token's own, masked ones' 0
        exact = cotangent.double() * (mask > 0)[:, :, None], cotangent.double()
        for gradient, terms, leaf in zip(gradients[1:], exact, used[1:], strict=False):
            summed = terms.sum(0) if leaf is pos_embed else terms.sum((0, 1))
            assert gradient.dtype == leaf.dtype
            torch.testing.assert_close(gradient.double().flatten(), summed.flatten(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_gradients_are_as_accurate_as_eager(dtype, kernels):
    """Sums over all samples and masked places, not only their last digits apart from each other."""
    batch, length, dim = 300, 60, 40
    ids_restore = random_masking_ids(batch, length, 0.75, generator=seeded())[2]
    inputs = [torch.randn(*shape, generator=seeded(5)) for shape in ((batch, 15, dim), (dim,), (length, dim))]
    cotangent = torch.randn(batch, length, dim, generator=seeded(6)).to(dtype)

    def gradients(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, mask_token, pos_embed = (t.to(dtype).requires_grad_() for t in inputs)
        out = function(x, ids_restore, mask_token, pos_embed)
        return torch.autograd.grad(out, (x, mask_token, pos_embed), cotangent.to(dtype))

    truth, eager = gradients(reference.restore_tokens, torch.float64), gradients(reference.restore_tokens, dtype)
    for threads in (1, 2):  # each of which has sums of its own
        torch.set_num_threads(threads)
        for exact, x, y in zip(truth, eager, gradients(restore_tokens, dtype), strict=True):
            assert (y.double() - exact).norm() <= 2 * (x.double() - exact).norm()


def _expanded(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradients as reductions send them: of everything, of each sample, of each token, of each feature."""
    g = torch.randn(*shape, generator=seeded(4)).to(dtype)
    return [part.expand(shape) for part in (g[:1, :1, :1], g[:, :1, :1], g[:, :, :1], g[:1, :1], g[:1])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_gradients(dtype, kernels):
    batch, length, keep, dim = 6, 9, 4, 37
    ids_keep, _, ids_restore = random_masking_ids(batch, length, 0.55, generator=seeded())
    x, visible, mask_token, pos_embed = (
        torch.randn(*shape, generator=seeded(5)).to(dtype).requires_grad_()
        for shape in ((batch, length, dim), (batch, keep, dim), (dim,), (length, dim))
    )
    for out, leaves in (
        (restore_tokens(visible, ids_restore, mask_token, pos_embed), (visible, mask_token, pos_embed)),
        (gather_tokens(x, ids_keep), (x,)),
        (gather_tokens(x, some_ids(batch, 7, length)), (x,)),
        (scatter_tokens(visible, some_ids(batch, keep, length), length), (visible,)),
    ):
        for cotangent in _expanded(out.shape, dtype):
            gradients = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
            dense = torch.autograd.grad(out, leaves, cotangent.contiguous(), retain_graph=True)
            torch.testing.assert_close(gradients, dense, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.skipif(_native.status()["_C"] is not None, reason="the portable code may copy")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's figures")
def test_expanded_gradients_are_not_copied():
    batch, length, dim = 16, 1024, 4096  # 256 MiB
    visible, mask_token = torch.zeros(batch, 1, dim, requires_grad=True), torch.zeros(dim, requires_grad=True)
    ids = torch.arange(length).expand(batch, length)
    out = restore_tokens(visible, ids, mask_token)
    cotangent = torch.ones(()).expand(batch, length, dim)
    extra = extra_memory(lambda: torch.autograd.grad(out, (visible, mask_token), cotangent))
    assert extra < 2**26


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fill_of_any_dtype_gets_its_gradient_unrounded(dtype, backend):
    tokens, fill = torch.randn(300, 2, 3, generator=seeded()).to(dtype), torch.zeros(3, requires_grad=True)
    cotangent = torch.randn(300, 4, 3, generator=seeded(1)).to(dtype)
    ids = some_ids(300, 2, 4)
    (gradient,) = torch.autograd.grad(scatter_tokens(tokens, ids, 4, fill), fill, cotangent)
    empty = torch.ones(300, 4).scatter_(1, ids, 0.0)[:, :, None]
    torch.testing.assert_close(gradient.double(), (cotangent.double() * empty).sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask_ratio", [0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_steps_of_mae(dtype, mask_ratio, kernels):
    """Noise sorted, what is smallest kept; mask tokens appended behind all but the class token, all sorted back,
    positions added: the same values, and gradients of everything that learns (arXiv:2111.06377)."""
    batch, length, dim = 12, 20, 24
    shapes = (batch, length, dim), (1, 1, dim), (1, 1, dim), (1, length + 1, dim)
    x, class_token, mask_token, pos_embed = leaves = [
        torch.randn(*shape, generator=seeded(i)).to(dtype).requires_grad_() for i, shape in enumerate(shapes)
    ]
    visible, mask, ids_restore = random_masking(x, mask_ratio, generator=seeded())
    restored = restore_tokens(visible, ids_restore, mask_token, pos_embed[:, 1:])
    ours = torch.cat([class_token.expand(batch, 1, dim) + pos_embed[:, :1], restored], 1)

    noise, keep = ids_restore.float(), int(length * (1 - mask_ratio))  # ranks, which stand for what was drawn
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    kept = x.gather(1, shuffle[:, :keep, None].repeat(1, 1, dim))
    hidden = torch.ones(batch, length)
    hidden[:, :keep] = 0
    assert torch.equal(visible, kept) and torch.equal(mask, hidden.gather(1, restore))
    encoded = torch.cat([class_token.expand(batch, -1, -1), kept], 1)
    missing = mask_token.repeat(batch, length + 1 - encoded.shape[1], 1)
    tokens = torch.cat([encoded[:, 1:], missing], 1).gather(1, restore[:, :, None].repeat(1, 1, dim))
    theirs = torch.cat([encoded[:, :1], tokens], 1) + pos_embed
    assert torch.equal(ours, theirs)

    cotangent = torch.randn(ours.shape, generator=seeded(9)).to(dtype)
    gradients = [torch.autograd.grad(out, leaves, cotangent, allow_unused=True) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_ids_and_features_with_gaps(backend):
    tokens, row = torch.randn(2, 3, 4), torch.randn(4, 2)[:, 0]
    ids = torch.tensor([[3, 1], [0, 2], [2, 0]]).T
    expected = restore_tokens(tokens, ids.contiguous(), row.contiguous())
    assert torch.equal(restore_tokens(tokens, ids, row), expected)
    expected = scatter_tokens(tokens, ids.contiguous(), 5, row.contiguous())
    assert torch.equal(scatter_tokens(tokens, ids, 5, row), expected)


@pytest.mark.sanitized
def test_a_token_that_is_restored_twice_or_nowhere(backend):
    visible = torch.randn(2, 3, 4, requires_grad=True)
    ids = torch.tensor([[0, 0, 2, 9], [1, 1, 1, 5]])
    out = restore_tokens(visible, ids, torch.zeros(4))
    assert torch.equal(out[0, 0], visible[0, 0]) and torch.equal(out[0, 1], visible[0, 0])
    (gradient,) = torch.autograd.grad(out.sum(), visible)
    assert gradient[:, :, 0].tolist() == [[2, 0, 1], [0, 3, 0]]


def test_derivatives_are_numerically_right(backend):
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=seeded(4), requires_grad=True)

    ids, restore = some_ids(2, 5, 3), torch.tensor([[3, 0, 2, 1], [1, 2, 3, 0]])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: gather_tokens(x, ids), (double(2, 3, 2),))
        assert check(lambda t, fill: scatter_tokens(t, ids, 4, fill), (double(2, 5, 2), double(2)))
        assert check(lambda x, m, p: restore_tokens(x, restore, m, p), (double(2, 2, 3), double(3), double(4, 3)))
        assert check(lambda x, m: restore_tokens(x, restore, m), (double(2, 2, 3), double(3)))


@pytest.mark.parametrize("suffix", ["", "_portable"])
def test_opcheck(suffix):
    ops, leaf = torch.ops.fastssl, torch.randn(2, 5, 4, requires_grad=True)
    ids, feature = some_ids(2, 3, 5), torch.randn(4, requires_grad=True)
    restore = torch.tensor([[3, 0, 2, 1], [1, 2, 3, 0]])
    for name, args in {
        "masking_ids": (torch.tensor(5), 3, 7, 2),
        "block_masking_ids": (torch.tensor(5), 3, 7, 4, 12, 3, 28, [30_000, 1 << 16]),
        "gather_tokens": (leaf, ids),
        "scatter_tokens": (leaf[:, :3], ids, 6, feature),
        "restore_tokens": (leaf[:, :2], restore, feature, leaf[0, :4]),
        "restore_tokens_backward": (leaf[:, :4], restore, [2, 2, 4], True),
    }.items():
        torch.library.opcheck(getattr(ops, name + suffix).default, args)


def test_compiles(backend):
    def step(x: Tensor, mask_token: Tensor, pos_embed: Tensor) -> Tensor:
        visible, mask, ids_restore = random_masking(x, 0.75)
        return (restore_tokens(visible, ids_restore, mask_token, pos_embed) - x).square().mean(2) * mask

    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((3, 16, 8), (1, 1, 8), (1, 16, 8))]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*results)


def test_backends_agree():
    visible, feature, pos_embed = torch.randn(2, 3, 4), torch.randn(4), torch.randn(5, 4)
    ids, restore = some_ids(2, 3, 6), torch.tensor([[3, 0, 2, 1, 4], [1, 2, 3, 0, 4]])
    results = []
    for name in ("auto", "portable", "reference"):
        with fastssl.use_backend(name):
            results.append(
                (
                    gather_tokens(visible, ids % 3),
                    scatter_tokens(visible, ids, 6, feature),
                    restore_tokens(visible, restore, feature, pos_embed),
                    restore_tokens(visible, restore, feature),
                )
            )
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_threads_change_nothing(kernels):
    x, mask_token, pos_embed = torch.randn(200, 64, 32), torch.randn(32), torch.randn(64, 32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        visible, mask, ids_restore = random_masking(x, 0.5, generator=seeded())
        results.append((visible, mask, ids_restore, restore_tokens(visible, ids_restore, mask_token, pos_embed)))
    assert all(map(torch.equal, *results))


X, IDS = torch.randn(2, 4, 3), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: gather_tokens(X[0], IDS), ValueError, r"x must have shape \(B, L, D\), got \(4, 3\)"),
        (lambda: gather_tokens(X, IDS[:1]), ValueError, r"ids must have shape \(2, K\).*got \(1, 3\)"),
        (lambda: gather_tokens(X, IDS.float()), ValueError, "ids must have dtype .*float32"),
        (lambda: gather_tokens(X, IDS.tolist()), TypeError, "ids must be a Tensor, got list"),
        (lambda: gather_tokens(X.long(), IDS), ValueError, "x must have a floating-point dtype.*int64"),
        (lambda: gather_tokens(X, IDS + 4), IndexError, "ids must be from 0 to below 4, got 4"),
        (lambda: gather_tokens(X, IDS - 1), IndexError, "ids must be from 0 to below 4, got -1"),
        (lambda: gather_tokens(X, IDS.to("meta")), ValueError, "same device.*meta and cpu"),
        (lambda: scatter_tokens(X, IDS, 5), ValueError, r"ids must have shape \(2, 4\).*got \(2, 3\)"),
        (lambda: scatter_tokens(X[:, :3], IDS + 5, 5), IndexError, "ids must be from 0 to below 5, got 5"),
        (lambda: scatter_tokens(X[:, :3], IDS, 5.0), TypeError, "length must be an integer, got float"),
        (lambda: scatter_tokens(X[:, :3], IDS, -1), ValueError, "length must not be negative, got -1"),
        (lambda: scatter_tokens(X[:, :3], IDS, 5, "0"), TypeError, "fill must be a Tensor or a number, got str"),
        (lambda: scatter_tokens(X[:, :3], IDS, 5, X[0]), ValueError, r"fill must have 3 elements.*got shape \(4, 3\)"),
        (lambda: restore_tokens(X, IDS - 1, X[0, 0]), IndexError, "ids_restore must not be negative, got -1"),
        (lambda: restore_tokens(X, IDS, 0.0), TypeError, "mask_token must be a Tensor, got float"),
        (lambda: restore_tokens(X, IDS, X[0]), ValueError, "mask_token must have 3 elements"),
        (lambda: restore_tokens(X, IDS, X[0, 0], X), ValueError, r"pos_embed must have 3 x 3 elements.*\(2, 4, 3\)"),
        (lambda: restore_tokens(X, IDS, X[0, 0], X.to("meta")), ValueError, "pos_embed and x_visible .*device.*meta"),
        (lambda: restore_tokens(X, IDS, X[0, 0], 1.0), TypeError, "pos_embed must be a Tensor, got float"),
        (lambda: random_masking_ids(2, 2**62, 0.5), ValueError, "must be below 2.62"),
        (lambda: random_masking(X, 1.5), ValueError, "mask_ratio must be from 0 to 1, got 1.5"),
        (lambda: random_masking(X, -1e-9), ValueError, "mask_ratio must be from 0 to 1, got -1e-09"),
        (lambda: random_masking(X, math.nan), ValueError, "mask_ratio must be from 0 to 1, got nan"),
        (lambda: random_masking(X, torch.tensor(0.5)), TypeError, "mask_ratio must be a number, got Tensor"),
        (lambda: random_masking(X, "a"), TypeError, "mask_ratio must be a number, got str"),
        (lambda: random_masking_ids(2, -1, 0.5), ValueError, "length must not be negative, got -1"),
        (lambda: random_masking_ids(2.0, 1, 0.5), TypeError, "batch must be an integer, got float"),
    ],
)
def test_bad_input(call, error, match, backend):
    with pytest.raises(error, match=match):
        call()


SEED = torch.tensor(5)


@pytest.mark.parametrize(
    "name, args, match",
    [
        ("masking_ids", (SEED, 2, 4, 5), "keep must be from 0 to length, got 5 of 4"),
        ("masking_ids", (SEED.int(), 2, 4, 1), "seed must be one int64, got Int"),
        ("masking_ids", (SEED.repeat(2), 2, 4, 1), "seed must be one int64"),
        ("block_masking_ids", (SEED, 2, 4, 4, 17, 1, 16, [1 << 16]), "keep must be from 0 to length, got 17 of 16"),
        ("block_masking_ids", (SEED, 2, 4, 4, 8, 0, 16, [1 << 16]), "low must be from 1 to high, got 0 and 16"),
        ("block_masking_ids", (SEED, 2, 4, 4, 8, 4, 3, [1 << 16]), "low must be from 1 to high, got 4 and 3"),
        ("block_masking_ids", (SEED, 2, 4, 4, 8, 1, 16, [0]), "aspect_ratios must be positive"),
        ("block_masking_ids", (SEED, 2, 4, 4, 8, 1, 16, []), "aspect_ratios must be positive"),
        ("gather_tokens", (X, IDS.short()), "ids must be int64 or int32, got Short"),
        ("gather_tokens", (X, IDS[:1]), r"ids must have shape \(B, K\)"),
        ("scatter_tokens", (X, IDS, 4, X[0, 0]), "as many columns as there are tokens"),
        ("scatter_tokens", (X[:, :3], IDS, 4, X[0, 0, :2]), "fill must have one element for each feature"),
        ("scatter_tokens", (X[:, :3], IDS, -1, X[0, 0]), "length must not be negative, got -1"),
        ("restore_tokens", (X, IDS, X[0, 0, :2], None), "mask_token must have one element for each feature"),
        ("restore_tokens", (X, IDS, X[0, 0], X[0, :2]), "pos_embed must have one row for each place"),
    ],
)
@pytest.mark.skipif(fastssl._native.status()["_C"] is not None, reason="the checks of the C++ library")
@pytest.mark.sanitized
def test_kernels_refuse_what_does_not_fit(name, args, match):
    with pytest.raises(ValueError, match=match):
        getattr(torch.ops.fastssl, name)(*args)


def test_a_gradient_of_another_length_is_refused():
    grad, ids = torch.ones(1, 2, 3), torch.zeros(1, 100, dtype=torch.int64)
    for name in ("restore_tokens_backward", "restore_tokens_backward_portable"):
        with pytest.raises((ValueError, RuntimeError)):
            getattr(torch.ops.fastssl, name)(grad, ids, [1, 1, 3], True)
