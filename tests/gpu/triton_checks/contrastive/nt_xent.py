"""NT-Xent's Triton kernels: values against the float64 formula, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor

from fastssl import reference
from fastssl.kernels import contrastive as kernels
from fastssl.kernels.common import accumulate
from fastssl.kernels.common.launch import DTYPES
from fastssl.kernels.contrastive import sums
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.kernels import (
    NO_EXCLUDE,
    NO_RUNNING,
    PADDED,
    POINTERS,
    PREPARE,
    accumulate_cases,
    row_cases,
)
from tests.gpu.triton_checks.common.launches import count_launches
from tests.gpu.triton_checks.common.numerics import (
    DEVICE,
    INTERPRETED,
    PRECISIONS,
    assert_as_accurate,
    far_apart,
    poisoned,
    random_gradient,
)
from tests.gpu.triton_checks.contrastive.logsumexp import merge_cases, sum_cases

module = import_module("fastssl.kernels.contrastive.nt_xent")  # which a function of that name has replaced
PROJECT = Kernel(module._project, POINTERS, multiples=PADDED)
SUMS = {"nt_xent": {"EXCLUDE": "diagonal", "SYMMETRIC": True, **NO_EXCLUDE}}
WEIGHTS = {"nt_xent": {"WEIGHT": "both", "EXCLUDE": "partner", "bias": None, **NO_EXCLUDE, **NO_RUNNING}}
SIZES = [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (33, 127), (64, 130), (65, 64), (129, 16), (192, 40), (3, 1100)]

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.few_programs(module)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    yield from sum_cases(SUMS, capability, sweep, largest="nt_xent")
    yield from accumulate_cases(WEIGHTS, capability, sweep, largest="nt_xent")
    for normalize in (True, False) if sweep else (True,):
        for kernel, absent in ((PREPARE, {}), (PROJECT, {"pull": None})):
            yield from row_cases(kernel, "", {"NORMALIZE": normalize, **absent}, capability, sweep)
    yield from merge_cases("nt_xent", {"weight": None}, 2, capability, sweep)


def rows(batch: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000 * batch + dim)
    z1, z2 = torch.randn(2, batch, dim, generator=generator)
    return z1.to(DEVICE, dtype), z2.to(DEVICE, dtype)


def fused(z1: Tensor, z2: Tensor, g: Tensor, scale: float, normalize: bool = True, precision: str = "float32"):
    """(loss, dz, dscale) of the launchers; what they leave unwritten is NaN."""
    s = torch.tensor(float(scale), device=DEVICE)
    with poisoned():
        loss, shift, total, kept = kernels.nt_xent(z1, z2, s, normalize, 0, precision)
        dz1, dz2, dscale = kernels.nt_xent_backward(g, z1, z2, s, shift, total, kept, normalize, precision)
    assert loss.dtype == shift.dtype == total.dtype == dscale.dtype == torch.float32
    assert dz1.dtype == dz2.dtype == z1.dtype and dz1.is_contiguous() and dz2.is_contiguous()
    return loss, torch.cat([dz1, dz2]), dscale


def eager(z1: Tensor, z2: Tensor, g: Tensor, scale: float, normalize: bool = True, dtype: torch.dtype | None = None):
    """(loss, dz, dscale) of the naive formula in `dtype`."""
    z1, z2 = (z.detach().to(dtype or z.dtype).requires_grad_() for z in (z1, z2))
    s = torch.tensor(scale, device=DEVICE, dtype=torch.promote_types(z1.dtype, torch.float32), requires_grad=True)
    loss = reference.contrastive.nt_xent(z1, z2, temperature=1 / s, normalize=normalize, reduction="none")
    dz1, dz2, dscale = torch.autograd.grad(loss, (z1, z2, s), g.to(loss.dtype))
    return loss.detach(), torch.cat([dz1, dz2]), dscale


def compare(z1: Tensor, z2: Tensor, g: Tensor, scale: float, normalize: bool = True, precision: str = "float32"):
    """Errors against float64 are at most twice eager's in the dtype of the products, and rounding."""
    ours = fused(z1, z2, g, scale, normalize, precision)
    oracle = eager(z1, z2, g, scale, normalize, torch.float64)
    theirs = eager(z1, z2, g, scale, normalize, DTYPES[precision])
    if normalize:
        length = 1.0
        shortest = torch.cat([z1, z2]).double().norm(dim=1).clamp_min(1e-12).min().item()
    else:
        length = torch.cat([z1, z2]).double().norm(dim=1).max().item()
        shortest = 1.0
    # Rounding of a similarity, and of the gradient's sums. TF32 rounds operands to 11 bits, where eager rounds to 24.
    eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(torch.float32).eps
    similarity = abs(scale) * length**2
    floor = {
        "loss": 4 * eps * (1 + similarity),
        "dz": 4 * eps * abs(scale) * length / shortest * g.norm().item(),
        "dscale": 4 * eps * length**2 * g.norm().item(),
    }
    if z1.dtype != torch.float32:  # the gradient's own rounding; eager may be lucky with a single number
        floor["dz"] += torch.finfo(z1.dtype).eps * oracle[1].norm().item()
        floor["dscale"] += torch.finfo(z1.dtype).eps * length**2 * g.norm().item() / 4
    assert_as_accurate(*(dict(zip(floor, results, strict=True)) for results in (ours, oracle, theirs)), floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch,dim", SIZES)
def test_sizes(batch, dim, precision):
    compare(*rows(batch, dim, DTYPES[precision]), random_gradient(2 * batch), 2.0, precision=precision)


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_largest_tiles(precision):
    compare(*rows(1030, 16, DTYPES[precision]), random_gradient(2060), 2.0, precision=precision)


@pytest.mark.parametrize("dim,precision", [(24, "float32"), (130, "float32"), (24, "bfloat16"), (130, "float16")])
@pytest.mark.parametrize("normalize,scale,length", [(True, 14.3, 1), (True, 100, 1), (True, -1, 1), (False, 1, 1),
                                                    (False, 2, 6), (False, -0.5, 3)])  # fmt: skip
def test_scales(normalize, scale, length, dim, precision):
    z1, z2 = (length * z for z in rows(33, dim, DTYPES[precision]))
    compare(z1, z2, random_gradient(66), scale, normalize, precision)


@pytest.mark.parametrize("scale", [3e9, -1e20, 1e37])
def test_huge_scales(scale):
    """Shifts come back from the forward pass to the last bit: the largest exponential is 1, however large the scale."""
    inputs = *rows(70, 24), random_gradient(140), scale
    for mine, exact in zip(fused(*inputs), eager(*inputs, dtype=torch.float64), strict=True):
        assert (mine.double() - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 140])
def test_float32_rows_with_short_products(dim, precision):
    z1, z2 = rows(65, dim)
    for noise in (1.0, 0.03):  # unsure, and so confident that the gradient cancels
        near, g = z1 + noise * z2, random_gradient(130).abs()
        _, dz, _ = fused(z1, near, g, 10.0, precision=precision)
        _, exact, _ = eager(z1, near, g, 10.0, dtype=torch.float64)
        assert (dz - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("batch,dim", [(0, 3), (0, 300)])
def test_empty_batch(batch, dim):
    loss, dz, dscale = fused(*rows(batch, dim), random_gradient(2 * batch), 2.0)
    assert loss.shape == (0,) and dz.shape == (0, dim) and dscale == 0


@pytest.mark.parametrize("dim", [24, 140])
def test_strides(dim):
    z1, z2 = rows(33, dim)
    g = random_gradient(66)
    wide = torch.full((66, 2 * dim + 1), float("nan"), device=DEVICE)
    sliced1, sliced2 = wide[::2, 1 : dim + 1], wide[1::2, : 2 * dim : 2]
    expected = fused(z1, z2, g, 5.0)
    for strided1, strided2 in ((z1.T.contiguous().T, z2), (sliced1.copy_(z1), sliced2.copy_(z2))):
        for mine, other in zip(fused(strided1, strided2, g, 5.0), expected, strict=True):
            assert torch.equal(mine, other)
    same = z1[:1].expand(33, dim)
    compare(same, z2, g[:1].expand(66), 5.0)


def test_offsets_beyond_32_bits():
    z1, z2 = rows(3, 8, torch.float16)
    g = random_gradient(6)
    for mine, other in zip(fused(far_apart(z1), z2, g, 2.0, precision="float16"),
                           fused(z1, z2, g, 2.0, precision="float16"), strict=True):  # fmt: skip
        assert torch.equal(mine, other)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_zero_row(precision):
    z1, z2 = rows(33, 24, DTYPES[precision])
    z1[3] = 0
    compare(z1, z2, random_gradient(66), 2.0, precision=precision)


def test_lengths_beyond_the_square_root_of_float32():
    z1, z2 = rows(33, 24)
    g = random_gradient(66)
    loss, dz, dscale = fused(z1, z2, g, 2.0)
    huge = fused(z1 * 2.0**100, z2 * 2.0**-30, g, 2.0)
    assert torch.equal(huge[0], loss) and torch.equal(huge[2], dscale)
    assert torch.equal(huge[1][:33].double() * 2.0**100, dz[:33].double())
    assert torch.equal(huge[1][33:] * 2.0**-30, dz[33:])
    compare(z1, 1e-30 * z2, g, 2.0)  # below F.normalize's 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dim", [24, 140])
def test_nan_reaches_everything(value, dim):
    z1, z2 = rows(70, dim)
    z2[5, 7] = value
    for x in fused(z1, z2, random_gradient(140), 2.0):
        assert x.isnan().all()


def test_gradients_of_any_size():
    z1, z2 = rows(33, 24, torch.float16)
    g = random_gradient(66)
    _, dz, dscale = fused(z1.float(), z2.float(), g, 2.0, precision="float16")
    for size in (2.0**-60, 2.0**60):
        _, mine, share = fused(z1.float(), z2.float(), size * g, 2.0, precision="float16")
        assert torch.equal(mine, size * dz) and torch.equal(share, size * dscale)
    _, mine, share = fused(z1, z2, torch.zeros_like(g), 2.0, precision="float16")
    assert not mine.any() and share == 0


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_loss_is_not_negative(precision):
    z, _ = rows(33, 24, DTYPES[precision])
    distinct = torch.eye(24, device=DEVICE, dtype=z.dtype)
    for z1 in (z, distinct):
        loss, _, _ = fused(z1, z1, random_gradient(2 * z1.shape[0]), 100.0, precision=precision)
        assert (loss >= -4 * 100 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("batch", [192, 165])  # an even and an odd number of blocks
def test_bands(batch, monkeypatch):
    """Distances in several launches, the last one shorter, give what a single launch gives."""
    z1, z2 = rows(batch, 32)
    g = random_gradient(2 * batch)
    expected = fused(z1, z2, g, 10.0)
    monkeypatch.setattr(sums, "_BAND", 2)
    for mine, other in zip(fused(z1, z2, g, 10.0), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="launches are counted in the interpreter")
@pytest.mark.parametrize("batch,dim,precision,launches", [(256, 32, "bfloat16", 3 + 7), (32, 130, "float32", 3 + 8)])
def test_launches(batch, dim, precision, launches):
    z1, z2 = rows(batch, dim, DTYPES[precision])
    g, s = random_gradient(2 * batch), torch.tensor(2.0)

    def run() -> None:
        _, *kept_for_backward = kernels.nt_xent(z1, z2, s, True, 0, precision)
        kernels.nt_xent_backward(g, z1, z2, s, *kept_for_backward, True, precision)

    assert count_launches(run) == launches


@pytest.mark.parametrize("dim", [32, 140])
def test_splits(dim, monkeypatch):
    z1, z2 = rows(130, dim)  # 3 units of columns in 2 splits
    g = random_gradient(260)
    compare(z1, z2, g, 5.0)
    monkeypatch.setattr(accumulate, "PROGRAMS", 1)
    compare(z1, z2, g, 5.0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [32, 140])
def test_same_bits_every_time(dim, precision):
    z1, z2 = rows(70, dim, DTYPES[precision])
    first, second = (fused(z1, z2, random_gradient(140), 5.0, precision=precision) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
