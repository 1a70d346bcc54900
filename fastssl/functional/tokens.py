"""Corrupting text as language models want it, and drawing negatives within sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._checks import (
    check_integer,
    check_lengths,
    check_memory,
    check_number,
    check_positive,
    check_same_device,
    check_same_kind,
    check_share,
    check_size,
    check_tensor,
)
from fastssl._random import draw_seed
from fastssl.ops import masking, tokens
from fastssl.ops._fake import mode_of

_INTEGERS = (torch.int64, torch.int32)


def mask_tokens(
    input_ids: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    special_tokens_mask: Tensor | None = None,
    word_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tokens a masked language model is to predict, and what it sees in their places (BERT, arXiv:1810.04805).

    Each token is chosen with the same probability, by itself or with its word. Of those, a share becomes the mask token
    and a share a token drawn from the whole vocabulary; the others stay as they are. One seed is drawn from the
    generator; what follows from it is the same on every device.

    Args:
        input_ids: (..., L) int64 or int32, tokens of sequences.
        mask_token_id: the token that stands for "masked".
        vocab_size: the number of tokens of the vocabulary.
        probability: that a token is chosen, from 0 to 1.
        mask_share: of the chosen tokens, those that become the mask token, from 0 to 1.
        random_share: those that become a random token, from 0 to 1 - mask_share.
        special_tokens_mask: of input_ids' shape, bool or integers: where it is not 0, a token is never chosen, as
            padding, [CLS] and [SEP] must not be; None: nowhere.
        word_ids: of input_ids' shape, int64 or int32: the tokens of a sequence that have the same number are one word,
            chosen as a whole (whole-word masking); what becomes of each is drawn by itself. Tokens with a negative
            number are never chosen. None: every token by itself.
        generator: the source of randomness; None: PyTorch's default one of the CPU. torch.compile cannot trace one.

    Returns:
        corrupted, of input_ids' shape and dtype; labels (..., L) int64, the token that was there where it was chosen,
        else -100, which `torch.nn.functional.cross_entropy` ignores.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes, dtypes or devices do not fit, a share is not from 0 to 1, mask_share + random_share is
            above 1, mask_token_id is negative, or vocab_size not positive, or above what input_ids' dtype holds.
    """
    _check_input_ids(input_ids, "(..., L)", 1)
    mask_token_id, vocab_size = (
        _check_token("mask_token_id", mask_token_id, input_ids),
        check_positive("vocab_size", vocab_size),
    )
    _check_token("vocab_size", vocab_size - 1, input_ids)
    shares = {"probability": probability, "mask_share": mask_share, "random_share": random_share}
    probability, mask_share, random_share = (check_share(name, share) for name, share in shares.items())
    if mask_share + random_share > 1 + 1e-9:  # as 0.7 + 0.3 is, but for rounding
        raise ValueError(f"mask_share + random_share must be at most 1, got {mask_share} + {random_share}")
    rows = input_ids.reshape(-1, input_ids.shape[-1]) if input_ids.numel() else input_ids.reshape(0, 0)
    if special_tokens_mask is not None:
        _check_beside("special_tokens_mask", special_tokens_mask, input_ids, (torch.bool, torch.uint8, *_INTEGERS))
        special_tokens_mask = special_tokens_mask.reshape(rows.shape) != 0
    if word_ids is not None:
        _check_beside("word_ids", word_ids, input_ids, _INTEGERS)
        word_ids = word_ids.reshape(rows.shape).long()
    chosen, masked, replaced = (
        min(int(share * tokens.ONE), tokens.ONE) for share in (probability, mask_share, mask_share + random_share)
    )
    with mode_of(input_ids):
        seed = draw_seed(generator, input_ids.device)
    corrupted, labels = tokens.mask_tokens(
        seed, rows, special_tokens_mask, word_ids, chosen, masked, replaced, mask_token_id, vocab_size
    )
    return corrupted.view(input_ids.shape), labels.view(input_ids.shape)


def span_corruption(
    input_ids: Tensor,
    *,
    first_sentinel_id: int,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    lengths: Tensor | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Spans of text cut out, a sentinel left for each, and what was cut out as the target (T5, arXiv:1910.10683).

    Of a sequence of n tokens, N = round(n noise_density), at least 1 and at most n - 1, are cut out, in
    S = round(N / mean_span_length) spans, at least 1. All ways to divide the N tokens into S spans, and the others into
    the S pieces before them, are equally likely. A sequence of fewer than two tokens stays whole.

        this is a sequence of tokens   ->   input   this <0> sequence of <1>
                                            labels  <0> is a <1> tokens

    Args:
        input_ids: (B, L) int64 or int32.
        first_sentinel_id: the sentinel of a sequence's first span; those of the next spans count down from it, as in
            T5's vocabulary.
        noise_density: the share of tokens that is cut out, between 0 and 1.
        mean_span_length: tokens in a span, on average; at least 1.
        lengths: (B,) int64 or int32, the tokens of each sequence, from 0 to L, where what follows them is padding;
            None: L.
        eos_token_id: ends inputs and labels; None: nothing does.
        pad_token_id: fills the inputs up.
        generator: as in `mask_tokens`.

    Returns:
        inputs (B, L - N + S) of input_ids' dtype, labels (B, N + S) int64, for N and S of a sequence of L tokens, and
        one more with eos_token_id. Shorter ones are filled up, inputs with pad_token_id and labels with -100.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes or dtypes do not fit, noise_density is not between 0 and 1, mean_span_length below 1, a
            token negative or too large for input_ids' dtype, there are more spans than sentinels, or on the CPU, if one
            of lengths is not from 0 to L. On CUDA an assertion stops the process.
    """
    _check_input_ids(input_ids, "(B, L)", 2, 2)
    first_sentinel_id = _check_token("first_sentinel_id", first_sentinel_id, input_ids)
    pad_token_id = _check_token("pad_token_id", pad_token_id, input_ids)
    if eos_token_id is not None:
        eos_token_id = _check_token("eos_token_id", eos_token_id, input_ids)
    noise_density = check_share("noise_density", noise_density)
    if noise_density in (0, 1):
        raise ValueError(f"noise_density must be between 0 and 1, got {noise_density}")
    mean_span_length = check_number("mean_span_length", mean_span_length)
    if mean_span_length < 1:
        raise ValueError(f"mean_span_length must be at least 1, got {mean_span_length}")
    batch, length = input_ids.shape
    noise = min(max(int(length * noise_density + 0.5), 1), max(length - 1, 0))
    spans = min(max(int(noise / mean_span_length + 0.5), 1), noise, length - noise)
    if spans > first_sentinel_id + 1:
        raise ValueError(f"first_sentinel_id must leave sentinels for {spans} spans, got {first_sentinel_id}")
    with mode_of(input_ids):
        seed = draw_seed(generator, input_ids.device)
    if lengths is None:
        ends = torch.full((batch, 1), length, dtype=torch.int64, device=input_ids.device)
    else:
        check_tensor("lengths", lengths)
        check_same_device("lengths", lengths, "input_ids", input_ids)
        check_lengths(lengths, batch, length, input_ids)
        ends = lengths.long()[:, None]
    noises = torch.minimum((ends.double() * noise_density + 0.5).long().clamp_min(1), (ends - 1).clamp_min(0))
    counts = (noises.double() / mean_span_length + 0.5).long().clamp_min(1)
    counts = torch.minimum(torch.minimum(counts, noises), ends - noises)
    # Pieces of text and of what is cut out take turns.
    step, span = torch.arange(length, device=ends.device), torch.arange(max(spans, 1), device=ends.device)
    most = max(noise, length - noise, 1), len(span)
    sizes = _random_pieces(seed, torch.cat([ends - noises, noises]), counts.repeat(2, 1), *most)
    text_end, cut_end = sizes.cumsum(1).view(2, batch, len(span))
    begins, stops = (
        ends.new_zeros((batch, length + 1)).scatter(1, (text_end + end).where(span < counts, length), 1)[:, :length]
        for end in (cut_end - sizes[batch:], cut_end)
    )
    cut = (begins - stops).cumsum(1)
    kept, spans_so_far = (step < ends).long() - cut, begins.cumsum(1)
    sentinels = first_sentinel_id + 1 - spans_so_far

    def laid_out(here: Tensor, width: int, fill: int, dtype: torch.dtype) -> Tensor:
        """(B, width): the tokens that are `here`, those before each span's beginning, then its sentinel."""
        last = width + (0 if eos_token_id is None else 1)
        out = torch.full((batch, last + 1), fill, dtype=dtype, device=ends.device)
        places = here.cumsum(1) - here + spans_so_far
        out = out.scatter(1, places.where(here == 1, last), input_ids.to(dtype))  # the last column is cut off again
        out = out.scatter(1, (places - 1).where(begins == 1, last), sentinels.to(dtype))
        if eos_token_id is not None:
            out = out.scatter(1, here.sum(1, keepdim=True) + counts, eos_token_id)
        return out[:, :last].contiguous()

    inputs = laid_out(kept, length - noise + spans, pad_token_id, input_ids.dtype)
    return inputs, laid_out(cut, noise + spans, tokens.IGNORED, torch.int64)


def _random_pieces(seed: Tensor, sizes: Tensor, counts: Tensor, largest: int, most: int) -> Tensor:
    """(R, most): sizes (R, 1), at most `largest`, divided at random into counts (R, 1) pieces of at least one, at most
    `most`; all ways are equally likely. Zeros behind them."""
    _, turn, _ = masking.masking_ids(seed, len(sizes), largest - 1, 0)
    number = torch.arange(largest, device=turn.device)
    turn = F.pad(turn, (0, 1)).where(number < sizes - 1, largest)
    last = turn.topk(most, dim=1, largest=False).values.gather(1, (counts - 2).clamp_min(0))
    ends = ((turn <= last) & (counts > 1)).long()
    return turn.new_zeros((len(sizes), most)).scatter_add(1, ends.cumsum(1) - ends, (number < sizes).long())


def sample_negatives(
    batch: int,
    length: int,
    num_negatives: int,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """For each step of each sequence, other steps of the same sequence: the distractors of wav2vec 2.0
    (arXiv:2006.11477) and CPC (arXiv:1807.03748).

    No two of a step's negatives are the same and none is the step itself; all sets of them are equally likely. One seed
    is drawn from the generator; what follows from it is the same on every device, and nothing waits for a GPU.

    Args:
        batch: B, the number of sequences.
        length: L, the number of steps of each, below 2^31.
        num_negatives: K, the number of negatives of a step.
        mask: (B, L) bool, the steps that take part, as those that are masked, or no padding; None: all.
        generator: the source of randomness; None: PyTorch's default one of the CPU.
        device: of the result; None: that of mask, or of the generator.

    Returns:
        (B, L, K) int64, rows of the (B L, D) features of all steps, as `info_nce` takes them as negative_ids: b L + l
        for step l of sequence b. A step whose sequence has fewer than K others has all of those, then -1, which is no
        negative; a step that does not take part has -1 only.

    Raises:
        TypeError: if a size is no integer, or mask no tensor.
        ValueError: if a size is negative or too large, or mask not (B, L) bool.
    """
    batch, length = check_size("batch", batch), check_size("length", length)
    num_negatives = check_size("num_negatives", num_negatives)
    if length >= 1 << 31:
        raise ValueError(f"length must be below 2^31, got {length}")
    check_memory("num_negatives", (batch, length, num_negatives), 8)
    if mask is not None:
        check_tensor("mask", mask)
        device = mask.device if device is None else device
        if mask.dtype != torch.bool or mask.shape != (batch, length):
            raise ValueError(f"mask must be bool of shape {(batch, length)}, got {mask.dtype} of {tuple(mask.shape)}")
    with mode_of(mask):
        seed = draw_seed(generator, device)
    if mask is not None:
        check_same_kind("mask", mask, "the result", seed)
        mask = mask.to(seed.device)
    return tokens.sample_negatives(seed, mask, batch, length, num_negatives)


def _check_input_ids(input_ids: Tensor, shape: str, least: int, most: int | None = None) -> None:
    check_tensor("input_ids", input_ids)
    if input_ids.dtype not in _INTEGERS:
        raise ValueError(f"input_ids must have dtype torch.int64 or torch.int32, got {input_ids.dtype}")
    if input_ids.dim() < least or (most is not None and input_ids.dim() > most):
        raise ValueError(f"input_ids must have shape {shape}, got {tuple(input_ids.shape)}")


def _check_token(name: str, token: int, input_ids: Tensor) -> int:
    token = check_integer(name, token)
    largest = torch.iinfo(input_ids.dtype).max
    if not 0 <= token <= largest:
        raise ValueError(f"{name} must be from 0 to {largest}, the largest {input_ids.dtype}, got {token}")
    return token


def _check_beside(name: str, x: Tensor, input_ids: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, x)
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.shape != input_ids.shape:
        raise ValueError(f"{name} must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(x.shape)}")
    check_same_device(name, x, "input_ids", input_ids)
