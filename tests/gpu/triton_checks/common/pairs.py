"""Tests of losses of pairs of rows (x_i, y_i), each of the other rows y_j its negatives, against float64."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor

from fastssl.kernels.common import accumulate
from fastssl.kernels.common.launch import DTYPES, is_wide
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

SIZES = [(1, 1), (2, 3), (5, 64), (33, 127), (129, 16), (65, 130), (3, 1100)]


def rows(batch: int, dim: int, dtype: torch.dtype = torch.float32, near: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * batch + dim)
    x, noise = torch.randn(2, batch, dim, generator=generator)
    return x.to(DEVICE, dtype), (x + near * noise).to(DEVICE, dtype)


class PairTests(ABC):
    """An operation's class of tests says how to launch it, what its losses are, and how many launches both take."""

    launches: tuple[int, int]  # of narrow and of wide rows
    label_smoothing = 0.0

    @abstractmethod
    def launch(
        self, x: Tensor, y: Tensor, g: Tensor, scale: Tensor, normalize: bool, precision: str, reduction: str = "none"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, dx, dy, dscale), a loss for each pair, or what `reduction` makes of them, whose gradients are g."""

    @abstractmethod
    def losses(self, x: Tensor, y: Tensor, scale: Tensor, normalize: bool) -> Tensor:
        """The losses by the naive formula."""

    def fused(self, x: Tensor, y: Tensor, g: Tensor, scale: float, normalize: bool = True, precision: str = "float32"):
        """(loss, dx, dy, dscale) of the launchers; what they leave unwritten is NaN."""
        with poisoned():
            results = self.launch(x, y, g, torch.tensor(float(scale), device=DEVICE), normalize, precision)
        assert results[0].dtype == results[3].dtype == torch.float32
        assert all(r.dtype == x.dtype and r.is_contiguous() for r in results[1:3])
        return results

    def eager(
        self,
        x: Tensor,
        y: Tensor,
        g: Tensor,
        scale: float,
        normalize: bool = True,
        precision: str = "float32",
        dtype: torch.dtype = torch.float64,
    ):
        """(loss, dx, dy, dscale) of the naive formula in `dtype`."""
        x, y = (z.detach().to(dtype).requires_grad_() for z in (x, y))
        wide = torch.promote_types(dtype, torch.float32)
        s = torch.tensor(float(scale), device=DEVICE, dtype=wide, requires_grad=True)
        loss = self.losses(x, y, s, normalize)
        return loss.detach(), *torch.autograd.grad(loss, (x, y, s), g.to(loss.dtype))

    def compare(self, x: Tensor, y: Tensor, g: Tensor, scale: float, normalize: bool = True, precision="float32"):
        """Errors against float64 are at most twice eager's in the dtype of the products, and rounding."""
        inputs = x, y, g, scale, normalize, precision
        ours, oracle, theirs = self.fused(*inputs), self.eager(*inputs), self.eager(*inputs, DTYPES[precision])
        norms = [z.double().norm(dim=1) for z in (x, y)]
        lengths = [1.0, 1.0] if normalize else [norm.max().item() for norm in norms]
        shortest = [norm.clamp_min(1e-12).min().item() if normalize else 1.0 for norm in norms]
        # Rounding of a similarity, and of the gradient's sums. TF32 rounds operands to 11 bits, where eager rounds to
        # 24.
        eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(torch.float32).eps
        size = g.norm().item()
        floor = {
            "loss": 4 * eps * (1 + abs(scale) * lengths[0] * lengths[1]),
            "dx": 4 * eps * abs(scale) * lengths[1] / shortest[0] * size,
            "dy": 4 * eps * abs(scale) * lengths[0] / shortest[1] * size,
            "dscale": 4 * eps * lengths[0] * lengths[1] * size,
        }
        if x.dtype != torch.float32:  # the gradient's own rounding; eager may be lucky with a single number
            unit = torch.finfo(x.dtype).eps
            floor["dx"] += unit * oracle[1].norm().item()
            floor["dy"] += unit * oracle[2].norm().item()
            floor["dscale"] += unit * lengths[0] * lengths[1] * size / 4
        assert_as_accurate(*(dict(zip(floor, results, strict=True)) for results in (ours, oracle, theirs)), floor)

    @pytest.mark.parametrize("reduction,share", [("sum", 1.0), ("mean", 1 / 9)])
    def test_reductions(self, reduction, share):
        (x, y), self.label_smoothing = rows(9, 24), 0.1
        s, g = torch.tensor(2.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)
        loss, *gradients = self.launch(x, y, g, s, True, "float32", reduction)
        losses, *expected = self.launch(x, y, g.mul(share).expand(9), s, True, "float32")
        torch.testing.assert_close((loss, *gradients), (losses.sum() * share, *expected))

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("batch,dim", SIZES)
    def test_sizes(self, batch, dim, precision):
        self.compare(*rows(batch, dim, DTYPES[precision]), random_gradient(batch), 2.0, precision=precision)

    @pytest.mark.parametrize("dim,precision", [(24, "float32"), (130, "bfloat16"), (24, "float16")])
    @pytest.mark.parametrize("normalize,scale,length", [(True, 100, 1), (True, -1, 1), (False, 1, 1), (False, 0.5, 4)])
    def test_scales(self, normalize, scale, length, dim, precision):
        x, y = (length * z / (1 if normalize else dim**0.5) for z in rows(33, dim, DTYPES[precision]))
        self.compare(x, y, random_gradient(33), scale, normalize, precision)

    @pytest.mark.parametrize("dim,precision,normalize", [(24, "float32", True), (140, "bfloat16", False)])
    def test_label_smoothing(self, dim, precision, normalize, monkeypatch):
        monkeypatch.setattr(type(self), "label_smoothing", 0.2)
        (x, y), g = rows(33, dim, DTYPES[precision]), random_gradient(33)
        self.compare(x.T.contiguous().T, y, g, 0.5, normalize, precision)

    @pytest.mark.parametrize("scale", [3e9, -1e20, 1e35])
    def test_huge_scales(self, scale):
        """Shifts come back from the forward pass to the last bit: the largest exponential is 1, however large the
        scale."""
        inputs = *rows(70, 24), random_gradient(70), scale
        for mine, exact in zip(self.fused(*inputs), self.eager(*inputs), strict=True):
            assert (mine.double() - exact).norm() <= 1e-4 * exact.norm()

    @pytest.mark.parametrize("dim,precision", [(64, "bfloat16"), (140, "float16")])
    def test_float32_rows_with_short_products(self, dim, precision):
        for near in (1.0, 0.03):  # unsure, and so confident that the gradient cancels
            inputs = *rows(65, dim, near=near), random_gradient(65), 10.0, True, precision
            for mine, exact in zip(self.fused(*inputs), self.eager(*inputs), strict=True):
                assert (mine - exact).norm() < 5e-3 * exact.norm()

    @pytest.mark.parametrize("dim", [3, 300])
    def test_empty_batch(self, dim):
        loss, dx, dy, dscale = self.fused(*rows(0, dim), random_gradient(0), 2.0)
        assert loss.shape == (0,) and dx.shape == dy.shape == (0, dim) and dscale == 0

    @pytest.mark.parametrize("normalize", [True, False])
    def test_strides(self, normalize):
        (x, y), g = rows(33, 140), random_gradient(66)[::2]
        wide = torch.full((33, 281), float("nan"), device=DEVICE)
        strided = x.T.contiguous().T, wide[:, :280:2].copy_(y)
        for inputs, same in ((strided, (x, y)), (strided[::-1], (y, x))):
            results = self.fused(*inputs, g, 5.0, normalize)
            for mine, other in zip(results, self.fused(*same, g.contiguous(), 5.0, normalize), strict=True):
                assert torch.equal(mine, other)

    def test_offsets_beyond_32_bits(self):
        (x, y), g = rows(3, 8, torch.float16), random_gradient(3)
        expected = self.fused(x, y, g, 2.0, precision="float16")
        for inputs in ((far_apart(x), y), (x, far_apart(y))):
            for mine, other in zip(self.fused(*inputs, g, 2.0, precision="float16"), expected, strict=True):
                assert torch.equal(mine, other)

    @pytest.mark.parametrize("which", [0, 1])
    def test_rows_of_zeros_and_of_extreme_lengths(self, which):
        inputs, g = rows(33, 24), random_gradient(33)
        inputs[which][3] = 0
        self.compare(*inputs, g, 2.0)
        loss, *gradients, dscale = self.fused(*inputs, g, 2.0)
        huge = [z * 2.0**100 if side == which else z for side, z in enumerate(inputs)]
        same, *scaled, dscale_same = self.fused(*huge, g, 2.0)
        assert torch.equal(same, loss) and torch.equal(dscale_same, dscale)
        others = torch.arange(33, device=DEVICE) != 3  # the row of zeros is divided by F.normalize's 1e-12
        for side, (mine, other) in enumerate(zip(scaled, gradients, strict=True)):
            unscaled = mine[others].double() * (2.0**100 if side == which else 1)
            assert torch.equal(unscaled, other[others].double())

    def test_rows_shorter_than_the_least_divisor(self):
        inputs = rows(33, 24)
        for z in inputs:
            z[3] *= 5e-13 / z[3].norm()
        self.compare(*inputs, random_gradient(33), 2.0)

    def test_gradients_of_any_size(self):
        (x, y), g = rows(33, 24), random_gradient(33)
        _, *expected = self.fused(x, y, g, 2.0, precision="float16")
        for size in (2.0**-60, 2.0**60, 0.0):
            _, *scaled = self.fused(x, y, size * g, 2.0, precision="float16")
            for mine, other in zip(scaled, expected, strict=True):
                assert torch.equal(mine, size * other)

    @pytest.mark.parametrize("precision", ["float32", "float16"])
    def test_loss_is_not_negative(self, precision):
        x, _ = rows(33, 24, DTYPES[precision])
        for same in (x, torch.eye(24, device=DEVICE, dtype=x.dtype)):
            loss, *_ = self.fused(same, same, random_gradient(same.shape[0]), 100.0, precision=precision)
            assert (loss >= 0).all()

    @pytest.mark.skipif(not INTERPRETED, reason="launches are counted in the interpreter")
    @pytest.mark.parametrize("batch,dim,precision", [(256, 32, "bfloat16"), (32, 130, "float32")])
    def test_launches(self, batch, dim, precision):
        x, y = rows(batch, dim, DTYPES[precision])
        g, scale = random_gradient(batch), torch.tensor(2.0)
        launches = self.launches[int(is_wide(dim, precision))]
        assert count_launches(lambda: self.launch(x, y, g, scale, True, precision)) == launches

    @pytest.mark.parametrize("dim", [32, 140])
    def test_splits(self, dim, monkeypatch):
        inputs = *rows(260, dim), random_gradient(260)  # 3 units of columns in 2 splits, or in one
        for programs in (accumulate.PROGRAMS, 1):
            monkeypatch.setattr(accumulate, "PROGRAMS", programs)
            self.compare(*inputs, 5.0)
