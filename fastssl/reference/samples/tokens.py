"""Inputs for corrupting text and drawing negatives, and what holds of the results."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.reference.samples._inputs import sized
from fastssl.reference.samples._spec import COMPILED, EDGE, RAGGED, SHAPES, TRACED, BadInput, OpSpec, Sample
from fastssl.reference.tokens import mask_tokens, sample_negatives, span_corruption, span_counts

_MASK, _VOCABULARY = 103, 1000


def _ids(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randint(200, _VOCABULARY, shape, generator=torch.Generator().manual_seed(0)).to(device)


def _mask_tokens_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    basic = {"mask_token_id": _MASK, "vocab_size": _VOCABULARY}
    for shape in ((1, 1), (2, 9), (5, 33), (3, 7)):
        yield Sample("x".join(map(str, shape)), (_ids(*shape, device=device),), basic, sized(*shape))
    ids = _ids(6, 40, device=device)
    special, words = ids % 5 == 0, torch.arange(40, device=device).expand(6, 40) // 3 - 2
    whole = {**basic, "probability": 0.5, "special_tokens_mask": special.int(), "word_ids": words}
    yield Sample("words", (ids.int(),), whole, {TRACED})
    yield Sample(
        "three dimensions",
        (ids.view(2, 3, 40).mT,),
        {**basic, "special_tokens_mask": special.view(2, 3, 40).mT},
        {TRACED},
    )
    yield Sample("all masked", (ids[0],), {**basic, "probability": 1.0, "mask_share": 1.0, "random_share": 0.0}, {EDGE})
    yield Sample("all random", (ids,), {**basic, "probability": 1, "mask_share": 0, "random_share": 1.0}, {EDGE})
    yield Sample("none", (ids[::2, 1:],), {**basic, "probability": 0.0}, {EDGE})
    yield Sample("empty", (ids[:0],), basic, {TRACED})


def _check_mask_tokens(sample: Sample, corrupted: Tensor, labels: Tensor) -> None:
    """What was there stands in labels or in corrupted; words are chosen as a whole, special tokens never."""
    (ids,), options = sample.args, sample.kwargs
    assert corrupted.shape == labels.shape == ids.shape
    assert (corrupted.dtype, labels.dtype) == (ids.dtype, torch.int64)
    chosen = labels != -100
    assert torch.equal(torch.where(chosen, labels, corrupted), ids.long())
    if (special := options.get("special_tokens_mask")) is not None:
        assert not chosen[special != 0].any()
    if (words := options.get("word_ids")) is not None:
        free = words >= 0 if special is None else (words >= 0) & (special == 0)
        assert not chosen[words < 0].any()
        for row, numbers, may in zip(chosen, words, free, strict=True):
            for word in numbers[may].unique():
                assert len(row[may & (numbers == word)].unique()) == 1
    if options.get("probability") == 1 and special is None and words is None:
        assert chosen.all()
    if options.get("mask_share") == 1:
        assert (corrupted[chosen] == options["mask_token_id"]).all()
    assert (corrupted >= 0).all() and (corrupted < options["vocab_size"]).all()


def _token_bad_inputs(name: str, ids: Tensor, basic: dict) -> Iterator[BadInput]:
    for value, error, match in (
        (-1, ValueError, "must be from 0 to .*got -1"),
        (1.5, TypeError, "must be an integer, got float"),
    ):
        yield BadInput(f"{name} {value}", (ids,), {**basic, name: value}, error, f"{name} {match}")


def _ids_bad_inputs(ids: Tensor, basic: dict, shape: str, flat: Tensor) -> Iterator[BadInput]:
    yield BadInput("ids floats", (ids.float(),), basic, ValueError, "input_ids must have dtype .*got torch.float32")
    yield BadInput("ids list", (ids.tolist(),), basic, TypeError, "input_ids must be a Tensor, got list")
    yield BadInput("ids flat", (flat,), basic, ValueError, rf"input_ids must have shape {shape}, got")


def _mask_tokens_bad_inputs() -> Iterator[BadInput]:
    ids, basic = _ids(4, 6), {"mask_token_id": _MASK, "vocab_size": _VOCABULARY}

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        return BadInput(label, (ids,), {**basic, **changes}, error, match)

    yield from _ids_bad_inputs(ids, basic, r"\(\.\.\., L\)", ids[0, 0])
    yield from _token_bad_inputs("mask_token_id", ids, basic)
    yield bad("no vocabulary", "vocab_size must be positive, got 0", vocab_size=0)
    small = {**basic, "vocab_size": 1 << 40}
    yield BadInput("vocabulary large", (ids.int(),), small, ValueError, "vocab_size must be from .*torch.int32, got")
    yield bad("probability large", "probability must be from 0 to 1, got 1.5", probability=1.5)
    yield bad("share text", "mask_share must be a number, got str", TypeError, mask_share="0.8")
    yield bad("shares large", r"mask_share \+ random_share must be at most 1, got 0.8 \+ 0.3", random_share=0.3)
    special = torch.zeros(4, 6, dtype=torch.bool)
    yield bad(
        "special short", r"special_tokens_mask must have .*\(4, 6\), got \(4, 5\)", special_tokens_mask=special[:, 1:]
    )
    yield bad("special floats", "special_tokens_mask must have dtype .*float32", special_tokens_mask=special.float())
    yield bad("special list", "special_tokens_mask must be a Tensor", TypeError, special_tokens_mask=special.tolist())
    yield bad("words booleans", "word_ids must have dtype .*got torch.bool", word_ids=special)
    yield bad("words elsewhere", "word_ids and input_ids .*device, got meta and cpu", word_ids=ids.to("meta"))


def _span_corruption_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    basic = {"first_sentinel_id": 199}
    for shape in ((1, 1), (2, 9), (5, 33), (3, 7)):
        yield Sample("x".join(map(str, shape)), (_ids(*shape, device=device),), basic, sized(*shape))
    ids, lengths = _ids(7, 40, device=device), torch.tensor([40, 17, 0, 1, 2, 3, 39], device=device)
    ended = {**basic, "eos_token_id": 1, "lengths": lengths}
    yield Sample("lengths", (ids.int(),), ended, {TRACED})
    yield Sample("dense", (ids.T,), {**ended, "lengths": None, "noise_density": 0.7, "mean_span_length": 1.0}, {TRACED})
    yield Sample("one span", (ids[::2, 1:],), {**basic, "mean_span_length": 1e6}, {EDGE})
    yield Sample("no tokens", (ids[:, :0],), {**basic, "eos_token_id": 1}, {EDGE})
    yield Sample("empty", (ids[:0],), basic, {TRACED})


def _check_span_corruption(sample: Sample, inputs: Tensor, labels: Tensor) -> None:
    """Putting the spans back where their sentinels stand gives the text again."""
    (ids,), options = sample.args, sample.kwargs
    first, end = options["first_sentinel_id"], options.get("eos_token_id")
    density, mean = options.get("noise_density", 0.15), options.get("mean_span_length", 3.0)
    noise, spans = span_counts(ids.shape[1], density, mean)
    more = spans + (end is not None)
    assert inputs.shape == (len(ids), ids.shape[1] - noise + more) and labels.shape == (len(ids), noise + more)
    assert (inputs.dtype, labels.dtype) == (ids.dtype, torch.int64)
    lengths = options.get("lengths")
    lengths = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
    for text, left, cut, length in zip(ids.tolist(), inputs.tolist(), labels.tolist(), lengths, strict=True):
        noise, spans = span_counts(length, density, mean)
        more = spans + (end is not None)
        assert set(left[length - noise + more :]) <= {options.get("pad_token_id", 0)} and set(cut[noise + more :]) <= {
            -100
        }
        left, cut = left[: length - noise + more], cut[: noise + more]
        if end is not None:
            assert left.pop() == cut.pop() == end
        sentinels = list(range(first, first - spans, -1))
        assert [token for token in left if token in sentinels] == sentinels
        assert [token for token in cut if token in sentinels] == sentinels
        restored, position = [], 0
        for token in left:
            if token not in sentinels:
                restored.append(token)
                continue
            assert cut[position] == token
            position += 1
            start = position
            while position < len(cut) and cut[position] not in sentinels:
                position += 1
            assert position > start
            restored += cut[start:position]
        assert restored == text[:length]


def _span_corruption_bad_inputs() -> Iterator[BadInput]:
    ids, basic = _ids(4, 40), {"first_sentinel_id": 199}

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        return BadInput(label, (ids,), {**basic, **changes}, error, match)

    yield from _ids_bad_inputs(ids, basic, r"\(B, L\)", ids[0])
    for name in ("first_sentinel_id", "pad_token_id", "eos_token_id"):
        yield from _token_bad_inputs(name, ids, basic)
    yield bad("few sentinels", "first_sentinel_id must leave sentinels for 2 spans, got 0", first_sentinel_id=0)
    yield bad("density zero", "noise_density must be between 0 and 1, got 0", noise_density=0)
    yield bad("density text", "noise_density must be a number, got str", TypeError, noise_density="half")
    yield bad("short spans", "mean_span_length must be at least 1, got 0.5", mean_span_length=0.5)
    yield bad("lengths short", r"lengths must be .* of shape \(4,\), got .*\(3,\)", lengths=torch.tensor([1, 2, 3]))
    yield bad("lengths large", "lengths must be from 0 to length, 40, got 41", lengths=torch.tensor([1, 2, 41, 3]))
    yield bad("lengths list", "lengths must be a Tensor, got list", TypeError, lengths=[1, 2, 3, 4])


def _sample_negatives_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for sizes in ((1, 1, 1), (2, 9, 4), (5, 33, 20), (3, 7, 9), (2, 5, 3)):
        tags = {tag for tag in sized(*sizes) if tag in (COMPILED, RAGGED, SHAPES, TRACED)}
        yield Sample("x".join(map(str, sizes)), sizes, {}, tags)
    mask = (torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.5).to(device)
    mask[4], mask[5] = False, True
    yield Sample("mask", (6, 30, 12), {"mask": mask}, {TRACED})
    yield Sample("transposed mask", (30, 6, 2), {"mask": mask.T}, {TRACED})
    yield Sample("no negatives", (3, 4, 0), {}, {EDGE})
    yield Sample("no steps", (3, 0, 4), {}, {EDGE})
    yield Sample("empty", (0, 3, 4), {}, {TRACED})


def _check_sample_negatives(sample: Sample, ids: Tensor) -> None:
    """Others of the same sequence, no two alike, as many as there are; then -1."""
    (batch, length, count), mask = sample.args, sample.kwargs.get("mask")
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    assert ids.shape == (batch, length, count) and ids.dtype == torch.int64
    for b, sequence in enumerate(mask.tolist()):
        steps = {b * length + step for step, takes_part in enumerate(sequence) if takes_part}
        for step, found in enumerate(ids[b].tolist(), b * length):
            wanted = min(count, len(steps) - 1) if step in steps else 0
            assert found[wanted:] == [-1] * (count - wanted)
            assert len(set(found[:wanted])) == wanted and set(found[:wanted]) <= steps - {step}


def _sample_negatives_bad_inputs() -> Iterator[BadInput]:
    for i, name in enumerate(("batch", "length", "num_negatives")):
        for size, error, match in (
            (-1, ValueError, "not be negative, got -1"),
            (4.0, TypeError, "an integer, got float"),
        ):
            args = *(4,) * i, size, *(4,) * (2 - i)
            yield BadInput(f"{name} {size}", args, {}, error, f"{name} must .*{match}")
    yield BadInput("length large", (1, 1 << 31, 1), {}, ValueError, r"length must be below 2\^31, got 2147483648")
    mask = torch.ones(4, 5, dtype=torch.bool)
    for label, wrong, error, match in (
        ("shape", mask[:, 1:], ValueError, r"mask must be bool of shape \(4, 5\), got torch.bool of \(4, 4\)"),
        ("floats", mask.float(), ValueError, "mask must be bool .*got torch.float32"),
        ("list", mask.tolist(), TypeError, "mask must be a Tensor, got list"),
    ):
        yield BadInput(f"mask {label}", (4, 5, 3), {"mask": wrong}, error, match)


_RANDOM = {"dtypes": (torch.float32,), "multiplies": False, "autocast": "inputs"}
OpSpec(
    "mask_tokens",
    "tokens",
    mask_tokens,
    _mask_tokens_samples,
    _mask_tokens_bad_inputs,
    check=_check_mask_tokens,
    **_RANDOM,
)
OpSpec(
    "span_corruption",
    "tokens",
    span_corruption,
    _span_corruption_samples,
    _span_corruption_bad_inputs,
    op="masking_ids",
    check=_check_span_corruption,
    **_RANDOM,
)
OpSpec(
    "sample_negatives",
    "tokens",
    sample_negatives,
    _sample_negatives_samples,
    _sample_negatives_bad_inputs,
    check=_check_sample_negatives,
    **_RANDOM,
)
