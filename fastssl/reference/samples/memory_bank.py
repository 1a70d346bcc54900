"""Inputs for a queue of keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastssl.reference.memory_bank import enqueue_
from fastssl.reference.samples._inputs import generator, sized
from fastssl.reference.samples._spec import EDGE, TRACED, BadInput, OpSpec, Sample


def _samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    at = torch.tensor(3, device=device)
    for size, count, dim in [(1, 1, 1), (5, 3, 8), (64, 65, 129), (7, 7, 64), (2, 9, 4), (300, 40, 16)]:
        for normalize in (False, True):
            label = f"{count} of {dim} into {size}, {normalize}"
            yield Sample(label, (rows(size, dim), at, rows(count, dim), normalize), {}, sized(size, count, dim))
    keys, new_keys = rows(9, 24), rows(4, 24)
    for position in (8, 9, -7, 10**12):
        yield Sample(f"position={position}", (keys, torch.tensor(position, device=device), new_keys), tags={EDGE})
    yield Sample("transposed", (rows(24, 9).T, at, rows(24, 4).T, True), tags={TRACED})
    yield Sample("sliced", (rows(18, 50)[::2, 1:25], at, rows(8, 50)[1::2, 25:49], True), tags={TRACED})
    yield Sample("expanded keys", (keys, at, rows(1, 24).expand(4, 24)), tags={TRACED})
    if dtype != torch.float64:
        yield Sample("float32 keys", (keys, at, new_keys.float(), True), tags={TRACED})
    yield Sample("zero row", (keys, at, torch.zeros_like(new_keys), True), tags={EDGE})
    yield Sample("empty", (keys, at, new_keys[:0]), tags={TRACED})


def _bad_inputs() -> Iterator[BadInput]:
    keys, at, new_keys = torch.randn(5, 3), torch.tensor(0), torch.randn(2, 3)

    def bad(label: str, match: str, error: type[Exception] = ValueError, **changes: object) -> BadInput:
        args = tuple({"keys": keys, "position": at, "new_keys": new_keys, **changes}.values())
        return BadInput(label, args, {}, error, match)

    yield bad("keys list", "keys must be a Tensor, got list", TypeError, keys=keys.tolist())
    yield bad("keys integers", "keys must have a floating.*int64", keys=keys.long())
    yield bad("no keys", r"keys must have at least one row, got shape \(0, 3\)", keys=keys[:0])
    yield bad("keys expanded", "keys must have no two elements in one place", keys=keys[:1].expand(5, 3))
    yield bad("position number", "position must be a Tensor, got int", TypeError, position=0)
    yield bad("position float", "position must be 0-d int64, got torch.float32", position=at.float())
    yield bad("position vector", r"position must be 0-d int64.*\(1,\)", position=at[None])
    yield bad("new keys flat", r"new_keys must have shape \(B, D\), got \(3,\)", new_keys=new_keys[0])
    yield bad("new keys narrow", r"new_keys must have shape \(B, 3\).*got \(2, 2\)", new_keys=new_keys[:, :2])
    yield bad(
        "new keys elsewhere",
        "keys and new_keys must be on the same device, got cpu and meta",
        new_keys=new_keys.to("meta"),
    )


OpSpec("enqueue_", "memory_bank", enqueue_, _samples, _bad_inputs, written=(0, 1), multiplies=False, autocast="inputs")
