"""Corrupting text and drawing negatives: the same on every backend, and what is drawn is as likely as it should be."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastssl
from fastssl.functional import (
    block_masking_ids,
    mask_tokens,
    random_masking_ids,
    sample_negatives,
    span_corruption,
)
from tests.inputs import seeded

pytestmark = pytest.mark.usefixtures("device")

chisquare = pytest.importorskip("scipy.stats").chisquare
LEVEL = 1e-6  # of chi-square's tests
BERT = {"mask_token_id": 103, "vocab_size": 30522}


def _ids(*shape: int) -> Tensor:
    return torch.randint(1000, 30000, shape, generator=seeded(1))


def _mask(*shape: int, share: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=seeded(2)) < share


WORDS = torch.arange(77).div(2, rounding_mode="floor") - 3
CALLS = {
    "tokens": lambda **o: mask_tokens(_ids(50, 77), **BERT, **o),
    "int32": lambda **o: mask_tokens(_ids(50, 77).int().T, **BERT, **o),
    "special": lambda **o: mask_tokens(_ids(50, 77), **BERT, special_tokens_mask=_mask(77, 50).T, **o),
    "words": lambda **o: mask_tokens(_ids(50, 77), **BERT, word_ids=WORDS.expand(50, 77), random_share=0.2, **o),
    "far words": lambda **o: mask_tokens(_ids(50, 77), **BERT, word_ids=(WORDS << 40).expand(50, 77), **o),
    "few negatives": lambda **o: sample_negatives(3, 200, 7, **o),
    "most negatives": lambda **o: sample_negatives(7, 65, 63, **o),
    "all negatives": lambda **o: sample_negatives(5, 12, 11, **o),
    "too many negatives": lambda **o: sample_negatives(5, 12, 100, **o),
    "one negative": lambda **o: sample_negatives(5, 129, 1, **o),
    "negatives of a mask": lambda **o: sample_negatives(9, 128, 50, mask=_mask(128, 9).T, **o),
    "negatives of a small mask": lambda **o: sample_negatives(90, 10, 3, mask=_mask(90, 10), **o),
    "spans": lambda **o: span_corruption(_ids(20, 100), first_sentinel_id=30521, **o),
    "spans of lengths": lambda **o: span_corruption(
        _ids(20, 100), first_sentinel_id=30521, lengths=torch.arange(0, 100, 5), eos_token_id=1, **o
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_draws_the_same_everywhere(name):
    for seed in range(3):
        results = []
        for backend, threads in (("auto", 1), ("auto", 2), ("portable", 2), ("reference", 1)):
            torch.set_num_threads(threads)
            with fastssl.use_backend(backend):
                result = CALLS[name](generator=seeded(seed))
            results.append(result if isinstance(result, tuple) else (result,))
        assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
        assert all(x.is_contiguous() for result in results for x in result)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("all negatives", "too many negatives")])
def test_seeds_and_calls_differ(name):
    def drawn(**options) -> Tensor:
        result = CALLS[name](**options)
        return result[0] if isinstance(result, tuple) else result

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    assert not torch.equal(first, second) and not torch.equal(*(drawn(generator=seeded(s)) for s in range(2)))
    torch.manual_seed(3)
    assert torch.equal(drawn(), first)


@pytest.mark.parametrize("word_ids", [False, True])
def test_shares(word_ids):
    """Of tokens, 15 %: 80 % of them masked, 10 % random, each word of the vocabulary as often, 10 % as they were."""
    rows, length, words = 2000, 300, 20
    ids = torch.full((rows, length), words)  # no random token is one
    options = {"word_ids": torch.arange(length).expand(rows, length)} if word_ids else {}
    corrupted, labels = mask_tokens(ids, mask_token_id=words + 1, vocab_size=words, generator=seeded(4), **options)
    chosen = labels != -100
    count = chosen.sum().item()
    assert chisquare([count, ids.numel() - count], [0.15 * ids.numel(), 0.85 * ids.numel()]).pvalue > LEVEL
    fates = [(corrupted == words + 1), (corrupted < words), (corrupted == words) & chosen]
    assert chisquare([fate.sum().item() for fate in fates], [0.8 * count, 0.1 * count, 0.1 * count]).pvalue > LEVEL
    assert chisquare(corrupted[fates[1]].bincount(minlength=words).tolist()).pvalue > LEVEL
    for along in (0, 1):  # neighbours are chosen, and changed, independently of each other
        for one in (chosen, fates[0], fates[1]):
            first, then = one.narrow(along, 0, one.shape[along] - 1), one.narrow(along, 1, one.shape[along] - 1)
            both, expected = (first & then).sum().item(), one.double().mean().item() ** 2 * first.numel()
            assert abs(both - expected) < 6 * expected**0.5
    assert chisquare(chosen.sum(0).tolist()).pvalue > LEVEL


def test_words_are_chosen_as_a_whole_and_each_token_has_its_own_fate():
    ids, words = _ids(3000, 40), torch.arange(40).expand(3000, 40) // 4
    corrupted, labels = mask_tokens(ids, **BERT, word_ids=words, generator=seeded(5))
    chosen = (labels != -100).view(3000, 10, 4)
    assert torch.equal(chosen.any(2), chosen.all(2))
    masked = (corrupted == BERT["mask_token_id"]).view(3000, 10, 4)[chosen.all(2)]
    observed = masked.sum(1).bincount(minlength=5)
    expected = [math.comb(4, k) * 0.8**k * 0.2 ** (4 - k) * len(masked) for k in range(5)]
    assert chisquare(observed.tolist(), expected).pvalue > LEVEL


@pytest.mark.parametrize("probability", [0.0, 2.0**-70, 1 - 2.0**-53, 1.0])
def test_extreme_shares(probability, backend):
    ids = _ids(100, 100)
    for mask_share, random_share in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.7, 0.3), (0.9, 0.1)):
        options = dict(probability=probability, mask_share=mask_share, random_share=random_share)
        corrupted, labels = mask_tokens(ids, mask_token_id=1, vocab_size=1, generator=seeded(), **options)
        assert ((labels == ids) if probability > 0.5 else (labels == -100)).all()
        unchanged = probability < 0.5 or mask_share == random_share == 0
        assert torch.equal(corrupted, ids) if unchanged else (corrupted <= 1).all()
        assert unchanged or mask_share not in (0, 1) or (corrupted == mask_share).all()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_set_of_negatives_is_as_likely(count):
    """Those of a step; and given those of the step before it."""
    batch, length, step = 30_000, 7, 2
    ids = sample_negatives(batch, length, count, generator=seeded(6)) - torch.arange(batch)[:, None, None] * length
    codes = [(1 << ids[:, s]).sum(1) for s in (step, step + 1)]
    sets = [sum(1 << i for i in x) for x in itertools.combinations(set(range(length)) - {step}, count)]
    observed = codes[0].bincount(minlength=1 << length)
    assert observed[sets].sum() == batch and chisquare(observed[sets].tolist()).pvalue > LEVEL
    _, pairs = torch.unique(torch.stack(codes), dim=1, return_counts=True)
    assert len(pairs) == len(sets) ** 2 and chisquare(pairs.tolist()).pvalue > LEVEL


def test_every_way_to_cut_spans_is_as_likely():
    """5 of 11 tokens in 2 spans: 5 - 1 ways, and 6 - 1 to divide the rest."""
    rows = 50_000
    inputs, labels = span_corruption(
        torch.arange(11).expand(rows, 11), first_sentinel_id=90, noise_density=5 / 11, mean_span_length=2.5,
        generator=seeded(7),
    )  # fmt: skip
    assert inputs.shape == (rows, 8) and labels.shape == (rows, 7)
    _, observed = torch.unique(labels, dim=0, return_counts=True)
    assert len(observed) == 4 * 5 and chisquare(observed.tolist()).pvalue > LEVEL


def test_span_corruption_by_hand():
    text = torch.tensor([[11, 12, 13, 14], [15, 16, 99, 99]])
    for seed in range(10):
        inputs, labels = span_corruption(
            text, first_sentinel_id=7, noise_density=0.5, mean_span_length=1.0, lengths=torch.tensor([4, 2]),
            eos_token_id=1, pad_token_id=3, generator=seeded(seed),
        )  # fmt: skip
        assert inputs.tolist() == [[11, 7, 13, 6, 1], [15, 7, 1, 3, 3]]
        assert labels.tolist() == [[7, 12, 6, 14, 1], [7, 16, 1, -100, -100]]


def test_negatives_beside_a_mask_on_another_device():
    mask = torch.ones(3, 5, dtype=torch.bool, device="meta")
    assert sample_negatives(3, 5, 2, mask=mask).is_meta
    with pytest.raises(ValueError, match="mask and the result must both be meta"):
        sample_negatives(3, 5, 2, mask=mask, device="cpu")


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: sample_negatives(*x.shape, 3),
        lambda x: span_corruption(x, first_sentinel_id=90),
        lambda x: random_masking_ids(*x.shape, 0.75),
        lambda x: block_masking_ids(x.shape[0], 6, 6, 0.5),
    ],
    ids=["sample_negatives", "span_corruption", "random_masking_ids", "block_masking_ids"],
)
def test_one_program_for_all_numbers_of_rows(draw):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    for i in range(4):
        results = []
        for function in (compiled, draw):
            torch.manual_seed(i)
            results.append(function(_ids(4 + 3 * i, 20 + i)))
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert counter.frame_count <= 2
