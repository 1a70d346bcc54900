"""Weights of both sides, with one exponential each and with two: values against float64, and what `survey` chooses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastssl.kernels.common import weights as kernels
from fastssl.kernels.common.accumulate import accumulate, accumulate_both
from fastssl.kernels.common.collect import collect_sums
from fastssl.kernels.common.launch import DTYPES
from fastssl.kernels.common.rows import pad
from fastssl.kernels.common.weights import Factors, Weights
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.kernels import POINTERS
from tests.gpu.triton_checks.common.numerics import DEVICE, poisoned
from tests.gpu.triton_checks.common.tiles import both, some_excluded

SURVEY = Kernel(kernels.survey, POINTERS)
NAN = float("nan")


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    if sweep or capability == 80:
        one_side = dict.fromkeys(("row_shift", "row_factor", "row_relative"))
        for variant, absent in (("pair", {}), ("self", one_side), ("dy", {**one_side, "column_relative": None})):
            constants = ("BLOCK", kernels.SURVEYED), *absent.items()
            yield Case(SURVEY, variant, capability, "float32", "fp32", constants, 16)


def random_factors(shift: Tensor) -> Factors:
    generator = torch.Generator().manual_seed(len(shift))
    return Factors(shift.float().to(DEVICE), torch.randn(len(shift), generator=generator).to(DEVICE))


def weights_of(rows: Factors | None, columns: Factors | None) -> Weights:
    sizes = tuple(0 if side is None else len(side.shift) for side in (rows, columns))
    none = torch.empty(0)
    return Weights(none, none, sizes, none, "bfloat16", "both", None, rows=rows, columns=columns)


@pytest.mark.parametrize("offset", [0.0, -1e6])
@pytest.mark.parametrize("spread,common", [(0, True), (39, True), (41, False), (NAN, True), (float("inf"), False)])
def test_survey(spread, common, offset):
    """A row whose shift is NaN has no exponential that is not, whichever shift is taken."""
    rows = random_factors(offset + torch.linspace(0, 20, 3) * (spread > 20))
    columns = random_factors(offset + torch.linspace(0, 20, kernels.SURVEYED + 3) * (spread > 0))
    columns.shift[-1] = offset + spread
    rows.factor[1] = -123.0
    for sides in ((rows, columns), (columns, rows), (columns, columns)):
        pairs = weights_of(*sides)
        with poisoned():
            plain, related = (pairs.surveyed(relate) for relate in (False, True))
        assert related.surveyed(False) is related and (related.rows is related.columns) == (sides[0] is sides[1])
        assert plain.rows is sides[0] and plain.columns is sides[1]
        peak, middle = related.peak
        assert plain.peak == peak == max(side.factor.abs().max() for side in sides)
        assert middle.isnan() != common
        if spread == 39:
            assert middle == offset + 19.5
        for side, mine in zip(sides, (related.rows, related.columns), strict=True):
            assert mine.shift is side.shift
            expected = side.factor * torch.exp(middle - side.shift) if common else side.factor
            torch.testing.assert_close(mine.factor, expected, equal_nan=True)


def test_survey_of_one_side():
    factors = random_factors(torch.zeros(5))
    pairs = weights_of(None, factors)._replace(weight="column")
    with poisoned():
        surveyed = pairs.surveyed(True)
    assert surveyed.columns is factors and surveyed.rows is None and surveyed.peak == factors.factor.abs().max()
    softmax = weights_of(factors, None)._replace(weight="softmax")
    assert softmax.surveyed(True) is softmax


@pytest.mark.parametrize("by,length", [("row", 1.0), ("partner", 1.0), ("diagonal", 6.0)])
@pytest.mark.parametrize("spread", [39.0, 60.0])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_both_sides(precision, spread, by, length):
    """Sums of weights whose shifts have this spread; and with a row of NaN, which is in all of its sums."""
    m, n = (70, 140) if by == "row" else (140, 140)
    x, y = both(m, n, 24, precision, length)
    y = y if by == "row" else x
    exclude = some_excluded(m, n)
    i, j = torch.arange(m, device=DEVICE)[:, None], torch.arange(n, device=DEVICE)
    left_out = {"row": exclude[:, None] == j, "diagonal": i == j, "partner": (i == j) | ((i - j).abs() == n // 2)}[by]
    S = (x.double() @ y.double().T).masked_fill(left_out, float("-inf"))
    tops = torch.cat([S.amax(side) for side in (1, 0)])
    scale = (spread / (tops.max() - tops.min())).float()
    S *= scale.double()
    rows, columns = (random_factors(S.amax(side)) for side in (1, 0))
    columns = columns if by == "row" else rows
    left = right = pad(x, precision)
    if by == "row":
        right = pad(y, precision)
    options = {"exclude": exclude if by == "row" else None, "rows": rows, "columns": columns}
    pairs = Weights(left, right, (m, n), scale, precision, "both", by, **options)

    def sums() -> list[Tensor]:
        with poisoned():
            aligned = scale.new_empty(m) if by == "partner" else None
            of_both = (accumulate(pairs, aligned=aligned),) if by == "partner" else accumulate_both(pairs)
            assert all(of.peak[1].isnan() == (spread > 40) for of in of_both)
            one = scale.new_ones(())
            return [collect_sums(of, z, one, torch.float32).gradient for of, z in zip(of_both, (x, y), strict=False)]

    W = sum(
        side.factor.double().unsqueeze(axis) * torch.exp(S - side.shift.double().unsqueeze(axis))
        for side, axis in ((rows, 1), (columns, 0))
    )
    for mine, weights, z in zip(sums(), (W, W.T), (y, x), strict=False):
        exact = weights @ z.double()
        assert (mine - exact).norm() <= torch.finfo(DTYPES[precision]).eps * (weights.abs() @ z.double().abs()).norm()
    rows.shift[3] = NAN
    assert sums()[0][3].isnan().all()
