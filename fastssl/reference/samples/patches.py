"""Inputs for images cut into patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set

import torch
from torch import Tensor

from fastssl.reference.patches import masked_feature_loss, masked_patch_loss, patch_embed, sizes_of
from fastssl.reference.samples._inputs import generator, leaf
from fastssl.reference.samples._spec import EDGE, SHAPES, TRACED, BadInput, OpSpec, Sample


def _mask(batch: int, length: int, device: str) -> Tensor:
    """Three of four masked, one of every sample at least, where there is one."""
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1)
    return (order < max(1, length * 3 // 4)).to(device)


def _masked_patch_loss_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)

    def sample(
        label: str,
        images: Tensor,
        patch_size: int | tuple[int, int],
        tags: Set[str] = frozenset(),
        **kwargs: object,
    ) -> Sample:
        sizes = sizes_of(patch_size, kwargs.get("tubelet_size"))
        length = math.prod(size // p for size, p in zip(images.shape[2:], sizes, strict=True))
        pred = leaf(normal(images.shape[0], length, images.shape[1] * math.prod(sizes)))
        return Sample(label, (pred, images, _mask(images.shape[0], length, device), patch_size), kwargs, tags)

    for batch, channels, height, width, p, q in [
        (1, 1, 4, 4, 2, 2),
        (2, 3, 8, 12, 4, 4),
        (3, 3, 15, 14, 5, 7),
        (2, 3, 48, 32, 16, 16),
        (3, 2, 6, 51, 3, 17),
        (1, 4, 33, 9, 11, 9),
        (2, 3, 6, 129, 3, 43),
    ]:
        patch_size = p if p == q else (p, q)
        tags = {TRACED} if (batch, channels) == (2, 3) else set()
        if height < 16 and batch > 1:
            tags |= {SHAPES}
        yield sample(
            f"{batch}x{channels}x{height}x{width}", normal(batch, channels, height, width), patch_size, tags=tags
        )
    images = normal(3, 3, 16, 24)
    yield sample("pixels", images, 8, norm_pix_loss=False)
    yield sample("channels", images, 8, norm_pix_loss="per_channel")
    yield sample("photographs", normal(2, 3, 32, 32, scale=0.2) + 0.5, 16)
    for norm in (True, "per_channel"):
        yield sample(f"faint, {norm}", normal(3, 3, 16, 24, scale=1e-3), 8, norm_pix_loss=norm)
    videos = normal(2, 3, 4, 8, 12)
    for norm in (True, False, "per_channel"):
        yield sample(f"video, {norm}", videos, 4, tubelet_size=2, norm_pix_loss=norm)
    yield sample("transposed images", normal(2, 3, 24, 16).transpose(2, 3), 8, tags={TRACED})
    yield sample("channels last", normal(2, 16, 24, 3).permute(0, 3, 1, 2), (8, 6))
    yield sample("sliced images", normal(4, 5, 20, 60)[::2, 1:4, 2:18, ::2], (8, 10), tags={TRACED})
    yield sample("expanded images", normal(1, 3, 8, 8).expand(3, 3, 8, 8), 4, tags={TRACED})
    pred, *rest = sample("", images, 8).args
    yield Sample("transposed", (leaf(normal(3, 192, 6)).transpose(1, 2), *rest), tags={TRACED})
    yield Sample("sliced", (leaf(normal(3, 7, 200))[:, 1:, 5:197], *rest), tags={TRACED})
    yield Sample("constant patches", (pred, torch.full_like(images, 0.25), *rest[1:]))
    yield Sample("float mask", (pred, images, rest[1].float(), 8))
    yield Sample("none masked", (pred, images, torch.zeros_like(rest[1]), 8), {"reduction": "sum"})
    yield Sample("all masked", (pred, images, torch.ones_like(rest[1]), 8), {"reduction": "sum"})
    yield Sample("empty", (leaf(pred[:0]), images[:0], rest[1][:0], 8), {"reduction": "sum"}, tags={TRACED})


def _masked_patch_loss_bad_inputs() -> Iterator[BadInput]:
    pred, images, mask = torch.randn(2, 4, 48), torch.randn(2, 3, 8, 8), torch.ones(2, 4)
    videos = images[:, :, None].expand(2, 3, 4, 8, 8)

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        arguments = {"pred": pred, "images": images, "mask": mask, "patch_size": 4, **changes}
        names = ("pred", "images", "mask", "patch_size")
        args = tuple(arguments.pop(name) for name in names)
        return BadInput(label, args, arguments, error, match)

    yield bad("pred flat", r"pred must have shape \(B, L, P\), got \(2, 4\)", pred=pred[:, :, 0])
    yield bad("pred short", r"pred must have shape \(2, 4, 48\).*got \(2, 3, 48\)", pred=pred[:, :3])
    yield bad("pred integers", "pred must have a floating.*int64", pred=pred.long())
    yield bad("pred list", "pred must be a Tensor, got list", TypeError, pred=[1.0])
    yield bad("images flat", r"images must have shape \(B, C, H, W\).*got \(3, 8, 8\)", images=images[0])
    yield bad("images bytes", "images must have a floating.*uint8", images=images.byte())
    yield bad("images learnable", "images must not require grad", images=leaf(images))
    yield bad("images no channels", "images must have at least one channel", images=images[:, :0], pred=pred[..., :0])
    yield bad("images on meta", "pred and images must be on the same device.*cpu.*meta", images=images.to("meta"))
    yield bad("patch too large", r"sizes of images must be multiples of \(16, 16\).*got \(8, 8\)", patch_size=16)
    yield bad("patch ragged", r"sizes of images must be multiples of \(4, 3\).*got \(8, 8\)", patch_size=(4, 3))
    yield bad("patch zero", r"patch_size must be positive, got 0", patch_size=0)
    yield bad("patch negative", r"patch_size must be positive, got \(4, -4\)", patch_size=(4, -4))
    yield bad("patch triple", r"patch_size must be an integer or two, got \(4, 4, 4\)", TypeError, patch_size=(4, 4, 4))
    yield bad("patch float", "patch_size must be an integer or two, got 4.0", TypeError, patch_size=4.0)
    yield bad("video without tubelet", r"images must have shape \(B, C, H, W\)", images=videos)
    yield bad("image with tubelet", r"images must have shape \(B, C, T, H, W\)", tubelet_size=2)
    yield bad("tubelet ragged", r"multiples of \(3, 4, 4\).*got \(4, 8, 8\)", images=videos, tubelet_size=3)
    yield bad("tubelet text", "tubelet_size must be an integer, got str", TypeError, images=videos, tubelet_size="2")
    yield bad("tubelet zero", "tubelet_size must be positive, got 0", images=videos, tubelet_size=0)
    yield bad("mask short", r"mask must have shape \(2, 4\).*got \(2, 3\)", mask=mask[:, :3])
    yield bad("mask list", "mask must be a Tensor, got list", TypeError, mask=[1])
    yield bad("mask on meta", "mask and pred must be on the same device.*meta and cpu", mask=mask.to("meta"))
    yield bad("mask complex", "mask must be boolean, integer or floating-point.*complex64", mask=mask.cfloat())
    yield bad("norm text", "norm_pix_loss must be True, False or 'per_channel', got 'patch'", norm_pix_loss="patch")
    for norm, pixels in ((True, pred[:, :, :1]), ("per_channel", pred[:, :, :3])):
        channels = pixels.shape[2]
        yield bad(
            f"one element, {norm}",
            "norm_pix_loss needs at least 2 elements",
            pred=pixels.repeat(1, 16, 1),
            images=images[:, :channels],
            mask=torch.ones(2, 64),
            patch_size=1,
            norm_pix_loss=norm,
        )
    yield bad("reduction", "reduction must be 'none', 'mean' or 'sum', got 'average'", reduction="average")


def _masked_patch_loss_magnitude(sample: Sample) -> float:
    """About the largest mean square."""
    return 10.0


def _masked_feature_loss_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)
    for batch, length, dim in [(1, 1, 1), (2, 3, 5), (3, 7, 129), (1, 5, 64), (2, 9, 127), (1, 2, 1025)]:
        for loss in ("smooth_l1", "cosine", "mse"):
            rows = leaf(normal(batch, length, dim)), normal(batch, length, dim)
            label = f"{batch}x{length}x{dim}, {loss}"
            tags = {TRACED} if batch == 2 and dim < 9 else set()
            if loss == "mse" and batch > 1:
                tags |= {SHAPES}
            yield Sample(label, (*rows, _mask(batch, length, device)), {"loss": loss}, tags)
    rows, target, mask = normal(2, 6, 24), normal(2, 6, 24), _mask(2, 6, device)
    for beta in (0.0, 0.3, 5.0):
        yield Sample(f"beta={beta}", (leaf(rows), target, mask), {"beta": beta})
    for loss in ("smooth_l1", "cosine", "mse"):
        kwargs = {"loss": loss}
        strided = leaf(normal(2, 24, 6)).transpose(1, 2), normal(2, 24, 6).transpose(1, 2)
        yield Sample(
            "transposed" if loss == "cosine" else f"transposed, {loss}", (*strided, mask), kwargs, tags={TRACED}
        )
        sliced = leaf(normal(4, 7, 60))[::2, 1:, 3:51:2], normal(2, 7, 30)[:, 1:, 5:29]
        yield Sample(f"sliced, {loss}", (*sliced, mask), kwargs, tags={TRACED})
        expanded = leaf(normal(1, 1, 24)).expand(2, 6, 24), normal(1, 6, 24).expand(2, 6, 24)
        yield Sample(f"expanded, {loss}", (*expanded, mask), kwargs, tags={TRACED})
        yield Sample(
            f"empty, {loss}", (leaf(rows[:0]), target[:0], mask[:0]), {"reduction": "sum", **kwargs}, tags={TRACED}
        )
    yield Sample("no patches", (leaf(rows[:, :0]), target[:, :0], mask[:, :0]), {"reduction": "sum"})
    zero = rows.clone()
    zero[0, :2] = 0
    if dtype != torch.float16:  # which rounds normalize's 1e-12 to 0
        yield Sample("zero rows", (leaf(zero), zero.flip(0), torch.ones_like(mask)), {"loss": "cosine"}, tags={EDGE})
    yield Sample("integer mask", (leaf(rows), target, mask.int()))


def _masked_feature_loss_bad_inputs() -> Iterator[BadInput]:
    x, mask = torch.randn(2, 4, 8), torch.ones(2, 4)

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        arguments = {"pred": x, "target": x, "mask": mask, **changes}
        args = tuple(arguments.pop(name) for name in ("pred", "target", "mask"))
        return BadInput(label, args, arguments, error, match)

    yield bad("shapes differ", r"pred and target must have the same shape, got.*\(2, 4, 7\)", target=x[..., 1:])
    yield bad("flat", r"pred must have shape \(B, L, D\), got \(4, 8\)", pred=x[0], target=x[0])
    yield bad("no features", "pred must have at least one feature", pred=x[..., :0], target=x[..., :0])
    yield bad("integers", "target must have a floating.*int64", target=x.long())
    yield bad("not a tensor", "target must be a Tensor, got list", TypeError, target=x.tolist())
    yield bad("devices differ", "pred and target must be on the same device.*cpu.*meta", target=x.to("meta"))
    yield bad("target learnable", "target must not require grad", target=leaf(x))
    yield bad("mask short", r"mask must have shape \(2, 4\).*got \(2, 3\)", mask=mask[:, :3])
    yield bad("loss", "loss must be 'smooth_l1', 'cosine' or 'mse', got 'l1'", loss="l1")
    yield bad("beta negative", "beta must not be negative, got -1", beta=-1.0)
    yield bad("beta nan", "beta must be finite, got nan", beta=math.nan)
    yield bad("beta text", "beta must be a number, got str", TypeError, beta="1")
    yield bad("reduction", "reduction must be 'none', 'mean' or 'sum', got 'average'", reduction="average")


def _masked_feature_loss_magnitude(sample: Sample) -> float:
    """About the largest mean of squares; of cosines the rounded 1."""
    return 1.0 if sample.kwargs.get("loss") == "cosine" else 10.0


OpSpec(
    "masked_patch_loss",
    "patches",
    masked_patch_loss,
    _masked_patch_loss_samples,
    _masked_patch_loss_bad_inputs,
    _masked_patch_loss_magnitude,
    multiplies=False,
    reductions=("none", "mean", "sum"),
)
OpSpec(
    "masked_feature_loss",
    "patches",
    masked_feature_loss,
    _masked_feature_loss_samples,
    _masked_feature_loss_bad_inputs,
    _masked_feature_loss_magnitude,
    multiplies=False,
    reductions=("none", "mean", "sum"),
)


def _patch_embed_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)
    for batch, channels, height, width, p, q, dim in [
        (1, 1, 4, 4, 2, 2, 1),
        (2, 3, 8, 12, 4, 4, 5),
        (3, 3, 15, 14, 5, 7, 64),
        (2, 3, 48, 32, 16, 16, 33),
    ]:
        images, weight = leaf(normal(batch, channels, height, width)), leaf(normal(dim, channels, p, q, scale=0.2))
        arguments = images, weight, leaf(normal(dim)), _ids(batch, height // p * (width // q), device)
        tags = {TRACED, SHAPES} if batch == 2 else {SHAPES} if batch > 2 else set()
        yield Sample(f"{batch}x{channels}x{height}x{width}", arguments, tags=tags)
    images, weight, bias = normal(3, 3, 16, 24), normal(8, 3, 8, 8, scale=0.2), normal(8)
    ids = _ids(3, 6, device)
    yield Sample("every patch", (leaf(images), leaf(weight), leaf(bias)), tags={TRACED})
    yield Sample("no bias", (leaf(images), leaf(weight), None, ids), tags={TRACED})
    yield Sample("int32", (leaf(images), leaf(weight), leaf(bias), ids.int()))
    yield Sample("repeated ids", (leaf(images), leaf(weight), leaf(bias), ids[:, [0, 0, 1]]))
    yield Sample("constant images", (images, leaf(weight), leaf(bias), ids))
    video = leaf(normal(2, 3, 4, 8, 12)), leaf(normal(8, 3, 2, 4, 4, scale=0.2)), leaf(bias), _ids(2, 12, device)
    yield Sample("video", video, tags={TRACED})
    yield Sample("channels last", (leaf(normal(3, 16, 24, 3)).permute(0, 3, 1, 2), leaf(weight), leaf(bias), ids))
    yield Sample("sliced", (leaf(normal(6, 3, 20, 60))[::2, :, 2:18, 1:49:2], leaf(weight), leaf(bias), ids))
    yield Sample("none", (leaf(images), leaf(weight), leaf(bias), ids[:, :0]))
    yield Sample("empty", (leaf(images[:0]), leaf(weight), leaf(bias), ids[:0]), tags={TRACED})


def _ids(batch: int, length: int, device: str) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.rand(batch, length, generator=source).argsort(dim=1)[:, : max(1, length // 2)].to(device)


def _patch_embed_bad_inputs() -> Iterator[BadInput]:
    images, weight, bias, ids = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4), torch.randn(5), _ids(2, 4, "cpu")

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        arguments = {"images": images, "weight": weight, "bias": bias, "ids_keep": ids, **changes}
        return BadInput(label, tuple(arguments.values()), {}, error, match)

    yield bad("images flat", r"images must have shape \(B, C, H, W\).*got \(3, 8, 8\)", images=images[0])
    yield bad("images bytes", "images must have a floating.*uint8", images=images.byte())
    yield bad("images list", "images must be a Tensor, got list", TypeError, images=[1.0])
    yield bad("images ragged", r"sizes of images must be multiples of \(4, 4\).*got \(7, 8\)", images=images[:, :, 1:])
    yield bad("weight flat", r"weight must have shape \(D, C, .*got \(5, 48\)", weight=weight.flatten(1))
    yield bad("weight list", "weight must be a Tensor, got list", TypeError, weight=[1.0])
    yield bad("channels differ", "images and weight must have the same number of channels", weight=weight[:, :2])
    yield bad("dtypes differ", "images and weight must have the same dtype", weight=weight.double())
    yield bad("bias short", r"bias must have shape \(5,\).*got \(4,\)", bias=bias[:4])
    yield bad("bias number", "bias must be a Tensor, got float", TypeError, bias=0.0)
    yield bad("ids floats", "ids_keep must have dtype torch.int64 or torch.int32", ids_keep=ids.float())
    yield bad("ids of fewer samples", r"ids_keep must have shape \(2, .*got \(1, 2\)", ids_keep=ids[:1])


def _patch_embed_magnitude(sample: Sample) -> float:
    """About the largest sum of products."""
    return 4.0


OpSpec(
    "patch_embed",
    "patches",
    patch_embed,
    _patch_embed_samples,
    _patch_embed_bad_inputs,
    _patch_embed_magnitude,
    op="gather_patches",
    multiplies=None,  # which PyTorch computes
    autocast="autocast",
)
