"""Inputs for masking and moving tokens, and what holds of random masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastssl.reference.masking import (
    block_masking_ids,
    gather_tokens,
    random_masking,
    random_masking_ids,
    restore_tokens,
    scatter_tokens,
    span_masking_ids,
    tube_masking_ids,
)
from fastssl.reference.samples._inputs import generator, leaf, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample

_SHAPES = [(1, 1, 1), (2, 3, 5), (3, 7, 129), (5, 9, 64), (2, 196, 65), (33, 5, 16)]


def _permutations(batch: int, length: int, device: str) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.rand(batch, length, generator=source).argsort(dim=1).to(device)


def _gather_tokens_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)
    for batch, length, dim in _SHAPES:
        ids = _permutations(batch, length, device)[:, : max(1, length // 2)]
        yield Sample(f"{batch}x{length}x{dim}", (leaf(normal(batch, length, dim)), ids), tags=sized(batch, length, dim))
    x, ids = normal(3, 6, 24), _permutations(3, 6, device)
    yield Sample("int32", (leaf(x), ids.int()), tags={TRACED})
    yield Sample("repeated ids", (leaf(x), ids[:, [0, 0, 2, 0]]))
    yield Sample("transposed", (leaf(normal(3, 24, 6)).mT, ids.T.contiguous().T), tags={TRACED})
    yield Sample("sliced", (leaf(normal(6, 7, 50))[::2, 1:, 1:25], ids.repeat(1, 2)[:, ::2]), tags={TRACED})
    yield Sample("expanded", (leaf(normal(1, 6, 24)).expand(3, 6, 24), ids[:1].expand(3, 6)), tags={TRACED})
    yield Sample("none", (leaf(x), ids[:, :0]), tags={EDGE})
    yield Sample("empty", (leaf(x[:0]), ids[:0]), tags={TRACED})


def _ids_bad_inputs(name: str, tokens: str, x: Tensor, ids: Tensor, *rest: object) -> Iterator[BadInput]:
    """Of tokens and ids, and the positional arguments that follow them."""

    def bad(label: str, x: object, ids: object, match: str, error: type[Exception] = ValueError) -> BadInput:
        return BadInput(label, (x, ids, *rest), {}, error, match)

    yield bad("tokens flat", x[0], ids, rf"{tokens} must have shape \(B, .*got \(6, 8\)")
    yield bad("tokens integers", x.long(), ids, f"{tokens} must have a floating.*int64")
    yield bad("tokens list", x.tolist(), ids, f"{tokens} must be a Tensor, got list", TypeError)
    yield bad("ids flat", x, ids[0], rf"{name} must have shape \(2, .*got \(6,\)")
    yield bad("ids of fewer samples", x, ids[:1], rf"{name} must have shape \(2, .*got \(1, 6\)")
    yield bad("ids floats", x, ids.float(), f"{name} must have dtype torch.int64 or torch.int32, got torch.float32")
    yield bad("ids list", x, ids.tolist(), f"{name} must be a Tensor, got list", TypeError)
    yield bad("ids elsewhere", x, ids.to("meta"), f"{name} and .* same device, got meta and cpu")


def _token_arguments() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 8), _permutations(2, 6, "cpu")


def _gather_tokens_bad_inputs() -> Iterator[BadInput]:
    yield from _ids_bad_inputs("ids", "x", *_token_arguments())


def _scatter_tokens_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)
    for batch, length, dim in _SHAPES:
        keep = max(1, length // 2)
        arguments = leaf(normal(batch, keep, dim)), _permutations(batch, length, device)[:, :keep], length
        yield Sample(f"{batch}x{length}x{dim}", arguments, tags=sized(batch, length, dim))
    tokens, ids = normal(3, 4, 24), _permutations(3, 6, device)[:, :4]
    yield Sample("fill", (leaf(tokens), ids, 6, leaf(normal(24))), tags={TRACED})
    yield Sample("number", (leaf(tokens), ids, 6, 0.5), tags={TRACED})
    yield Sample("repeated ids", (leaf(tokens), ids[:, [0, 0, 2, 0]], 6), tags={EDGE})
    yield Sample("transposed", (leaf(normal(3, 24, 4)).mT, ids.T.contiguous().T, 6), tags={TRACED})
    yield Sample("sliced", (leaf(normal(6, 5, 50))[::2, 1:, 1:25], ids.repeat(1, 2)[:, ::2], 6), tags={TRACED})
    yield Sample("expanded", (leaf(normal(1, 4, 24)).expand(3, 4, 24), ids, 6), tags={TRACED})
    yield Sample("none", (leaf(tokens[:, :0]), ids[:, :0], 6), tags={EDGE})
    yield Sample("empty", (leaf(tokens[:0]), ids[:0], 6), tags={TRACED})


def _scatter_tokens_bad_inputs() -> Iterator[BadInput]:
    x, ids = _token_arguments()
    yield from _ids_bad_inputs("ids", "tokens", x, ids, 6)
    yield BadInput("ids short", (x, ids[:, :5], 6), {}, ValueError, r"ids must have shape \(2, 6\).*got \(2, 5\)")
    yield BadInput("length negative", (x, ids, -1), {}, ValueError, "length must not be negative, got -1")
    yield BadInput("length float", (x, ids, 6.0), {}, TypeError, "length must be an integer, got float")
    yield BadInput("fill short", (x, ids, 6, torch.ones(7)), {}, ValueError, r"fill must have .*8.*got.*\(7,\)")
    yield BadInput("fill text", (x, ids, 6, "0"), {}, TypeError, "fill must be .*got str")


def _restore_tokens_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)
    for batch, length, dim in _SHAPES:
        visible, ids = leaf(normal(batch, max(1, length // 2), dim)), _permutations(batch, length, device)
        arguments = visible, ids, leaf(normal(1, 1, dim)), leaf(normal(1, length, dim))
        yield Sample(f"{batch}x{length}x{dim}", arguments, tags=sized(batch, length, dim))
    visible, ids, mask_token = normal(3, 4, 24), _permutations(3, 6, device), normal(1, 1, 24)
    yield Sample("no positions", (leaf(visible), ids, leaf(mask_token)), tags={TRACED})
    yield Sample("mask token flat", (leaf(visible), ids, leaf(mask_token[0, 0]), leaf(normal(6, 24))), tags={TRACED})
    yield Sample("transposed", (leaf(normal(3, 24, 4)).mT, ids.T.contiguous().T, leaf(mask_token)), tags={TRACED})
    yield Sample(
        "sliced", (leaf(normal(6, 5, 50))[::2, 1:, 1:25], ids, leaf(normal(1, 1, 48))[..., ::2]), tags={TRACED}
    )
    yield Sample("expanded", (leaf(normal(1, 4, 24)).expand(3, 4, 24), ids, leaf(mask_token)), tags={TRACED})
    yield Sample("all visible", (leaf(normal(3, 6, 24)), ids, leaf(mask_token)), tags={EDGE})
    yield Sample("none visible", (leaf(visible[:, :0]), ids, leaf(mask_token)), tags={EDGE})
    yield Sample("empty", (leaf(visible[:0]), ids[:0], leaf(mask_token)), tags={TRACED})


def _restore_tokens_bad_inputs() -> Iterator[BadInput]:
    x, ids = _token_arguments()
    token, wrong = torch.zeros(8), torch.zeros(7)
    yield from _ids_bad_inputs("ids_restore", "x_visible", x, ids, token)
    yield BadInput("token short", (x, ids, wrong), {}, ValueError, r"mask_token must have .*8.*got.*\(7,\)")
    yield BadInput("positions short", (x, ids, token, wrong), {}, ValueError, r"pos_embed must have 6 x 8 .*\(7,\)")
    yield BadInput("positions list", (x, ids, token, [0.0]), {}, TypeError, "pos_embed must be a Tensor, got list")


def _check_masking(sample: Sample, length: int, keep: int, mask: Tensor, ids_restore: Tensor) -> None:
    """ids_restore is a permutation, and what it puts in the first `keep` places is not masked."""
    batch = mask.shape[0]
    assert mask.shape == ids_restore.shape == (batch, length)
    assert (mask.dtype, ids_restore.dtype) == (torch.float32, torch.int64)
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(length).expand(batch, length))
    assert torch.equal(mask, (ids_restore >= keep).float())


def _check_ids(length: int, keep: int, sample: Sample, ids_keep: Tensor, mask: Tensor, ids_restore: Tensor) -> None:
    _check_masking(sample, length, keep, mask, ids_restore)
    assert ids_keep.shape == (mask.shape[0], keep) and ids_keep.dtype == torch.int64
    assert torch.equal(ids_keep, ids_restore.argsort(dim=1)[:, :keep])


def _check_random_masking(sample: Sample, x_visible: Tensor, mask: Tensor, ids_restore: Tensor) -> None:
    x, mask_ratio = sample.args
    keep = int(x.shape[1] * (1 - mask_ratio))
    _check_masking(sample, x.shape[1], keep, mask, ids_restore)
    assert torch.equal(x_visible, gather_tokens(x, ids_restore.argsort(dim=1)[:, :keep]).to(x_visible.dtype))


def _check_random_masking_ids(sample: Sample, *triple: Tensor) -> None:
    _, length, mask_ratio = sample.args
    _check_ids(length, int(length * (1 - mask_ratio)), sample, *triple)


def _check_tubes(sample: Sample, ids_keep: Tensor, mask: Tensor, ids_restore: Tensor) -> None:
    batch, frames, length, mask_ratio = sample.args
    keep = int(length * (1 - mask_ratio))
    _check_ids(frames * length, frames * keep, sample, ids_keep, mask, ids_restore)
    in_frame = ids_keep.view(batch, frames, keep) - torch.arange(frames)[:, None] * length
    assert (in_frame == in_frame[:, :1]).all()


def _check_spans(sample: Sample, ids_keep: Tensor, mask: Tensor, ids_restore: Tensor) -> None:
    _, length, mask_ratio, span_length = sample.args
    _check_ids(length, int(length * (1 - mask_ratio)), sample, ids_keep, mask, ids_restore)
    assert (ids_keep.diff(dim=1) > 0).all()
    for row in mask.int().tolist():
        runs = "".join(map(str, row)).split("0")
        assert sum(0 < len(run) < span_length for run in runs) <= 1  # the last span may be cut


def _check_blocks(sample: Sample, ids_keep: Tensor, mask: Tensor, ids_restore: Tensor) -> None:
    _, height, width, mask_ratio = sample.args
    length = height * width
    _check_ids(length, int(length * (1 - mask_ratio)), sample, ids_keep, mask, ids_restore)
    assert (ids_keep.diff(dim=1) > 0).all()


def _sized_samples(cases: list[tuple], options: tuple[dict, ...], dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for *sizes, mask_ratio in cases:
        for kwargs in options:
            label = ", ".join(map(str, (*sizes, mask_ratio, *kwargs)))
            tags = sized(*sizes) | ({TRACED} if 0 < mask_ratio < 1 and sizes[0] == 2 else set())
            yield Sample(label, (*sizes, mask_ratio), kwargs, tags)


def _span_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    cases = [(1, 1, 1.0, 1), (2, 9, 0.5, 3), (3, 50, 0.65, 10), (4, 64, 0.5, 1), (2, 7, 0.0, 7), (5, 99, 0.99, 2)]
    for batch, length, mask_ratio, span_length in (*cases, (0, 8, 0.5, 2)):
        tags = sized(batch, length) if batch else {TRACED}
        yield Sample(
            f"{batch}x{length}, {mask_ratio}, {span_length}", (batch, length, mask_ratio, span_length), {}, tags
        )


def _random_masking_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    normal = generator(dtype, device)
    for batch, length, dim in _SHAPES:
        yield Sample(f"{batch}x{length}x{dim}", (leaf(normal(batch, length, dim)), 0.75), {}, sized(batch, length, dim))
    for mask_ratio in (0.0, 1.0):
        yield Sample(f"mask_ratio={mask_ratio}", (leaf(normal(3, 6, 24)), mask_ratio), tags={EDGE})
    yield Sample("transposed", (leaf(normal(3, 24, 6)).mT, 0.5), tags={TRACED})
    yield Sample("empty", (leaf(normal(0, 6, 24)), 0.5), tags={TRACED})


def _random_masking_bad_inputs() -> Iterator[BadInput]:
    x = torch.randn(2, 6, 8)
    yield BadInput("flat", (x[0], 0.5), {}, ValueError, r"x must have shape \(B, L, D\), got \(6, 8\)")
    yield BadInput("integers", (x.long(), 0.5), {}, ValueError, "x must have a floating.*int64")
    yield BadInput("list", (x.tolist(), 0.5), {}, TypeError, "x must be a Tensor, got list")
    yield BadInput("ratio", (x, 1.5), {}, ValueError, "mask_ratio must be from 0 to 1, got 1.5")
    yield BadInput("ratio text", (x, "half"), {}, TypeError, "mask_ratio must be a number, got str")


def _ids_sizes_bad_inputs(*names: str, after: tuple = (), others: tuple[BadInput, ...] = ()) -> Iterator[BadInput]:
    """Of a function of sizes, mask_ratio, and the positional arguments `after` it."""
    good = (4,) * len(names)
    for i, name in enumerate(names):
        for size, error, match in (
            (-1, ValueError, "not be negative, got -1"),
            (4.0, TypeError, "an integer, got float"),
        ):
            args = *good[:i], size, *good[i + 1 :], 0.5, *after
            yield BadInput(f"{name} {size}", args, {}, error, f"{name} must .*{match}")
    for ratio, error, match in ((1.5, ValueError, "from 0 to 1, got 1.5"), ("a", TypeError, "a number, got str")):
        yield BadInput(f"ratio {ratio}", (*good, ratio, *after), {}, error, f"mask_ratio must be {match}")
    yield from others


_BLOCKS_BAD = tuple(
    BadInput(label, (4, 4, 4, 0.5), kwargs, error, match)
    for label, kwargs, error, match in (
        ("min_block zero", {"min_block": 0}, ValueError, "min_block must be from 1 to max_block.*got 0"),
        (
            "min_block large",
            {"min_block": 9, "max_block": 4},
            ValueError,
            "min_block must be from 1 to max_block, 4.*9",
        ),
        ("max_block float", {"max_block": 4.0}, TypeError, "max_block must be an integer, got float"),
        ("aspect_ratio number", {"aspect_ratio": 0.5}, TypeError, "aspect_ratio must be two numbers, got float"),
        ("aspect_ratio order", {"aspect_ratio": (2.0, 0.5)}, ValueError, r"aspect_ratio must be .*\(2.0, 0.5\)"),
    )
)
_SPANS_BAD = tuple(
    BadInput(f"span_length {span}", (4, 4, 0.5, span), {}, error, match)
    for span, error, match in (
        (0, ValueError, "span_length must be from 1 to .*4.*got 0"),
        (5, ValueError, "span_length must be from 1 to .*4.*got 5"),
        (2.0, TypeError, "span_length must be an integer, got float"),
    )
)

_MOVES = {"multiplies": False, "autocast": "inputs"}
OpSpec("gather_tokens", "masking", gather_tokens, _gather_tokens_samples, _gather_tokens_bad_inputs, **_MOVES)
OpSpec("scatter_tokens", "masking", scatter_tokens, _scatter_tokens_samples, _scatter_tokens_bad_inputs, **_MOVES)
OpSpec("restore_tokens", "masking", restore_tokens, _restore_tokens_samples, _restore_tokens_bad_inputs, **_MOVES)
OpSpec(
    "random_masking",
    "masking",
    random_masking,
    _random_masking_samples,
    _random_masking_bad_inputs,
    op="masking_ids",
    check=_check_random_masking,
    **_MOVES,
)


def _register(reference: Callable, samples: Callable, bad_inputs: Callable, op: str, check: Callable) -> None:
    name = reference.__name__
    OpSpec(name, "masking", reference, samples, bad_inputs, dtypes=(torch.float32,), op=op, check=check, **_MOVES)


_register(
    random_masking_ids,
    partial(
        _sized_samples, [(1, 1, 0.5), (2, 9, 0.75), (5, 196, 0.75), (3, 64, 0.0), (3, 7, 1.0), (2, 300, 0.5)], ({},)
    ),
    partial(_ids_sizes_bad_inputs, "batch", "length"),
    "masking_ids",
    _check_random_masking_ids,
)
_register(
    tube_masking_ids,
    partial(_sized_samples, [(1, 1, 1, 0.5), (2, 3, 9, 0.5), (5, 8, 49, 0.9), (3, 4, 6, 0.0), (2, 2, 5, 1.0)], ({},)),
    partial(_ids_sizes_bad_inputs, "batch", "frames", "length"),
    "masking_ids",
    _check_tubes,
)
_register(
    span_masking_ids,
    _span_samples,
    partial(_ids_sizes_bad_inputs, "batch", "length", after=(2,), others=_SPANS_BAD),
    "masking_ids",
    _check_spans,
)
_register(
    block_masking_ids,
    partial(
        _sized_samples,
        [(1, 1, 1, 1.0), (2, 6, 5, 0.5), (3, 14, 14, 0.4), (2, 3, 7, 0.0), (2, 8, 8, 1.0)],
        ({"min_block": 2}, {"min_block": 4, "max_block": 9, "aspect_ratio": (1.0, 1.0)}),
    ),
    partial(_ids_sizes_bad_inputs, "batch", "height", "width", others=_BLOCKS_BAD),
    "block_masking_ids",
    _check_blocks,
)
