"""Losses of masked patches, and patches gathered and scattered: csrc/cuda/patches.cu."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastssl.reference import OPS
from tests.accuracy import with_tensors
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
from tests.recorder import recorded_calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["masked_patch_loss", "masked_feature_loss"])
def test_losses_of_masked_patches(name, dtype):
    """Every fourth sample, in each dtype other ones; the other side's dtype differs in every second of them."""
    index = DTYPES.index(dtype)
    samples = list(OPS[name].samples(dtype, str(torch.get_default_device())))[index::4]
    for i, sample in enumerate(samples):
        ((_, args),) = recorded_calls(OPS[name], sample)
        pred, other, mask, *settings = (x.detach() if isinstance(x, Tensor) else x for x in args)
        other = other.to(DTYPES[index - i % 2])
        args = pred, other, mask, *settings
        assert_as_accurate(name, *args)
        wide = torch.promote_types(torch.promote_types(dtype, other.dtype), torch.float32)
        assert_as_accurate(f"{name}_backward", torch.randn(mask.shape).to(wide), *args)


@pytest.mark.parametrize(
    "size, patch",
    [((2, 3, 8, 12), [4, 4]), ((3, 1, 6, 6), [3, 2]), ((2, 2, 4, 6, 8), [2, 3, 4]), ((1, 5, 9, 35), [9, 7]),
     ((2, 3, 64, 32), [16, 16]), ((0, 3, 4, 4), [2, 2])],
)  # fmt: skip
def test_gather_and_scatter_of_patches(size, patch):
    length = math.prod(n // p for n, p in zip(size[2:], patch, strict=True))
    for i, dtype in enumerate(DTYPES):
        for layout, images in enumerate(
            (*layouts(*size, dtype=dtype), torch.randn(*size).to(dtype).flip(1).movedim(1, -1))
        ):
            if layout == 4:
                images = images.contiguous().movedim(-1, 1)  # channels last
            ids = torch.randint(length, (size[0], length + 1)).to((torch.int64, torch.int32)[(i + layout) % 2])
            patches = cuda.gather_patches(images, ids, patch)
            assert torch.equal(patches, portable.gather_patches_portable(images, ids, patch))
            args = patches, ids, size, patch
            assert_as_accurate("scatter_patches", *args)
            once = patches[:, : length // 2], permutations(size[0], length)[:, : length // 2], size, patch
            assert torch.equal(cuda.scatter_patches(*once), portable.scatter_patches_portable(*once))


IMAGES, PRED = torch.randn(2, 3, 8, 8, device=DEVICE), torch.randn(2, 4, 48, device=DEVICE)
MASK = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)


def test_launches():
    losses, ids, settings = torch.ones(2, 4), permutations(2, 4), ("mse", *with_tensors((0.0,)))
    for grad, suffix in (((), ""), ((losses,), "_backward")):
        assert_launches(f"masked_patch_loss{suffix}", *grad, PRED, IMAGES, MASK, [4, 4], "patch")
        assert_launches(f"masked_feature_loss{suffix}", *grad, PRED, PRED.clone(), MASK, *settings)
    assert_launches("gather_patches", IMAGES, ids, [4, 4])
    assert_launches("scatter_patches", PRED, ids, [2, 3, 8, 8], [4, 4])


@pytest.mark.skipif(not LIBRARY, reason="leaves a GPU unusable")
@pytest.mark.parametrize(
    "call",
    [
        lambda: cuda.gather_patches(IMAGES, MASK.long() + 4, [4, 4]),
        lambda: cuda.scatter_patches(PRED, MASK.long() - 2, [2, 3, 8, 8], [4, 4]),
    ],
)
def test_ids_out_of_range_are_asserted(call):
    assert_aborts(call)


@pytest.mark.parametrize(
    "call, match",
    [
        (
            lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK, [4, 3], "patch"),
            r"multiples of \[4, 3\].*got \[2, 3, 8, 8\]",
        ),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK, [4], "patch"), r"images must have shape \(B, C, H, W\)"),
        (
            lambda: cuda.masked_patch_loss(PRED[:, 1:], IMAGES, MASK[:, 1:], [4, 4], "patch"),
            r"\[2, 4, 48\].*\[2, 3, 48\]",
        ),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK, [4, 4], "pixel"), "norm must be .*got 'pixel'"),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES.long(), MASK, [4, 4], "none"), "images must be floating.*Long"),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK.float(), [4, 4], "none"), "mask must be boolean.*Float"),
        (
            lambda: cuda.masked_patch_loss_backward(PRED[0], PRED, IMAGES, MASK, [4, 4], "none"),
            "grad_losses must have mask's shape",
        ),
        (lambda: cuda.masked_feature_loss(PRED, PRED[..., 1:], MASK, "mse", *with_tensors((0.0,))), "the same shape"),
        (lambda: cuda.masked_feature_loss(PRED, PRED, MASK, "l1", *with_tensors((0.0,))), "loss must be .*got 'l1'"),
        (lambda: cuda.gather_patches(IMAGES, MASK.long()[:1], [4, 4]), r"ids must have shape \(2, K\).*got \[1, 4\]"),
        (lambda: cuda.gather_patches(IMAGES, MASK, [4, 4]), "ids must be int64 or int32, got Bool"),
        (lambda: cuda.scatter_patches(PRED, MASK.long(), [2, 3, 8, -8], [4, 4]), "size must not be negative"),
        (
            lambda: cuda.scatter_patches(PRED, MASK.long(), [2, 3, 8, 12], [4, 6]),
            r"patches must have shape \[2, 4, 72\]",
        ),
    ],
)
def test_bad_patches(call, match):
    with pytest.raises(ValueError, match=match):
        call()
