"""Patches: what the losses read, every pair of dtypes, the embedding of visible patches, gather and scatter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import masked_feature_loss, masked_patch_loss, patch_embed
from fastssl.nn import PatchEmbed
from fastssl.ops import patches
from fastssl.reference import patches as reference
from tests.accuracy import with_tensors
from tests.inputs import DTYPES, normal, seeded, some_ids

SIZES = (  # of images, and of their patches
    ((2, 3, 8, 12), (4, 4)),
    ((3, 1, 3, 17), (3, 17)),
    ((2, 5, 6, 129), (2, 43)),
    ((70, 2, 4, 6), (2, 1)),
    ((0, 3, 4, 4), (2, 2)),
    ((2, 3, 4, 6, 8), (2, 3, 4)),
)


def _layouts(x: Tensor) -> list[Tensor]:
    """The same images contiguous, with channels last, turned, with gaps of NaN, and one element off alignment."""
    gaps = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)[..., 1:-2:2]
    shifted = x.new_full((x.numel() + 1,), math.nan)[1:].view(x.shape)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return [x, last, x.transpose(-1, -2).contiguous().transpose(-1, -2), gaps.copy_(x), shifted.copy_(x)]


def _length(size: tuple[int, ...], patch: tuple[int, ...]) -> int:
    return math.prod(n // p for n, p in zip(size[2:], patch, strict=True))


def _of_patch(patch: tuple[int, ...]) -> dict[str, object]:
    """The arguments of functions for a patch's sizes."""
    return {"patch_size": patch[-2:], "tubelet_size": patch[0] if len(patch) == 3 else None}


def _relative(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("norm", [True, False, "per_channel"])
@pytest.mark.parametrize("size, patch", [pair for pair in SIZES if math.prod(pair[1]) > 2], ids=str)
@pytest.mark.sanitized
def test_patch_loss_of_images_in_any_layout(size, patch, norm, kernels):
    length = _length(size, patch)
    pred = normal(size[0], length, size[1] * math.prod(patch), seed=1).requires_grad_()
    mask = torch.rand(size[0], length, generator=seeded(2)) < 0.6
    arguments = {**_of_patch(patch), "norm_pix_loss": norm, "reduction": "none"}
    images = normal(*size)
    exact = pred.detach().double().requires_grad_()
    truth = reference.masked_patch_loss(exact, images.double(), mask, **arguments)
    cotangent = normal(*mask.shape, seed=3)
    (gradient,) = torch.autograd.grad(truth, exact, cotangent.double())
    for layout in _layouts(images):
        loss = masked_patch_loss(pred, layout, mask, **arguments)
        (found,) = torch.autograd.grad(loss, pred, cotangent)
        assert loss.dtype == found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, other", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_dtypes_may_differ(dtype, other, kernels):
    """Every input is exact in its dtype, sums are float32: so accurate is the loss, and the gradient in its dtype."""
    mask = torch.rand(3, 6, generator=seeded(2)) < 0.6
    pred = normal(3, 6, 48, dtype=dtype, seed=1).requires_grad_()
    exact = pred.detach().double().requires_grad_()
    images, features = normal(3, 3, 8, 12, dtype=other), normal(3, 6, 48, dtype=other)
    for function, target, arguments in (
        (masked_patch_loss, images, {"patch_size": 4}),
        (masked_feature_loss, features, {"loss": "smooth_l1", "beta": 0.7}),
        (masked_feature_loss, features, {"loss": "cosine"}),
        (masked_feature_loss, features, {"loss": "mse"}),
    ):
        loss = function(pred, target, mask, **arguments, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pred)
        truth = getattr(reference, function.__name__)(exact, target.double(), mask, **arguments, reduction="sum")
        (true_gradient,) = torch.autograd.grad(truth, exact)
        assert loss.dtype == torch.promote_types(dtype, other) and gradient.dtype == dtype
        assert _relative(loss, truth) <= max(torch.finfo(loss.dtype).eps, 1e-6)
        assert _relative(gradient, true_gradient) <= max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("loss", ["patch", "smooth_l1", "cosine", "mse"])
@pytest.mark.sanitized
def test_predictions_and_masks_in_any_layout(loss, kernels):
    mask = (torch.rand(12, 4, generator=seeded(2)) < 0.6).T
    images, pred, cotangent = normal(4, 3, 12, 16), normal(4, 13, 50, seed=1)[:, 1:, 1:49], normal(12, 4, seed=3).T
    results = []
    for x, m, grad in (
        (pred, mask.contiguous(), cotangent.contiguous()),
        *((x, mask, cotangent) for x in (pred.contiguous(), *_layouts(pred))),
    ):
        leaf = x.detach().requires_grad_()
        if loss == "patch":
            values = masked_patch_loss(leaf, images, m, 4, reduction="none")
        else:
            values = masked_feature_loss(leaf, pred.flip(0), m, loss=loss, reduction="none")
        results.append((values.detach(), *torch.autograd.grad(values, leaf, grad)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_expanded_gradients_of_patches(dtype, kernels):
    images, ids = (
        normal(4, 3, 12, 16).to(dtype).requires_grad_(),
        torch.tensor([[1, 5, 5], [0, 1, 2], [9, 3, 9], [2, 2, 2]]),
    )
    out = patches.gather_patches(images, ids, (4, 4))
    for part in (normal(1, 1, 1), normal(4, 1, 1), normal(4, 3, 1), normal(1, 1, 48)):
        cotangent = part.to(dtype).expand(out.shape)
        gradients = (
            torch.autograd.grad(out, images, g, retain_graph=True)[0] for g in (cotangent, cotangent.contiguous())
        )
        assert torch.equal(*gradients)


@pytest.mark.parametrize("loss", ["patch", "smooth_l1", "cosine", "mse"])
def test_what_is_not_masked_is_not_used(loss, kernels):
    """NaN there changes nothing, and gets the gradient 0; NaN where masked comes through, in its patch."""
    mask = torch.rand(4, 12, generator=seeded(2)) < 0.6
    mask[1], mask[2, :4] = False, False  # a sample, and a row of patches
    images, pred = normal(4, 3, 12, 16), normal(4, 12, 48, seed=1)
    by_patches = patches._by_patches(images, (4, 4))  # a view

    def evaluate() -> tuple[Tensor, Tensor]:
        leaf = pred.clone().requires_grad_()
        if loss == "patch":
            values = masked_patch_loss(leaf, images, mask, 4, reduction="none")
        else:
            values = masked_feature_loss(leaf, by_patches.reshape(4, 12, 48), mask, loss=loss, reduction="none")
        return values.detach(), *torch.autograd.grad(values.sum(), leaf)

    value, gradient = evaluate()
    assert (value[~mask] == 0).all() and (gradient[~mask] == 0).all() and (value[mask] != 0).all()
    pred[~mask] = math.nan
    by_patches[~mask.view(4, 3, 4)] = math.nan
    for result, expected in zip(evaluate(), (value, gradient), strict=True):
        assert torch.equal(result, expected)
    place = mask.nonzero()[3]
    for x in (pred[place[0], place[1]], by_patches[place[0], place[1] // 4, place[1] % 4]):
        before = x.clone()
        x[..., -1] = math.nan
        poisoned, poisoned_gradient = evaluate()
        x.copy_(before)
        assert poisoned[tuple(place)].isnan() and poisoned.isnan().sum() == 1
        assert (poisoned_gradient.isnan().any(2) == poisoned.isnan()).all()


def test_reductions(backend):
    pred, images, mask = normal(2, 6, 48), normal(2, 3, 8, 12), torch.rand(2, 6) < 0.5
    mask[0, 0] = True
    for function, arguments in (
        (masked_patch_loss, (pred, images, mask, 4)),
        (masked_feature_loss, (pred, pred, mask)),
    ):
        each = function(*arguments, reduction="none")
        torch.testing.assert_close(function(*arguments, reduction="sum"), each.sum())
        torch.testing.assert_close(function(*arguments), each.sum() / mask.sum())
        arguments = (*arguments[:2], torch.zeros_like(mask), *arguments[3:])
        assert function(*arguments).isnan() and function(*arguments, reduction="sum") == 0


@pytest.mark.parametrize("elements", [1, 15, 16, 17, 63, 64, 65, 1023])
@pytest.mark.sanitized
def test_rows_of_any_length(elements, kernels):
    """About a vector's and a run of vectors' length."""
    pred, target, mask = normal(2, 3, elements), normal(2, 3, elements, seed=1), torch.ones(2, 3)
    leaf, exact = pred.requires_grad_(), pred.detach().double().requires_grad_()
    for loss in ("smooth_l1", "cosine", "mse"):
        values = masked_feature_loss(leaf, target, mask, loss=loss, reduction="none")
        truth = reference.masked_feature_loss(exact, target.double(), mask, loss=loss, reduction="none")
        torch.testing.assert_close(values.double(), truth, rtol=1e-5, atol=1e-6)
        cotangent = torch.arange(-2.0, 4.0).view(2, 3)
        (gradient,), (true_gradient,) = (
            torch.autograd.grad(v, x, cotangent.to(v.dtype)) for v, x in ((values, leaf), (truth, exact))
        )
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-6)


def test_an_image_with_an_offset(kernels):
    """The variance is not the difference of two large numbers."""
    images, pred, mask = normal(2, 3, 32, 32) + 1000, normal(2, 4, 768), torch.ones(2, 4)
    for norm in (True, "per_channel"):
        truth, eager = (
            reference.masked_patch_loss(pred.to(dtype), images.to(dtype), mask, 16, norm_pix_loss=norm)
            for dtype in (torch.float64, torch.float32)
        )
        error = (masked_patch_loss(pred, images, mask, 16, norm_pix_loss=norm) - truth).abs()
        assert error <= 2 * (eager - truth).abs() + 1e-5


def test_images_without_a_graph_may_require_grad():
    pred, images, mask = normal(2, 6, 48), normal(2, 3, 8, 12).requires_grad_(), torch.ones(2, 6)
    with torch.no_grad():
        assert masked_patch_loss(pred, images, mask, 4) == masked_patch_loss(pred, images.detach(), mask, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, patch", SIZES, ids=str)
@pytest.mark.sanitized
def test_gather_and_scatter(size, patch, dtype, backend):
    length = _length(size, patch)
    for images, kind in itertools.product(_layouts(normal(*size, dtype=dtype)), (torch.int64, torch.int32)):
        ids = some_ids(size[0], length + 2, length, kind)
        gathered = patches.gather_patches(images, ids, patch)
        assert torch.equal(gathered, reference.gather_patches(images, ids, patch)) and gathered.is_contiguous()
    cotangent = normal(*gathered.shape, dtype=dtype, seed=3)
    leaf = normal(*size).double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.gather_patches(leaf, ids, patch), leaf, cotangent.double())
    for grad in (cotangent, cotangent.transpose(0, 2).contiguous().transpose(0, 2)):
        scattered = patches.scatter_patches(grad, ids, size, patch)
        assert scattered.dtype == dtype and scattered.shape == size
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(scattered.double(), truth, rtol=eps, atol=4e-7)  # each sum rounded once
        assert (scattered[truth == 0] == 0).all()


def test_no_patches_are_gathered(backend):
    images, ids = normal(2, 3, 4, 4), torch.empty(2, 0, dtype=torch.int64)
    assert patches.gather_patches(images, ids, [2, 2]).shape == (2, 0, 12)
    assert (patches.scatter_patches(normal(2, 0, 12), ids, [2, 3, 4, 4], [2, 2]) == 0).all()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("size, patch", SIZES, ids=str)
def test_patch_embed(size, patch, keep, backend):
    """A convolution, then a gather, with all gradients."""
    leaves = normal(*size), normal(7, size[1], *patch, seed=1), normal(7, seed=2)
    ids = some_ids(size[0], 3, _length(size, patch)) if keep else None

    def evaluate(function, dtype, bias=True):
        images, weight, b = (x.to(dtype).requires_grad_() for x in leaves)
        inputs = (images, weight, b) if bias else (images, weight)
        tokens = function(images, weight, b if bias else None, ids)
        return tokens, *torch.autograd.grad(tokens, inputs, normal(*tokens.shape, dtype=dtype, seed=3))

    for bias in (True, False):
        results, truth = (
            evaluate(patch_embed, torch.float32, bias),
            evaluate(reference.patch_embed, torch.float64, bias),
        )
        for result, true in zip(results, truth, strict=True):
            torch.testing.assert_close(result.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patch_embed_is_as_accurate_as_eager(dtype, backend):
    images, weight, ids = (
        normal(4, 3, 32, 32, dtype=dtype),
        normal(64, 3, 16, 16, dtype=dtype, seed=1),
        some_ids(4, 2, 4),
    )
    truth = reference.patch_embed(images.double(), weight.double(), None, ids)
    eager = _relative(reference.patch_embed(images, weight, None, ids), truth)
    assert _relative(patch_embed(images, weight, None, ids), truth) <= 2 * eager
    with torch.autocast("cpu", dtype):
        tokens = patch_embed(images.float(), weight.float(), torch.zeros(64), ids)
    assert tokens.dtype == dtype and _relative(tokens, truth) <= 2 * eager


def _gradient(pred: Tensor, target: Tensor, **options) -> Tensor:
    """Of the sum over all rows as masked, (1, L, D) each."""
    leaf = pred.clone().requires_grad_()
    masked_feature_loss(leaf, target, torch.ones(pred.shape[:2]), reduction="sum", **options).backward()
    return leaf.grad


def test_what_is_equal_has_no_gradient_in_l1(kernels):
    pred, target = normal(1, 2, 37), normal(1, 2, 37, seed=1)
    equal = torch.rand(pred.shape, generator=seeded()) < 0.5
    gradient = _gradient(pred, target.where(~equal, pred), beta=0.0)
    torch.testing.assert_close(gradient, (pred - target).sign().where(~equal, 0) / 37)


def test_simmim(backend):
    """Its code's loss: absolute differences of masked pixels, through channels of a convolution that are shuffled."""
    images, pred, mask = normal(2, 3, 16, 24), normal(2, 48, 4, 6, seed=1), normal(2, 4, 6, seed=2) > 0
    pixels = torch.nn.functional.pixel_shuffle(pred, 4)
    masked = mask.float().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    expected = ((images - pixels).abs() * masked).sum() / masked.sum() / 3
    patches = torch.nn.functional.pixel_unshuffle(images, 4)
    rows = (x.flatten(2).transpose(1, 2) for x in (pred, patches))
    torch.testing.assert_close(masked_feature_loss(*rows, mask.flatten(1), beta=0.0), expected)


def test_gradient_of_the_cosine_of_a_row_below_its_clamp(kernels):
    target = normal(1, 1, 37)
    gradient = _gradient(1e-14 * (target + normal(1, 1, 37, seed=1)), target, loss="cosine")
    torch.testing.assert_close(gradient, -target / target.norm() / 1e-12)


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine", "mse"])
def test_a_gradient_in_bfloat16_is_that_in_float32_rounded(kernels, loss):
    pred, target = normal(1, 5, 37, dtype=torch.bfloat16), normal(1, 5, 37, seed=1)
    gradient, exact = (_gradient(x, target, loss=loss) for x in (pred, pred.float()))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, exact.bfloat16(), rtol=0, atol=0)


def test_derivatives_are_numerically_right(backend):
    def double(*shape: int) -> Tensor:
        return normal(*shape, seed=4).double().requires_grad_()

    ids, mask = some_ids(2, 5, 6), torch.tensor([[True, False, True]])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: patches.gather_patches(x, ids, [2, 1]), (double(2, 2, 4, 3),))
        assert check(lambda x: patches.scatter_patches(x, ids, [2, 2, 4, 3], [2, 1]), (double(2, 5, 4),))
        assert check(lambda x, w, b: patch_embed(x, w, b, ids), (double(2, 1, 4, 3), double(2, 1, 2, 1), double(2)))
        for norm in (True, "per_channel"):
            images = normal(1, 2, 2, 6).double()
            assert check(lambda x: masked_patch_loss(x, images, mask, 2, norm_pix_loss=norm), (double(1, 3, 8),))  # noqa: B023
        for loss in ("smooth_l1", "cosine", "mse"):
            target = normal(1, 3, 5, seed=5).double()
            assert check(lambda x: masked_feature_loss(x, target, mask, loss=loss, beta=0.7), (double(1, 3, 5),))  # noqa: B023


@pytest.mark.parametrize("suffix", ["", "_portable"])
def test_opcheck(suffix):
    images, ids, mask = normal(2, 3, 4, 6).requires_grad_(), some_ids(2, 4, 6), torch.rand(2, 6) < 0.5
    pred, grad = normal(2, 6, 12), normal(2, 6)  # whose second derivatives nothing traces
    for name, args in {
        "gather_patches": (images, ids, [2, 2]),
        "scatter_patches": (pred[:, :4].clone().requires_grad_(), ids, [2, 3, 4, 6], [2, 2]),
        "masked_patch_loss_backward": (grad, pred, images.detach(), mask, [2, 2], "patch"),
        "masked_feature_loss_backward": (grad, pred, pred, mask, "cosine", 1.0),
    }.items():
        torch.library.opcheck(getattr(torch.ops.fastssl, name + suffix).default, with_tensors(args))


def test_threads_change_nothing(kernels):
    images, pred, mask = normal(20, 3, 32, 48), normal(20, 6, 768), torch.rand(20, 6) < 0.7
    ids, leaf = some_ids(20, 3, 6), pred.requires_grad_()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = masked_patch_loss(leaf, images, mask, 16, reduction="none")
        gathered = patches.gather_patches(images, ids, [16, 16])
        scattered = patches.scatter_patches(gathered, ids, images.shape, [16, 16])
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf), gathered, scattered))
    assert all(map(torch.equal, *results))


def test_reads_no_uninitialised_memory(kernels):
    """New tensors come filled with NaN."""
    torch.use_deterministic_algorithms(True)
    images, ids = normal(3, 3, 8, 12), some_ids(3, 2, 6)
    gathered = patches.gather_patches(images, ids, [4, 4])
    assert gathered.isfinite().all()
    assert patches.scatter_patches(gathered, ids, images.shape, [4, 4]).isfinite().all()
    pred = normal(3, 6, 48).requires_grad_()
    for share in (0.0, 0.5, 1.0):
        mask = torch.rand(3, 6, generator=seeded(2)) < share
        for loss in (
            masked_patch_loss(pred, images, mask, 4, reduction="none"),
            masked_feature_loss(pred, pred.detach() + 1, mask, reduction="none"),
        ):
            (gradient,) = torch.autograd.grad(loss.sum(), pred)
            assert ((loss != 0) == mask).all() and (gradient.isfinite() & ((gradient != 0) == mask[:, :, None])).all()


def test_backends_agree():
    images, weight, bias, ids = normal(2, 3, 8, 12), normal(5, 3, 4, 4), normal(5), some_ids(2, 3, 6)
    results = []
    for name in ("auto", "portable", "reference"):
        with fastssl.use_backend(name):
            results.append((patch_embed(images, weight, bias), patch_embed(images, weight, bias, ids)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


IMAGES, WEIGHT, BIAS, IDS = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4), torch.randn(5), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: patch_embed(IMAGES[0], WEIGHT, BIAS), ValueError, r"images must have shape \(B, C, H, W\), got"),
        (lambda: patch_embed(IMAGES.long(), WEIGHT, BIAS), ValueError, "images must have a floating.*int64"),
        (lambda: patch_embed(IMAGES, WEIGHT[0], BIAS), ValueError, r"weight must have shape .*got \(3, 4, 4\)"),
        (lambda: patch_embed(IMAGES, WEIGHT[:0], BIAS), ValueError, r"weight must have shape .*got \(0, 3, 4, 4\)"),
        (lambda: patch_embed(IMAGES, [1.0], BIAS), TypeError, "weight must be a Tensor, got list"),
        (lambda: patch_embed(IMAGES, WEIGHT[:, :2], BIAS), ValueError, "number of channels, got 3 and 2"),
        (lambda: patch_embed(IMAGES, WEIGHT[..., 1:], BIAS), ValueError, r"multiples of \(4, 3\).*got \(8, 8\)"),
        (lambda: patch_embed(IMAGES, WEIGHT[..., None], BIAS), ValueError, r"images must have shape \(B, C, T, H, W\)"),
        (lambda: patch_embed(IMAGES, WEIGHT, BIAS[1:]), ValueError, r"bias must have shape \(5,\).*got \(4,\)"),
        (lambda: patch_embed(IMAGES, WEIGHT, 0.0), TypeError, "bias must be a Tensor, got float"),
        (lambda: patch_embed(IMAGES, WEIGHT.double(), BIAS), ValueError, "images and weight .*same dtype"),
        (lambda: patch_embed(IMAGES, WEIGHT, BIAS.to("meta")), ValueError, "images and bias .*same device"),
        (lambda: patch_embed(IMAGES, WEIGHT, BIAS, IDS[0]), ValueError, r"ids_keep must have shape \(2, K\)"),
        (lambda: patch_embed(IMAGES, WEIGHT, BIAS, IDS.float()), ValueError, "ids_keep must have dtype"),
        (lambda: patch_embed(IMAGES, WEIGHT, BIAS, IDS.to("meta")), ValueError, "ids_keep and images .*same device"),
        (lambda: patch_embed(IMAGES, WEIGHT, BIAS, IDS + 4), IndexError, "ids_keep must be from 0 to below 4, got 4"),
        (lambda: patch_embed(IMAGES, WEIGHT, BIAS, IDS - 1), IndexError, "ids_keep must be from 0 to below 4, got -1"),
        (lambda: PatchEmbed(8, 4)(IMAGES[..., 4:]), ValueError, r"images must have sizes \(8, 8\), got \(8, 4\)"),
        (lambda: PatchEmbed(8, 3), ValueError, r"img_size must be a multiple of patch_size \(3, 3\), got \(8, 8\)"),
        (lambda: PatchEmbed(8.0, 4), TypeError, "img_size must be an integer or two, got 8.0"),
        (lambda: PatchEmbed(8, 4, in_chans=0), ValueError, "in_chans must be positive, got 0"),
        (lambda: PatchEmbed(8, 4, tubelet_size=-1), ValueError, "tubelet_size must be positive, got -1"),
    ],
)
def test_bad_input(call, error, match, backend):
    with pytest.raises(error, match=match):
        call()


PRED, MASK = torch.randn(2, 4, 48), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "name, args, error, match",
    [
        ("masked_patch_loss", (PRED, IMAGES, MASK, [4, 3], "none"), ValueError, "multiples of .4, 3., a patch's"),
        ("masked_patch_loss", (PRED, IMAGES, MASK, [4, 0], "none"), ValueError, "multiples of .4, 0., a patch's"),
        ("masked_patch_loss", (PRED, IMAGES, MASK, [4], "none"), ValueError, "must have shape .B, C, H, W."),
        ("masked_patch_loss", (PRED, IMAGES, MASK, [8, 8], "none"), ValueError, "a row for each patch"),
        ("masked_patch_loss", (PRED, IMAGES[:1], MASK, [4, 4], "none"), ValueError, "a row for each patch"),
        ("masked_patch_loss", (PRED[:, 1:], IMAGES, MASK[:, 1:], [4, 4], "none"), ValueError, "a row for each patch"),
        ("masked_patch_loss", (PRED, IMAGES, MASK[:1], [4, 4], "none"), ValueError, "mask must have shape"),
        ("masked_patch_loss", (PRED, IMAGES, MASK.float(), [4, 4], "none"), ValueError, "mask must be boolean"),
        ("masked_patch_loss", (PRED, IMAGES, MASK, [4, 4], "all"), ValueError, "norm must be .*got 'all'"),
        ("masked_patch_loss", (PRED.long(), IMAGES, MASK, [4, 4], "none"), ValueError, "pred must be floating"),
        ("masked_patch_loss_backward", (PRED, PRED, IMAGES, MASK, [4, 4], "none"), ValueError, "grad_losses must"),
        ("masked_feature_loss", (PRED, PRED[..., 1:], MASK, "mse", 1.0), ValueError, "must have the same shape"),
        ("masked_feature_loss", (PRED, PRED, MASK, "l3", 1.0), ValueError, "loss must be .*got 'l3'"),
        ("masked_feature_loss_backward", (PRED[0], PRED, PRED, MASK, "mse", 1.0), ValueError, "grad_losses must"),
        ("gather_patches", (IMAGES, IDS[:1], [4, 4]), ValueError, "ids must have shape"),
        ("gather_patches", (IMAGES, IDS.float(), [4, 4]), ValueError, "ids must be int64 or int32"),
        ("scatter_patches", (PRED, IDS, [2, 3, 8, 8], [4, 4]), ValueError, "patches must have shape"),
        ("scatter_patches", (PRED[:, :3], IDS, [2, 3, 8, -8], [4, 4]), ValueError, "size must not be negative"),
        ("scatter_patches", (PRED[:, :3], IDS + 4, [2, 3, 8, 8], [4, 4]), IndexError, "from 0 to below 4, got 4"),
    ],
)
@pytest.mark.skipif(fastssl._native.status()["_C"] is not None, reason="the checks of the C++ library")
@pytest.mark.sanitized
def test_kernels_refuse_what_does_not_fit(name, args, error, match):
    with pytest.raises(error, match=match):
        getattr(torch.ops.fastssl, name)(*with_tensors(args))


@pytest.mark.parametrize("beta", [1e-40, 1e-50])
def test_a_tiny_beta_is_that_of_l1(beta, kernels):
    pred, target = torch.randn(2, 3, 5).requires_grad_(), torch.randn(2, 3, 5)
    target[0, 0, 0] = pred[0, 0, 0].detach()
    mask, results = torch.ones(2, 3), []
    for b in (beta, 0.0):
        loss = masked_feature_loss(pred, target, mask, loss="smooth_l1", beta=b)
        results += [loss, *torch.autograd.grad(loss, pred)]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3]) and results[1].isfinite().all()


def test_no_frames_make_no_tubelet():
    with pytest.raises(ValueError, match="tubelet_size must be"):
        PatchEmbed(32, 16, tubelet_size=0)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_nan_in_features_is_one_in_its_gradient(beta, kernels):
    pred = torch.tensor([[[1.0, float("nan"), -1.0]]], requires_grad=True)
    loss = masked_feature_loss(pred, torch.zeros(1, 1, 3), torch.ones(1, 1), beta=beta)
    (gradient,) = torch.autograd.grad(loss, pred)
    assert loss.isnan() and gradient.isnan().tolist() == [[[False, True, False]]]
