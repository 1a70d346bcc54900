"""InfoNCE's Triton kernels: values against the float64 formula, and the specialisations to compile."""

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
from tests.gpu.triton_checks.common.kernels import PADDED, POINTERS, row_cases
from tests.gpu.triton_checks.common.numerics import (
    DEVICE,
    INTERPRETED,
    PRECISIONS,
    assert_as_accurate,
    far_apart,
    poisoned,
    random_gradient,
)

module = import_module("fastssl.kernels.contrastive.info_nce")  # which a function of that name has replaced
OWN_POINTERS = {
    **POINTERS,
    **dict.fromkeys(("inverse1", "inverse2"), "fp64"),
    **dict.fromkeys(("positive", "query_slope", "scale_slope", "weight"), "fp32"),
}
FINISH = Kernel(module._finish, OWN_POINTERS, multiples=PADDED)
FACTORS = Kernel(module._factors, OWN_POINTERS)
PROJECT = Kernel(module._project, OWN_POINTERS, multiples=PADDED)
NO_SLOPES = {"gradient": None, "query_slope": None, "scale_slope": None}
SIZES = [(1, 1), (2, 3), (5, 64), (33, 127), (129, 16), (65, 130), (3, 1100)]

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.few_programs(module)
    interpreter.one_configuration(sums._forward_tile)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    """The kernels over tiles are those of similarity_logsumexp."""
    for normalize in (True, False) if sweep else (True,):
        for variant, absent in (("", {}), ("loss", NO_SLOPES)):
            yield from row_cases(FINISH, variant, {"NORMALIZE": normalize, **absent}, capability, sweep, warps=8)
        yield from row_cases(PROJECT, "", {"NORMALIZE": normalize}, capability, sweep, warps=8)
    if sweep or capability == 80:
        yield Case(FACTORS, "", capability, "float32", "fp32", (("BR", module.ROWS_OF_FACTORS),))


def rows(batch: int, dim: int, dtype: torch.dtype = torch.float32, near: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * batch + dim)
    query, noise = torch.randn(2, batch, dim, generator=generator)
    return query.to(DEVICE, dtype), (query + near * noise).to(DEVICE, dtype)


def fused(q: Tensor, k: Tensor, g: Tensor, scale: float, normalize: bool = True, precision: str = "float32"):
    """(loss, dq, dk, dscale) of the launchers; what they leave unwritten is NaN."""
    s = torch.tensor(float(scale), device=DEVICE)
    with poisoned():
        *outputs, query_slope, scale_slope, kept = kernels.info_nce(q, k, s, normalize, True, 0, precision)
        results = kernels.info_nce_backward(
            g, q, k, s, *outputs[1:], query_slope, scale_slope, kept, True, normalize, precision
        )
    assert all(x.dtype == torch.float32 for x in (*outputs, query_slope, scale_slope, results[2]))
    assert all(x.dtype == q.dtype and x.is_contiguous() for x in results[:2])
    return outputs[0], *results


def eager(q: Tensor, k: Tensor, g: Tensor, scale: float, normalize: bool = True, dtype: torch.dtype | None = None):
    """(loss, dq, dk, dscale) of the naive formula in `dtype`."""
    q, k = (z.detach().to(dtype or z.dtype).requires_grad_() for z in (q, k))
    s = torch.tensor(scale, device=DEVICE, dtype=torch.promote_types(q.dtype, torch.float32), requires_grad=True)
    loss = reference.contrastive.info_nce(q, k, temperature=1 / s, normalize=normalize, reduction="none")
    return loss.detach(), *torch.autograd.grad(loss, (q, k, s), g.to(loss.dtype))


def compare(q: Tensor, k: Tensor, g: Tensor, scale: float, normalize: bool = True, precision: str = "float32"):
    """Errors against float64 are at most twice eager's in the dtype of the products, and rounding."""
    ours = fused(q, k, g, scale, normalize, precision)
    oracle = eager(q, k, g, scale, normalize, torch.float64)
    theirs = eager(q, k, g, scale, normalize, DTYPES[precision])
    norms = [z.double().norm(dim=1) for z in (q, k)]
    lengths = [1.0, 1.0] if normalize else [norm.max().item() for norm in norms]
    shortest = [norm.clamp_min(1e-12).min().item() if normalize else 1.0 for norm in norms]
    # Rounding of a similarity, and of the gradient's sums. TF32 rounds operands to 11 bits, where eager rounds to 24.
    eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(torch.float32).eps
    size = g.norm().item()
    floor = {
        "loss": 4 * eps * (1 + abs(scale) * lengths[0] * lengths[1]),
        "dq": 4 * eps * abs(scale) * lengths[1] / shortest[0] * size,
        "dk": 4 * eps * abs(scale) * lengths[0] / shortest[1] * size,
        "dscale": 4 * eps * lengths[0] * lengths[1] * size,
    }
    if q.dtype != torch.float32:  # the gradient's own rounding; eager may be lucky with a single number
        unit = torch.finfo(q.dtype).eps
        floor["dq"] += unit * oracle[1].norm().item()
        floor["dk"] += unit * oracle[2].norm().item()
        floor["dscale"] += unit * lengths[0] * lengths[1] * size / 4
    assert_as_accurate(*(dict(zip(floor, results, strict=True)) for results in (ours, oracle, theirs)), floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch,dim", SIZES)
def test_sizes(batch, dim, precision):
    compare(*rows(batch, dim, DTYPES[precision]), random_gradient(batch), 2.0, precision=precision)


@pytest.mark.parametrize("dim,precision", [(24, "float32"), (130, "bfloat16"), (24, "float16")])
@pytest.mark.parametrize("normalize,scale,length", [(True, 100, 1), (True, -1, 1), (False, 1, 1), (False, 0.5, 4)])
def test_scales(normalize, scale, length, dim, precision):
    q, k = (length * z / (1 if normalize else dim**0.5) for z in rows(33, dim, DTYPES[precision]))
    compare(q, k, random_gradient(33), scale, normalize, precision)


@pytest.mark.parametrize("scale", [3e9, -1e20, 1e35])
def test_huge_scales(scale):
    """Shifts come back from the forward pass to the last bit: the largest exponential is 1, however large the scale."""
    inputs = *rows(70, 24), random_gradient(70), scale
    for mine, exact in zip(fused(*inputs), eager(*inputs, dtype=torch.float64), strict=True):
        assert (mine.double() - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 140])
def test_float32_rows_with_short_products(dim, precision):
    g = random_gradient(65)
    for near in (1.0, 0.03):  # unsure, and so confident that the gradient cancels
        q, k = rows(65, dim, near=near)
        for mine, exact in zip(
            fused(q, k, g, 10.0, precision=precision), eager(q, k, g, 10.0, dtype=torch.float64), strict=True
        ):
            assert (mine - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("dim", [24, 140])
def test_what_is_not_wanted_changes_nothing(dim):
    (q, k), g, s = rows(70, dim), random_gradient(70), torch.tensor(5.0, device=DEVICE)
    with poisoned():
        *outputs, query_slope, scale_slope, kept = kernels.info_nce(q, k, s, True, True, 0, "float32")
        *same, none, nothing, _ = kernels.info_nce(q, k, s, True, False, 0, "float32")
        assert none.shape == (0, dim) and nothing.shape == (0,)
        for mine, other in zip(same, outputs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        arguments = g, q, k, s, *outputs[1:], query_slope, scale_slope, kept
        grad_query, grad_key, grad_scale = kernels.info_nce_backward(*arguments, True, True, "float32")
        of_query, none, of_scale = kernels.info_nce_backward(*arguments, False, True, "float32")
    assert grad_key.shape == k.shape and none.shape == (0, dim)
    assert torch.equal(of_query, grad_query) and torch.equal(of_scale, grad_scale)


@pytest.mark.parametrize("batch,dim", [(0, 3), (0, 300)])
def test_empty_batch(batch, dim):
    loss, dq, dk, dscale = fused(*rows(batch, dim), random_gradient(batch), 2.0)
    assert loss.shape == (0,) and dq.shape == dk.shape == (0, dim) and dscale == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_strides(normalize):
    dim = 140
    (q, k), g = rows(33, dim), random_gradient(66)[::2]
    wide = torch.full((33, 2 * dim + 1), float("nan"), device=DEVICE)
    expected = fused(q, k, g, 5.0, normalize)
    strided = q.T.contiguous().T, wide[:, : 2 * dim : 2].copy_(k)
    for inputs, results in ((strided, expected), (strided[::-1], fused(k, q, g, 5.0, normalize))):
        for mine, other in zip(fused(*inputs, g, 5.0, normalize), results, strict=True):
            assert torch.equal(mine, other)


def test_offsets_beyond_32_bits():
    (q, k), g = rows(3, 8, torch.float16), random_gradient(3)
    expected = fused(q, k, g, 2.0, precision="float16")
    for inputs in ((far_apart(q), k), (q, far_apart(k))):
        for mine, other in zip(fused(*inputs, g, 2.0, precision="float16"), expected, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("which", [0, 1])
def test_rows_of_zeros_and_of_extreme_lengths(which):
    inputs, g = rows(33, 24), random_gradient(33)
    inputs[which][3] = 0
    compare(*inputs, g, 2.0)
    loss, *gradients, dscale = fused(*inputs, g, 2.0)
    huge = [z * 2.0**100 if side == which else z for side, z in enumerate(inputs)]
    same, *scaled, dscale_same = fused(*huge, g, 2.0)
    assert torch.equal(same, loss) and torch.equal(dscale_same, dscale)
    others = torch.arange(33, device=DEVICE) != 3  # the row of zeros is divided by F.normalize's 1e-12
    for side, (mine, other) in enumerate(zip(scaled, gradients, strict=True)):
        assert torch.equal(mine[others].double() * (2.0**100 if side == which else 1), other[others].double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dim", [24, 140])
def test_nan_reaches_what_it_touches(value, dim):
    g = random_gradient(70)
    q, k = rows(70, dim)
    q[5, 7] = value
    loss, dq, dk, dscale = fused(q, k, g, 2.0)
    assert loss.isnan().nonzero().tolist() == [[5]]
    assert dq.isnan().any(1).nonzero().tolist() == [[5]] and dk.isnan().all() and dscale.isnan()
    q, k = rows(70, dim)
    k[5, 7] = value
    for x in fused(q, k, g, 2.0):
        assert x.isnan().all()


def test_gradients_of_any_size():
    (q, k), g = rows(33, 24), random_gradient(33)
    _, *expected = fused(q, k, g, 2.0, precision="float16")
    for size in (2.0**-60, 2.0**60, 0.0):
        _, *scaled = fused(q, k, size * g, 2.0, precision="float16")
        for mine, other in zip(scaled, expected, strict=True):
            assert torch.equal(mine, size * other)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_loss_is_not_negative(precision):
    q, _ = rows(33, 24, DTYPES[precision])
    for same in (q, torch.eye(24, device=DEVICE, dtype=q.dtype)):
        loss, *_ = fused(same, same, random_gradient(same.shape[0]), 100.0, precision=precision)
        assert (loss >= 0).all()


@pytest.mark.parametrize("dim", [32, 140])
def test_splits(dim, monkeypatch):
    inputs = *rows(260, dim), random_gradient(260)  # 3 units of columns in 2 splits, or in one
    for programs in (accumulate.PROGRAMS, 1):
        monkeypatch.setattr(accumulate, "PROGRAMS", programs)
        compare(*inputs, 5.0)


@pytest.mark.parametrize("dim", [32, 140])
def test_same_bits_every_time(dim):
    first, second = (fused(*rows(70, dim), random_gradient(70), 5.0) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
