"""KoLeo's Triton kernel: neighbours against float64, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.koleo import TILE, nearest_rows, nearest_tile
from fastssl.ops import koleo
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.launches import count_launches
from tests.gpu.triton_checks.common.numerics import DEVICE, INTERPRETED, THOROUGH, poisoned

_KERNEL = Kernel(nearest_tile, {"z": "fp32", "best": "i64"}, multiples=("D",))


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    for topk in (1, 3) if sweep else (1,):
        yield Case(_KERNEL, f"topk{topk}", capability, "float32", "fp32", (("TOPK", topk), *TILE.items()))


def _rows(count: int, dim: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(1, dim, generator=generator) + spread * torch.randn(count, dim, generator=generator)
    return F.normalize(x, dim=1).to(DEVICE)


def _nearest(z: Tensor, *options: int) -> Tensor:
    with poisoned():
        return nearest_rows(z, *options)


@pytest.mark.parametrize(
    "count, dim, first, rows, topk, size",
    [
        (2, 3, 0, 2, 1, 2),
        (64, 24, 0, 64, 1, 64),
        (65, 70, 0, 65, 3, 65),
        (140, 24, 0, 140, 1, 140),
        (200, 24, 50, 90, 2, 200),  # 4 blocks of rows: half way round every tile meets its transpose
        (200, 24, 199, 1, 1, 200),
        (210, 24, 0, 210, 6, 7),
        (210, 24, 60, 30, 1, 70),
        *([(1000, 300, 0, 1000, 2, 1000), (3000, 64, 100, 2000, 1, 1500)] if THOROUGH else []),
    ],
)
def test_nearest(count, dim, first, rows, topk, size):
    for spread in (1.0, 0.01):
        z = _rows(count, dim, spread)
        nearest = _nearest(z, first, rows, topk, size)
        own, others = torch.arange(first, first + rows, device=DEVICE)[:, None], torch.arange(count, device=DEVICE)
        S = z[first : first + rows].double() @ z.double().T
        S.masked_fill_((own // size != others // size) | (own == others), -2)
        torch.testing.assert_close(S.gather(1, nearest), S.topk(topk).values, rtol=0, atol=1e-6)
        assert (nearest.sort(1).values.diff(dim=1) > 0).all()  # none twice


def test_takes_the_first_of_equally_near_rows():
    z = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 0], [1, 0], [0, 1]], device=DEVICE)
    assert _nearest(z, 0, 6, 2, 6).tolist() == [[1, 2], [3, 4], [5, 0], [1, 4], [1, 3], [2, 0]]
    assert _nearest(z[:1].expand(150, 2), 0, 150, 1, 150).flatten().tolist() == [1] + [0] * 149


def test_negative_products():
    """Of a group that lies in two tiles."""
    z = _rows(66, 2)
    z[63:] = torch.tensor([[1.0, 0], [-0.5, 0.75**0.5], [-0.7, -(0.51**0.5)]], device=DEVICE)
    assert _nearest(z, 63, 3, 2, 3).tolist() == [[64, 65], [65, 63], [64, 63]]


def test_nan_is_the_nearest():
    z = _rows(130, 16)
    z[70, 3] = float("nan")
    nearest = _nearest(z, 0, 130, 2, 130)
    assert (nearest[:, 0] == 70).sum() == 129 and nearest[70].tolist() == [0, 1]
    assert (nearest[:70, 1] != 70).all()


def test_same_bits_and_no_rows():
    z = _rows(200, 24)
    assert torch.equal(_nearest(z, 0, 200, 2, 200), _nearest(z, 0, 200, 2, 200))
    assert _nearest(z, 0, 0, 2, 200).shape == (0, 2)


@pytest.mark.skipif(not INTERPRETED, reason="launches are counted in the interpreter")
@pytest.mark.parametrize("topk", [1, 3])
def test_launches(topk):
    z = _rows(128, 64)
    assert count_launches(lambda: nearest_rows(z, 0, 128, topk, 128)) == topk + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operation(dtype):
    x = torch.randn(130, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    for options in ((0, 130, 2, 65, 1e-8), (30, 70, 1, 130, 0.1)):
        loss, nearest = koleo._forward(koleo._find_on_gpu, x, *options)
        expected, right = koleo._forward(koleo._find, x, *options)
        assert torch.equal(nearest, right) and torch.equal(loss, expected)
