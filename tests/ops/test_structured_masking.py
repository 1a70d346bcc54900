"""Masks of tubes, spans and blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import (
    block_masking_ids,
    random_masking_ids,
    span_masking_ids,
    tube_masking_ids,
)
from tests.inputs import seeded

chisquare = pytest.importorskip("scipy.stats").chisquare


def _one_square(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    return block_masking_ids(*args, min_block=9, max_block=9, aspect_ratio=(1, 1), **kwargs)


GENERATORS = {  # and the arguments between batch and mask_ratio, and behind it
    "spans": (span_masking_ids, (40,), (5,)),
    "spans of all": (span_masking_ids, (7,), (7,)),
    "spans of one": (span_masking_ids, (33,), (1,)),
    "tubes": (tube_masking_ids, (3, 14), ()),
    "tube": (tube_masking_ids, (1, 9), ()),
    "tubes, no frames": (tube_masking_ids, (0, 9), ()),
    "blocks": (block_masking_ids, (14, 14), ()),
    "wide blocks": (block_masking_ids, (5, 33), ()),
    "squares": (_one_square, (6, 7), ()),
    "blocks, no tokens": (block_masking_ids, (0, 3), ()),
    "blocks, one token": (block_masking_ids, (1, 1), ()),
}


@pytest.mark.parametrize("mask_ratio", [0.0, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("name", GENERATORS)
def test_structured_masks_keep_the_contract(name, mask_ratio, backend):
    """As many tokens masked in every sample as in those of random_masking_ids, of each frame."""
    function, size, rest = GENERATORS[name]
    frames = size[0] if function is tube_masking_ids else 1
    per_frame = math.prod(size) if frames == 1 else size[1]
    length, keep = frames * per_frame, frames * int(per_frame * (1 - mask_ratio))
    for batch in (0, 1, 300):
        ids_keep, mask, ids_restore = function(batch, *size, mask_ratio, *rest, generator=seeded())
        assert ids_keep.shape == (batch, keep) and mask.shape == ids_restore.shape == (batch, length)
        assert ids_keep.dtype == ids_restore.dtype == torch.int64 and mask.dtype == torch.float32
        assert torch.equal(ids_restore.sort(1).values, torch.arange(length).expand(batch, length))
        assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(keep).expand(batch, keep))
        assert torch.equal(mask, (ids_restore >= keep).float())
        if function is not tube_masking_ids:
            assert (ids_keep.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", GENERATORS)
def test_structured_masks_follow_the_seed(name):
    function, size, rest = GENERATORS[name]
    for seed in range(5):
        results = []
        for backend, threads in (("auto", 1), ("auto", 2), ("portable", 1)):
            torch.set_num_threads(threads)
            with fastssl.use_backend(backend):
                results.append(function(150, *size, 0.5, *rest, generator=seeded(seed)))
        assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
        if math.prod(size) > 20 and name != "squares":
            masks = torch.cat([results[0][1], function(150, *size, 0.5, *rest, generator=seeded(seed + 5))[1]])
            assert torch.unique(masks, dim=0).shape[0] > 270


def test_tubes_are_one_mask_in_all_frames():
    ids_keep, mask, ids_restore = tube_masking_ids(50, 4, 30, 0.7, generator=seeded())
    one = random_masking_ids(50, 30, 0.7, generator=seeded())
    assert torch.equal(mask.view(50, 4, 30), one[1][:, None].expand(50, 4, 30))
    assert torch.equal(ids_keep.view(50, 4, 9), one[0][:, None] + 30 * torch.arange(4)[:, None])


def test_spans_are_added_in_a_random_order_and_the_last_is_cut():
    """One after another, as the docstring says, from the order in which the same seed puts their first steps."""
    batch, length = 100, 23
    for span_length, ratio in itertools.product((1, 2, 3, 4, 5, 8, 22, 23), (0.1, 0.5, 0.8)):
        mask = span_masking_ids(batch, length, ratio, span_length, generator=seeded(7))[1]
        seed = torch.randint(1 << 62, (), generator=seeded(7))
        order = torch.ops.fastssl.masking_ids(seed, batch, length - span_length + 1, length - span_length + 1)[0]
        for sample, starts in zip(mask, order.tolist(), strict=True):
            steps = dict.fromkeys(start + i for start in starts for i in range(span_length))
            masked = list(steps)[: length - int(length * (1 - ratio))]
            assert sample.nonzero().flatten().tolist() == sorted(masked)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.65, 1.0])
@pytest.mark.parametrize("span_length", [1, 4, 23])
def test_spans_lie_within_the_lengths_of_sequences(span_length, ratio, dtype, backend):
    """They are those of the same seed whose first steps leave room for them; of a short sequence there is one."""
    length = 23
    lengths = torch.arange(2 * (length + 1), dtype=dtype).remainder(length + 1)
    options = dict(lengths=lengths, generator=seeded(7))
    ids_keep, mask, ids_restore = span_masking_ids(len(lengths), length, ratio, span_length, **options)
    seed = torch.randint(1 << 62, (), generator=seeded(7))
    places = length - span_length + 1
    order = torch.ops.fastssl.masking_ids(seed, len(lengths), places, places)[0].tolist()
    keep = int(length * (1 - ratio))
    assert ids_keep.shape == (len(lengths), keep) and mask.dtype == torch.float32
    for end, sample, kept, starts in zip(lengths.tolist(), mask, ids_keep.tolist(), order, strict=True):
        starts = [start for start in starts if start <= max(end - span_length, 0)]
        steps = dict.fromkeys(start + i for start in starts for i in range(span_length) if start + i < end)
        masked = list(steps)[: end - int(end * (1 - ratio))]
        assert sample.nonzero().flatten().tolist() == sorted(masked)
        visible = [step for step in range(end) if step not in masked]
        assert kept == visible + list(range(end, end + keep - len(visible)))
    assert torch.equal(ids_restore.sort(1).values, torch.arange(length).expand(len(lengths), length))
    assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(keep).expand(len(lengths), keep))
    whole = torch.full((3,), length, dtype=dtype)
    results = [span_masking_ids(3, length, ratio, span_length, lengths=x, generator=seeded()) for x in (whole, None)]
    assert all(map(torch.equal, *results))


def test_blocks_are_rectangles_anywhere_of_any_shape():
    """One block of 9 tokens: a square with 3 x 3 tokens in all 4 x 5 places alike, or as often upright as lying."""
    masks = _one_square(20_000, 6, 7, 8.5 / 42, generator=seeded(8))[1].view(-1, 6, 7)
    rows, columns = masks.amax(2), masks.amax(1)
    assert (rows.sum(1) == 3).all() and (columns.sum(1) == 3).all()
    assert chisquare(torch.bincount(rows.argmax(1) * 5 + columns.argmax(1)).tolist()).pvalue > 1e-6
    masks = block_masking_ids(20_000, 14, 14, 8.5 / 196, min_block=9, max_block=9, generator=seeded(9))[1]
    masks = masks.view(-1, 14, 14)
    height, width = masks.amax(2).sum(1), masks.amax(1).sum(1)
    whole = height * width == 9  # others: rectangles of 8 or 10 that a single token makes up for, or that did not fit
    shapes = [((height == h) & (width == 9 // h) & whole).sum().item() for h in (9, 3, 1)]
    assert shapes[0] == shapes[2] == 0 and shapes[1] > 2000
    tall, wide = (height > width).sum().item(), (height < width).sum().item()
    assert chisquare([tall, wide]).pvalue > 1e-6 and tall > 2000


def test_blocks_mask_all_tokens_alike_but_for_the_border():
    """Upside down and mirrored the same frequencies; many neighbours, as blocks have."""
    mask = block_masking_ids(20_000, 14, 14, 0.4, generator=seeded(10))[1].view(-1, 14, 14)
    assert (mask.sum((1, 2)) == 196 - int(196 * 0.6)).all()
    often = mask.mean(0)
    for turned in (often.flip(0), often.flip(1), often.T):
        torch.testing.assert_close(often, turned, rtol=0, atol=0.025)
    assert 0.02 < often.min() < often.mean() < often[5:9, 5:9].mean()
    assert (mask[:, 1:] * mask[:, :-1]).mean() > 0.3 > 0.4**2


def test_single_tokens_make_up_what_blocks_leave():
    """A block of 4 x 4 does not fit into 10 tokens: those are single ones, any as likely."""
    mask = block_masking_ids(20_000, 5, 8, 10 / 40, min_block=16, aspect_ratio=(1, 1), generator=seeded(13))[1]
    singles = block_masking_ids(20_000, 1, 40, 10 / 40, aspect_ratio=(1, 1), generator=seeded(14))[1]
    assert (mask.sum(1) == 10).all() and (singles.sum(1) == 10).all()
    assert chisquare(singles.sum(0).tolist()).pvalue > 1e-6
    assert (singles[:, 1:] * singles[:, :-1]).mean().item() == pytest.approx(10 / 40 * 9 / 39, abs=3e-3)


def test_structured_masks_compile():
    def masks() -> tuple[Tensor, ...]:
        spans = *span_masking_ids(2, 9, 0.5, 3), *span_masking_ids(2, 9, 0.5, 3, lengths=torch.tensor([7, 2]))
        return *spans, *tube_masking_ids(2, 3, 8, 0.5), *block_masking_ids(2, 6, 6, 0.5)

    results = []
    for function in (masks, torch.compile(masks, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(function())
    assert all(map(torch.equal, *results))


def _spans(lengths: object) -> tuple[Tensor, ...]:
    return span_masking_ids(2, 4, 0.5, 2, lengths=lengths)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: tube_masking_ids(2, -1, 4, 0.5), ValueError, "frames must not be negative, got -1"),
        (lambda: tube_masking_ids(2, 1, 4, 2), ValueError, "mask_ratio must be from 0 to 1, got 2"),
        (lambda: span_masking_ids(2, 4, 0.5, 5), ValueError, "span_length must be from 1 to length, 4, got 5"),
        (lambda: span_masking_ids(2, 4, 0.5, 0), ValueError, "span_length must be from 1 to length, 4, got 0"),
        (lambda: span_masking_ids(2, 4, 0.5, 2.0), TypeError, "span_length must be an integer, got float"),
        (lambda: _spans([2, 2]), TypeError, "lengths must be a Tensor, got list"),
        (lambda: _spans(torch.tensor([2.0, 2.0])), ValueError, "lengths must be int64 or int32 of .*got torch.float32"),
        (lambda: _spans(torch.tensor([2])), ValueError, r"lengths must be .* of shape \(2,\), got .* shape \(1,\)"),
        (lambda: _spans(torch.tensor([2, 5])), ValueError, "lengths must be from 0 to length, 4, got 5"),
        (lambda: _spans(torch.tensor([2, -1])), ValueError, "lengths must be from 0 to length, 4, got -1"),
        (lambda: block_masking_ids(2, 4, -4, 0.5), ValueError, "width must not be negative, got -4"),
        (lambda: block_masking_ids(2, 4, 4, 0.5, min_block=0), ValueError, "min_block must be from 1 to .* got 0"),
        (lambda: block_masking_ids(2, 4, 4, 0.5, max_block=9), ValueError, "min_block must be from 1 to .*9, got 16"),
        (lambda: block_masking_ids(2, 4, 4, 0.5, max_block="9"), TypeError, "max_block must be an integer, got str"),
        (lambda: block_masking_ids(2, 4, 4, 0.5, aspect_ratio=(2, 1)), ValueError, r"in ascending order, got \(2, 1\)"),
        (lambda: block_masking_ids(2, 4, 4, 0.5, aspect_ratio=(0, 1)), ValueError, r"1/1000 to 1000.*got \(0, 1\)"),
        (lambda: block_masking_ids(2, 4, 4, 0.5, aspect_ratio=("a", 1)), TypeError, "aspect_ratio must be a number"),
        (
            lambda: block_masking_ids(2, 4, 4, 0.5, aspect_ratio=3),
            TypeError,
            "aspect_ratio must be two numbers, got int",
        ),
    ],
)
def test_bad_input(call, error, match, backend):
    with pytest.raises(error, match=match):
        call()
