"""Weights of wide rows in several blocks: the sums are those of one block."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from fastssl.kernels import sigmoid
from fastssl.kernels.common import blocks
from tests.gpu.triton_checks.common.compile_gate import Case, product_cases
from tests.gpu.triton_checks.common.kernels import NO_EXCLUDE, WEIGH, in_blocks
from tests.gpu.triton_checks.common.numerics import DEVICE, poisoned
from tests.gpu.triton_checks.common.tiles import both, some_excluded
from tests.gpu.triton_checks.contrastive.kept import both_passes
from tests.gpu.triton_checks.contrastive.logsumexp import WEIGHTS

SIZES = {"pair": (300, 520), "similarity": (520, 300), "softplus": (520, 300), "self": (520, 520)} | dict.fromkeys(
    ("nt_xent", "clip_loss", "info_nce"), (520, 520)
)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    """What info_nce leaves out; the other weights are compiled for those that launch them."""
    own = {**NO_EXCLUDE, "EXCLUDE": "diagonal"}
    variants = {f"{name}_own": in_blocks({**WEIGHTS[name], **own}) for name in ("dy", "softmax")}
    yield from product_cases(WEIGH, variants, capability, sweep)


def run(name: str, x: Tensor, y: Tensor) -> list[Tensor]:
    with poisoned():
        if name != "softplus":
            return both_passes(name, x, y, 0, "bfloat16", lambda kept: kept)
        scale, bias = (torch.tensor(value, device=DEVICE) for value in (5.0, -3.0))
        return list(sigmoid.similarity_softplus(x, y, scale, bias, some_excluded(len(x), len(y)), True, "bfloat16"))


@pytest.mark.parametrize("name", SIZES)
def test_blocks(name, monkeypatch):
    x, y = both(*SIZES[name], 140, "bfloat16")
    expected = run(name, x, y)
    monkeypatch.setattr(blocks, "WORKSPACE", 2 * 256 * 256)
    monkeypatch.setattr(blocks, "DIAGONAL", 256)
    launches = []
    weigh = blocks.add_product

    def add_product(out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        launches.append(left.shape)
        weigh(out, left, right, first)

    monkeypatch.setattr(blocks, "add_product", add_product)
    results = run(name, x, y)
    assert len(launches) >= 6 and all(max(shape) <= 256 for shape in launches)
    for mine, other in zip(results, expected, strict=True):
        assert (mine - other).norm() <= 2e-3 * other.norm()  # gradients are rounded to bfloat16


@pytest.mark.parametrize("rows,columns", [(128, 128), (32768, 32768), (512, 10**6), (10**6, 384), (10**6, 10**6)])
@pytest.mark.parametrize("size,symmetric", [(2, False), (4, False), (2, True)])
def test_blocks_fit_the_workspace(rows, columns, size, symmetric):
    sides = blocks.blocks_of(rows, rows if symmetric else columns, size, symmetric)
    for slices, count in zip(sides, (rows, rows if symmetric else columns), strict=True):
        assert slices[0].start == 0 and slices[-1].start < count <= slices[-1].stop
        assert all(a.stop == b.start and a.stop - a.start == b.stop - b.start for a, b in pairwise(slices))
        assert slices[0].stop % blocks.SIDE == 0
    height, width = (slices[0].stop for slices in sides)
    assert size * height * width <= blocks.WORKSPACE
    if not symmetric and len(list(product(*sides))) > 1:  # and no smaller than they need be
        assert size * height * width > blocks.WORKSPACE / 4
