"""The Triton kernels of log-sum-exps: values against the float64 formulas, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from fastssl.kernels import contrastive
from fastssl.kernels.common.launch import DTYPES
from fastssl.kernels.contrastive import sums as of_sums
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel, product_cases
from tests.gpu.triton_checks.common.kernels import (
    NO_EXCLUDE,
    NO_FACTORS,
    NO_KEPT,
    NO_ROWS,
    NO_RUNNING,
    PADDED,
    POINTERS,
    STEPS,
    accumulate_cases,
    collect_cases,
)
from tests.gpu.triton_checks.common.numerics import DEVICE, INTERPRETED, THOROUGH, poisoned, random_gradient
from tests.gpu.triton_checks.common.tiles import TileTests, both, some_excluded

FORWARD = Kernel(of_sums._forward_tile, POINTERS, multiples=(*PADDED, *STEPS, "D"), needs=of_sums._forward_needs)
MERGE = Kernel(of_sums._merge, POINTERS, multiples=PADDED)
SUMS = {
    "self": {"EXCLUDE": "diagonal", "SYMMETRIC": True, **NO_EXCLUDE, "aligned": None},
    "pair": {"EXCLUDE": "row", "SYMMETRIC": False, "aligned": None},
    "rows": {"EXCLUDE": "row", "SYMMETRIC": False, "aligned": None, "column_tops": None, "column_sums": None},
}
WEIGHTS = {
    "self": {"WEIGHT": "both", "EXCLUDE": "diagonal", "bias": None, "aligned": None, **NO_EXCLUDE, **NO_RUNNING},
    "pair": {"WEIGHT": "both", "EXCLUDE": "row", "bias": None, "aligned": None, **NO_RUNNING},
    "dy": {"WEIGHT": "column", "EXCLUDE": "column", "bias": None, "aligned": None, **NO_ROWS, **NO_RUNNING},
    "softmax": {"WEIGHT": "softmax", "EXCLUDE": "row", "bias": None, "aligned": None, "losses": None, **NO_FACTORS},
}

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.one_configuration(of_sums._forward_tile)


def sum_cases(
    variants: Mapping[str, Mapping[str, Any]], capability: int, sweep: bool, largest: str | None = None
) -> Iterator[Case]:
    tiles = {"T": 64}, {"T": 128}
    variants = {name: {**NO_KEPT, **constants} for name, constants in variants.items()}
    yield from product_cases(FORWARD, variants, capability, sweep, tiles, float32_shapes=tiles[:1], largest=largest)


def merge_cases(variant: str, absent: Mapping[str, None], slots: int, capability: int, sweep: bool) -> Iterator[Case]:
    if sweep or capability == 80:
        constants = {"SYMMETRIC": slots == 2, "T": 64, "SLOTS": slots * of_sums._BAND, "BR": 16, **absent}
        yield Case(MERGE, variant, capability, "float32", "fp32", tuple(constants.items()))


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    yield from sum_cases(SUMS, capability, sweep)
    yield from accumulate_cases(WEIGHTS, capability, sweep)
    factors = {"tops": None, "totals": None, "shift": None, "total": None}
    yield from collect_cases("both", factors, capability, sweep)
    yield from collect_cases("softmax", {"scale": None, "peak": None, "share": None}, capability, sweep)
    for variant, slots in (("self", 2), ("pair", 4)):
        yield from merge_cases(variant, {"aligned": None, "weight": None, "loss": None}, slots, capability, sweep)


class TestLogsumexp(TileTests):
    operations = "similarity", "pair", "self"
    of_one_set = ("self",)
    quickest = "similarity", "pair"

    def launch(self, operation, x, y, scale, bias, exclude, precision):
        if operation == "similarity":
            total, shift, weighted, kept = contrastive.similarity_logsumexp(x, y, scale, exclude, True, 0, precision)
            again, same, none, _ = contrastive.similarity_logsumexp(x, y, scale, exclude, False, 0, precision)
            assert none.shape == (0, x.shape[1]) and weighted.dtype == torch.float32
            torch.testing.assert_close(same, shift, equal_nan=True)
            torch.testing.assert_close(again, total, rtol=1e-5, atol=0, equal_nan=True)
            g = random_gradient(x.shape[0]) / total
            backward = contrastive.similarity_logsumexp_backward
            dx, dy, dscale = backward(g, x, y, scale, exclude, shift, weighted, kept, True, precision)
            same, none, share = backward(g, x, y, scale, exclude, shift, weighted, kept, False, precision)
            assert none.shape == (0, x.shape[1]) and none.dtype == y.dtype
            assert torch.equal(same.nan_to_num(), dx.nan_to_num())
            assert torch.equal(share.nan_to_num(), dscale.nan_to_num())
        elif operation == "pair":
            *sums, kept = contrastive.pair_logsumexp(x, y, scale, exclude, 0, precision)
            total, shift = torch.cat(sums[::2]), torch.cat(sums[1::2])
            g = random_gradient(total.shape[0]) / total
            dx, dy, dscale = contrastive.pair_logsumexp_backward(
                *g.split((x.shape[0], y.shape[0])), x, y, scale, exclude, *sums[1::2], kept, precision
            )
        else:
            total, shift, kept = contrastive.self_logsumexp(x, scale, 0, precision)
            g = random_gradient(total.shape[0]) / total
            dx, dscale = contrastive.self_logsumexp_backward(g, x, scale, shift, kept, precision)
            dy = torch.zeros_like(y)
        assert total.dtype == shift.dtype == dscale.dtype == torch.float32
        assert dx.dtype == x.dtype and dy.dtype == y.dtype and dx.is_contiguous() and dy.is_contiguous()
        return {"loss": total.double().log() + shift, "dx": dx, "dy": dy, "dscale": dscale, "shift": shift}

    def losses(self, operation, S, bias):
        loss, shift = S.logsumexp(1), S.amax(1)
        if operation == "pair":
            loss, shift = torch.cat([loss, S.logsumexp(0)]), torch.cat([shift, S.amax(0)])
        return {"loss": loss, "shift": shift}

    @pytest.mark.parametrize("dim", [24, 140])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_reaches_what_it_touches(self, value, dim):
        x, y = both(70, 33, dim)
        x.abs_(), y.abs_()  # lest S be minus infinity, which is no NaN in a sum
        x[5] = 1.0
        x[5, 7] = value
        x[6:9] = 0
        result = self.fused("similarity", x, y, 2.0, 0.0, None, "float32")
        assert result["loss"].isnan().nonzero().tolist() == [[5]]
        assert result["dy"].isnan().all() and result["dscale"].isnan()
        assert result["dx"].isnan().any(1).nonzero().tolist() == [[5]]
        result = self.fused("pair", x, y, 2.0, 0.0, None, "float32")
        assert result["loss"].isnan().nonzero().flatten().tolist() == [5, *range(70, 103)]
        assert result["dx"].isnan().all() and result["dy"].isnan().all() and result["dscale"].isnan()
        result = self.fused("self", x, y, 2.0, 0.0, None, "float32")
        assert result["loss"].isnan().all() and result["dx"].isnan().all() and result["dscale"].isnan()


@pytest.mark.parametrize("dim,precision", [(24, "bfloat16"), (24, "float32"), (140, "float32")])
def test_excludes_every_column(dim, precision):
    x, y = (z.to(DTYPES[precision]).float() for z in both(33, 1, dim))
    exclude = torch.zeros(33, dtype=torch.int64, device=DEVICE)
    exclude[4] = 7
    s = torch.tensor(2.0, device=DEVICE)
    row, row_shift, column, column_shift, kept = contrastive.pair_logsumexp(x, y, s, exclude, 0, precision)
    others = [contrastive.similarity_logsumexp(x, y, s, exclude, weigh, 0, precision) for weigh in (True, False)]
    only = 2 * (x[4] @ y[0])
    for total, shift in ((row, row_shift), *(sums[:2] for sums in others)):
        assert total.nonzero().tolist() == [[4]]
        assert total[4] - 1 < 1e-6 and (shift[4] - only).abs() < 1e-5 and shift.count_nonzero() == 1
    assert (column - 1).abs() < 1e-6 and (column_shift - only).abs() < 1e-5
    assert others[0][2].any(1).nonzero().tolist() == [[4]]
    # The total of such a row is constant: a gradient of any finite size leads nowhere.
    g = torch.ones(33, device=DEVICE)
    dx, dy, _ = contrastive.pair_logsumexp_backward(
        g, g[:1], x, y, s, exclude, row_shift, column_shift, kept, precision
    )
    assert dx.any(1).nonzero().tolist() == [[4]]
    torch.testing.assert_close(dy[0], 2 * 2 * x[4])
    total, shift, kept = contrastive.self_logsumexp(x[:1], s, 0, precision)
    assert total == shift == 0
    dz, dscale = contrastive.self_logsumexp_backward(g[:1], x[:1], s, shift, kept, precision)
    assert not dz.any() and dscale == 0


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_of_any_size(precision):
    x, y = both(33, 40, 24)
    s = torch.tensor(2.0, device=DEVICE)
    *sums, kept = contrastive.pair_logsumexp(x, y, s, None, 0, precision)
    g, h = random_gradient(33), random_gradient(40)
    expected = contrastive.pair_logsumexp_backward(g, h, x, y, s, None, sums[1], sums[3], kept, precision)
    for size in (2.0**-60, 2.0**60, 0.0):
        scaled = contrastive.pair_logsumexp_backward(
            size * g, size * h, x, y, s, None, sums[1], sums[3], kept, precision
        )
        for mine, other in zip(scaled, expected, strict=True):
            assert torch.equal(mine, size * other)


def test_two_tiles_of_a_program(monkeypatch):
    """They give what one gives, in bands of 2 and of 3."""
    (x, y), z = both(130, 300, 24, "float16"), both(330, 1, 24, "float16")[0]
    s, exclude = torch.tensor(10.0, device=DEVICE), some_excluded(130, 300)
    monkeypatch.setattr(of_sums, "_BAND", 3)

    def sums(tiles: int) -> list[Tensor]:
        configs = [triton.Config({"BK": 32, "TILES": tiles}, num_warps=4, num_stages=3)]
        monkeypatch.setattr(of_sums._forward_tile, "configs", configs)
        with poisoned():
            loss = contrastive.nt_xent(*z.chunk(2), s, False, 0, "float16")[0]
            return [loss, *contrastive.pair_logsumexp(x, y, s, exclude, 0, "float16")[:4]]

    for mine, other in zip(sums(2), sums(1), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("m,n", [(192, 300), (330, 200), (700, 40), (40, 700)] if THOROUGH else [(130, 300), (300, 65)])
def test_bands(m, n, monkeypatch):
    """Distances in several launches, the last one shorter, give what a single launch gives."""
    x, y = both(m, n, 32)
    inputs = x, y, torch.tensor(10.0, device=DEVICE)
    exclude = some_excluded(m, n)

    def sums() -> list[Tensor]:
        rows = contrastive.similarity_logsumexp(*inputs, exclude, False, 0, "float32")[:2]
        square = contrastive.self_logsumexp(x, inputs[2], 0, "float32")[:2]
        return [*contrastive.pair_logsumexp(*inputs, exclude, 0, "float32")[:4], *rows, *square]

    expected = sums()
    for band in (2, 3) if THOROUGH else (2,):
        monkeypatch.setattr(of_sums, "_BAND", band)
        for mine, other in zip(sums(), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
