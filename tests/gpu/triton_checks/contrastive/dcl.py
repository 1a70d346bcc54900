"""DCL's Triton kernels: values against the float64 formula, and the specialisations to compile."""

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
from tests.gpu.triton_checks.common.kernels import NO_EXCLUDE, POINTERS, row_cases
from tests.gpu.triton_checks.common.launches import count_launches
from tests.gpu.triton_checks.common.numerics import (
    DEVICE,
    INTERPRETED,
    PRECISIONS,
    assert_as_accurate,
    poisoned,
    random_gradient,
)
from tests.gpu.triton_checks.contrastive.logsumexp import merge_cases, sum_cases
from tests.gpu.triton_checks.contrastive.nt_xent import PROJECT, rows

module = import_module("fastssl.kernels.contrastive.dcl")  # which a function of that name has replaced
FACTORS = Kernel(module._factors, POINTERS | {"grad_weight": "fp32"})
SUMS = {"dcl": {"EXCLUDE": "partner", "SYMMETRIC": True, **NO_EXCLUDE}}
NAMES = "loss", "dz", "dweight", "dscale"


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    """The products of the backward pass are NT-Xent's."""
    yield from sum_cases(SUMS, capability, sweep)
    absent = dict.fromkeys(("shift", "coefficient", "total", "aligned"))
    yield from row_cases(PROJECT, "dcl", {"NORMALIZE": True, **absent}, capability, sweep)
    yield from merge_cases("dcl", {}, 2, capability, sweep)
    if sweep or capability == 80:
        yield Case(FACTORS, "dcl", capability, "float32", "fp32", (("BR", module.ROWS_OF_FACTORS),))


def weights(batch: int) -> Tensor:
    return 1 + random_gradient(2 * batch).abs()


def fused(z1: Tensor, z2: Tensor, scale: float, normalize: bool, precision: str, keep: int = 0) -> dict[str, Tensor]:
    """Of the launchers; what they leave unwritten is NaN."""
    s, g, w = torch.tensor(float(scale), device=DEVICE), random_gradient(2 * len(z1)), weights(len(z1))
    with poisoned():
        loss, *saved, kept = kernels.dcl(z1, z2, w, s, normalize, keep, precision)
        dz1, dz2, dweight, dscale = kernels.dcl_backward(g, z1, z2, w, s, *saved, kept, normalize, precision)
    assert loss.dtype == dweight.dtype == dscale.dtype == torch.float32 and dz1.dtype == dz2.dtype == z1.dtype
    return dict(zip(NAMES, (loss, torch.cat([dz1, dz2]), dweight, dscale), strict=True))


def eager(z1: Tensor, z2: Tensor, scale: float, normalize: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the formula in `dtype`."""
    z1, z2 = (z.detach().to(dtype).requires_grad_() for z in (z1, z2))
    s = torch.tensor(float(scale), device=DEVICE, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    w = weights(len(z1)).to(s.dtype).requires_grad_()
    of_rows = iter(w.tensor_split(2))
    loss = reference.contrastive.dcl(
        z1, z2, temperature=1 / s, weight_fn=lambda x, y: next(of_rows), normalize=normalize, reduction="none"
    )
    dz1, dz2, *rest = torch.autograd.grad(loss, (z1, z2, w, s), random_gradient(len(w)).to(loss.dtype))
    return dict(zip(NAMES, (loss.detach(), torch.cat([dz1, dz2]), *rest), strict=True))


def compare(z1: Tensor, z2: Tensor, scale: float = 2.0, normalize: bool = True, precision: str = "float32") -> None:
    """Errors against float64 are at most twice eager's in the dtype of the products, and rounding."""
    inputs = z1, z2, scale, normalize
    ours, exact, theirs = fused(*inputs, precision), eager(*inputs, torch.float64), eager(*inputs, DTYPES[precision])
    eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(torch.float32).eps
    similarity = abs(scale) * (1 if normalize else torch.cat([z1, z2]).double().norm(dim=1).max().item() ** 2)
    floor = {name: 8 * eps * (1 + similarity) * (1 + exact[name].norm().item()) for name in NAMES}
    if z1.dtype != torch.float32:  # the results' own rounding, and that of a few products
        unit = torch.finfo(z1.dtype).eps
        for name in NAMES:
            floor[name] += unit * exact[name].norm().item()
    assert_as_accurate(ours, exact, theirs, floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch,dim", [(2, 3), (33, 127), (64, 130), (65, 64)])
def test_sizes(batch, dim, precision):
    compare(*rows(batch, dim, DTYPES[precision]), precision=precision)


@pytest.mark.parametrize("normalize,scale,length", [(True, 100, 1), (True, -1, 1), (False, 0.5, 3)])
def test_scales(normalize, scale, length):
    compare(*(length * z / (1 if normalize else 24**0.5) for z in rows(33, 24)), scale, normalize)


def test_a_single_pair_has_no_negatives():
    results = fused(*rows(1, 8), 2.0, True, "float32")
    assert (results["loss"] == float("-inf")).all() and results["dz"].isfinite().all()
    compare(*(z[:0] for z in rows(1, 8)))


@pytest.mark.parametrize("dim", [24, 140])
def test_nan_reaches_everything(dim):
    z1, z2 = rows(70, dim)
    z2[5, 7] = float("nan")
    results = fused(z1, z2, 2.0, True, "float32")
    positives = results.pop("dweight")
    assert positives.isnan().nonzero().flatten().tolist() == [5, 75]
    assert all(x.isnan().all() for x in results.values())


def test_bands_and_splits(monkeypatch):
    z1, z2 = rows(165, 32, torch.bfloat16)  # an odd number of blocks, 3 units of columns
    monkeypatch.setattr(sums, "_BAND", 2)
    compare(z1, z2, 5.0, precision="bfloat16")
    monkeypatch.setattr(accumulate, "PROGRAMS", 1)
    compare(z1, z2, 5.0, precision="bfloat16")


def test_kept_products_change_nothing():
    z1, z2 = rows(70, 24)
    expected = fused(z1, z2, 5.0, True, "float32")
    for name, mine in fused(z1, z2, 5.0, True, "float32", keep=4 * 256 * 256).items():
        torch.testing.assert_close(mine, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="launches are counted in the interpreter")
@pytest.mark.parametrize("batch,dim,precision,launches", [(256, 32, "bfloat16", 3 + 7), (32, 130, "float32", 3 + 8)])
def test_launches(batch, dim, precision, launches):
    z1, z2 = rows(batch, dim, DTYPES[precision])
    g, w, s = random_gradient(2 * batch), weights(batch), torch.tensor(2.0)

    def run() -> None:
        _, *saved = kernels.dcl(z1, z2, w, s, True, 0, precision)
        kernels.dcl_backward(g, z1, z2, w, s, *saved, True, precision)

    assert count_launches(run) == launches
