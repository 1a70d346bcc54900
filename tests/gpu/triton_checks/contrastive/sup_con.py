"""SupCon's Triton kernels: values against the float64 formula, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor

from fastssl import reference
from fastssl.kernels import contrastive as kernels
from fastssl.kernels.common.launch import DTYPES
from fastssl.kernels.contrastive import positives, sums
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.kernels import POINTERS, row_cases
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
from tests.gpu.triton_checks.common.tiles import rows

module = import_module("fastssl.kernels.contrastive.sup_con")  # which a function of that name has replaced
OWN = POINTERS | {"z": "rows", "out": "fp32", "weighted": "fp32", "per_positive": "fp32"}
OWN |= dict.fromkeys(("first", "last"), "i64")
LOSSES, FACTORS, POSITIVES = (Kernel(getattr(module, name), OWN) for name in ("_losses", "_factors", "_positives"))
NAMES = "loss", "dz", "dscale"

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.few_programs(module, positives)
    interpreter.one_configuration(sums._forward_tile)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    """The kernels over tiles are those of self_logsumexp, the last one is info_nce's, sums of labels are row_sums'."""
    for absent in ({}, {"inverse": None}) if sweep else ({},):
        yield from row_cases(LOSSES, "", absent, capability, sweep, positives.WARPS)
    yield from row_cases(POSITIVES, "", {}, capability, sweep)
    if sweep or capability == 80:
        yield Case(FACTORS, "sup_con", capability, "float32", "fp32", (("BR", module.ROWS_OF_FACTORS),))


def labels_of(count: int, classes: int) -> Tensor:
    """Some of them huge, some with one row only."""
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(count))
    labels[: count // 8] = -(2**40) - torch.arange(count // 8)
    return labels.to(DEVICE)


def launch(
    z: Tensor, labels: Tensor, g: Tensor, scale: Tensor, normalize: bool, precision: str, keep: int = 0
) -> list[Tensor]:
    loss, *saved = kernels.sup_con(z, labels, scale, normalize, keep, precision)
    return [loss, *kernels.sup_con_backward(g, z, labels, scale, *saved, normalize, precision)]


def fused(
    z: Tensor, labels: Tensor, scale: float = 5.0, normalize: bool = True, precision: str = "float32", keep: int = 0
) -> dict[str, Tensor]:
    """Of the launchers; what they leave unwritten is NaN."""
    s, g = torch.tensor(float(scale), device=DEVICE), random_gradient(len(z))
    with poisoned():
        results = launch(z, labels, g, s, normalize, precision, keep)
    assert [x.dtype for x in results] == [torch.float32, z.dtype, torch.float32] and results[1].is_contiguous()
    return dict(zip(NAMES, results, strict=True))


def eager(z: Tensor, labels: Tensor, scale: float, normalize: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the formula in `dtype`."""
    z = z.detach().to(dtype).requires_grad_()
    s = torch.tensor(float(scale), device=DEVICE, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    loss = reference.contrastive.sup_con(z, labels, temperature=1 / s, normalize=normalize, reduction="none")
    gradients = torch.autograd.grad(loss, (z, s), random_gradient(len(z)).to(loss.dtype))
    return dict(zip(NAMES, (loss.detach(), *gradients), strict=True))


def compare(z: Tensor, labels: Tensor, scale: float = 5.0, normalize: bool = True, precision: str = "float32") -> None:
    """Errors against float64 are at most twice eager's in the dtype of the products, and rounding: in 16 bits that of
    a similarity too, which is in the sum of exponentials, while the mean of the positives' is not rounded."""
    inputs = z, labels, scale, normalize
    ours, exact, theirs = fused(*inputs, precision), eager(*inputs, torch.float64), eager(*inputs, DTYPES[precision])
    eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(torch.float32).eps
    similarity = abs(scale) * (1 if normalize else z.double().norm(dim=1).max().item() ** 2)
    unit = torch.finfo(z.dtype).eps if z.dtype != torch.float32 else 0
    floor = {
        name: 8 * eps * (1 + similarity) * (1 + exact[name].norm().item())
        + unit * (similarity + exact[name].norm().item())
        for name in NAMES
    }
    assert_as_accurate(ours, exact, theirs, floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count,dim,classes", [(2, 3, 1), (33, 127, 4), (70, 130, 1), (129, 16, 60)])
def test_sizes(count, dim, classes, precision):
    compare(rows(count, dim, DTYPES[precision]), labels_of(count, classes), precision=precision)


@pytest.mark.parametrize("scale,length", [(2.0, 4.0), (-0.5, 2.0)])
def test_rows_as_they_are(scale, length):
    compare(rows(70, 24, length=length), labels_of(70, 5), scale, normalize=False)


def test_rows_of_no_label_are_apart():
    """What is infinite is in no sum of another label, and a row without positives has loss 0, whatever others are."""
    z, labels = rows(40, 24).abs(), torch.arange(40, device=DEVICE) % 5
    labels[7], labels[5] = 70, 50
    z[5, 0] = float("-inf")  # its similarity with each of the others is minus infinity, whose exponential is 0
    loss = fused(z, labels, normalize=False)["loss"]
    assert loss.isfinite().all() and loss[7] == loss[5] == 0
    z[5] = float("nan")
    results = fused(z, labels, normalize=False)
    assert results["loss"].isfinite().nonzero().flatten().tolist() == [5, 7]
    assert results["dz"].isnan().all() and results["dscale"].isnan()


@pytest.mark.parametrize("dim", [24, 140])
def test_strides(dim):
    z, labels = rows(33, dim), labels_of(33, 4)
    wide = torch.full((66, 2 * dim + 1), float("nan"), device=DEVICE)
    expected = fused(z, labels)
    for strided in (z.T.contiguous().T, wide[::2, 1 : 2 * dim : 2].copy_(z)):
        for name, mine in fused(strided, labels.repeat_interleave(2)[::2]).items():
            assert torch.equal(mine, expected[name]), name


def test_offsets_beyond_32_bits():
    z, labels = rows(3, 8, torch.float16), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    expected = fused(z, labels, precision="float16")
    for name, mine in fused(far_apart(z), labels, precision="float16").items():
        assert torch.equal(mine, expected[name])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_bits_every_time(precision):
    z, labels = rows(70, 32, DTYPES[precision]), labels_of(70, 2)
    first, second = (fused(z, labels, precision=precision) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_kept_products_change_nothing():
    z, labels = rows(70, 24), labels_of(70, 5)
    expected = fused(z, labels)
    for name, mine in fused(z, labels, keep=4 * 128 * 128).items():
        torch.testing.assert_close(mine, expected[name], rtol=1e-5, atol=1e-6)


def test_no_rows():
    results = fused(rows(1, 8)[:0], labels_of(0, 1))
    assert results["loss"].shape == (0,) and results["dz"].shape == (0, 8) and results["dscale"] == 0


@pytest.mark.skipif(not INTERPRETED, reason="launches are counted in the interpreter")
@pytest.mark.parametrize("count,dim,precision,launches", [(256, 32, "bfloat16", 9 + 14), (32, 130, "float32", 9 + 15)])
def test_launches(count, dim, precision, launches):
    inputs = rows(count, dim, DTYPES[precision]), labels_of(count, 5), random_gradient(count), torch.tensor(5.0)
    assert count_launches(lambda: launch(*inputs, True, precision)) == launches
