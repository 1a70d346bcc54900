"""Sinkhorn-Knopp's Triton kernels: values against the portable code in float64, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fastssl.kernels import distillation
from fastssl.kernels.distillation import sinkhorn as kernels
from fastssl.ops.distillation import sinkhorn as ops
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.numerics import DEVICE, far_apart, poisoned

_POINTERS = {
    "logits": "rows",
    **dict.fromkeys(("center", "tops", "totals", "inverses", "output", "sums"), "fp32"),
}
_VARIANTS = {
    kernels.sum_exponentials: ({"": {}}, kernels.BLOCK, kernels.WARPS),
    kernels.sum_columns: (
        {"": {}, "logits": {"center": None, "tops": None, "inverses": None, "scale": None}},
        kernels.BLOCK,
        kernels.WARPS,
    ),
    kernels.normalise: (
        {"": {"output": None}, "output": {"tops": None, "inverses": None}},
        kernels.ROW,
        kernels.ROW_WARPS,
    ),
}


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    selected = {90: ("bf16",), 120: ("fp32",)}.get(capability, ())
    for function, (variants, sizes, warps) in _VARIANTS.items():
        kernel = Kernel(function, _POINTERS, ("scale",), ("K", "stride"))
        for rows in ("fp32", "bf16", "fp16") if sweep else selected:
            for variant, absent in variants.items():
                yield Case(kernel, variant, capability, "float32", rows, tuple({**sizes, **absent}.items()), warps)


def _logits(rows: int, columns: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * rows + columns)
    return (scale * torch.randn(rows, columns, generator=generator)).to(dtype).to(DEVICE)


def _all(module, logits: Sequence[Tensor], center: Tensor, temperature: float) -> dict[str, Tensor]:
    """What the four operations find; the first as the center that it leads to."""
    prefix = "_" if module is ops else ""

    def call(name: str, *arguments):
        return getattr(module, prefix + name)(*arguments)

    with poisoned():
        total, top = call("column_logsumexp", logits, temperature)
        center_of_columns = top + temperature * total.log()
        assert (total[center_of_columns.isfinite()] >= 1).all()  # top is the largest
        return {
            "center": center_of_columns,
            "assignment_sums": call("assignment_sums", logits, center, temperature),
            "column_sums": call("column_sums", logits),
            **{f"assignments{i}": call("assignments", x, center, temperature) for i, x in enumerate(logits)},
        }


def _check(*logits: Tensor, temperature: float = 0.3, center: Tensor | None = None) -> dict[str, Tensor]:
    if center is None:
        center = _logits(1, logits[0].shape[1], seed=9)[0]
    ours = _all(distillation, logits, center, temperature)
    exact = _all(ops, [x.double() for x in logits], center.double(), temperature)
    for name, x in exact.items():
        assert ours[name].dtype == torch.float32 and ours[name].shape == x.shape, name
        size = max([y.abs().nan_to_num(0, 0, 0).max().item() for y in logits if y.numel()], default=0) + temperature
        floor = 3e-6 * (size if name in ("center", "column_sums") else 1e-3)
        torch.testing.assert_close(ours[name].double(), x, rtol=2e-5, atol=floor, equal_nan=True, msg=name)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 255), (9, 513), (67, 30), (2, 4097)])
def test_edges_of_tiles(rows, columns, dtype):
    _check(_logits(rows, columns, dtype))


def test_rows_of_several_matrices():
    logits = _logits(50, 37)
    parts = _check(logits[:40], logits[:0], logits[40:])
    whole = _check(logits)
    for name in ("center", "assignment_sums", "column_sums"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)


def test_no_rows():
    found = _check(_logits(0, 9))
    assert not found["assignment_sums"].any() and not found["column_sums"].any()


@pytest.mark.parametrize("programs, slots", [(0, 1), (1, 3)])
def test_slots_share_out_the_rows(programs, slots, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    logits = _logits(70, 40)
    assert kernels._slots(logits, 1).shape == (1, slots, 40)
    _check(logits)


def test_strides_and_far_rows():
    logits = _logits(40, 66)
    _check(logits.T.contiguous().T, logits[::2].expand(20, 66), logits[:3, :1].expand(3, 66), far_apart(logits[:5]))


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_exponentials_that_overflow(scale):
    _check(scale * (10 * torch.eye(70, device=DEVICE) + _logits(70, 70, scale=1e-3)), temperature=0.04)


def test_maxima_that_rise_with_every_tile():
    ramp = torch.linspace(-30, 30, 40, device=DEVICE)[:, None] + torch.linspace(-40, 20, 4200, device=DEVICE)
    _check(ramp[:9], temperature=0.5)
    _check(ramp[:, ::64].flip(0, 1), temperature=0.5)


def test_infinities_and_nan_stay_in_their_rows_and_columns():
    logits = _logits(40, 600, scale=0.2)
    logits[0, :550] = logits[1:9, 0] = float("-inf")
    _check(logits)
    logits[5] = logits[:, 7] = float("-inf")  # a row without a prototype, a prototype without a row
    _check(logits)
    for poison in (float("nan"), float("inf")):
        logits = _logits(40, 600)
        logits[3, 65] = poison
        found = _check(logits)
        assert found["center"].isnan().nonzero().flatten().tolist() == [65]
        assert found["assignments0"].isnan().all(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("temperature", [1e-45, 1e30])
def test_extreme_temperatures(temperature):
    _check(_logits(20, 30), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_that_are_none(temperature):
    found = _all(distillation, [_logits(5, 6)], _logits(1, 6)[0], temperature)
    assert found["center"].isnan().all() and found["assignment_sums"].isnan().all()


def test_same_bits_every_time():
    inputs = [_logits(70, 600)], _logits(1, 600)[0], 0.04
    first, second = (_all(distillation, *inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
