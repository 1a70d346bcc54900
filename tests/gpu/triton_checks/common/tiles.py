"""Tests of kernels over the tiles of S = scale x y^T, for M rows x and N rows y, against float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastssl.kernels.common import accumulate
from fastssl.kernels.common.launch import DTYPES
from fastssl.kernels.common.rows import pad
from tests.gpu.triton_checks.common.numerics import (
    DEVICE,
    INTERPRETED,
    PRECISIONS,
    THOROUGH,
    assert_as_accurate,
    far_apart,
    poisoned,
    random_gradient,
)

SIZES = [(1, 1, 1), (1, 9, 8), (3, 129, 64), (127, 65, 130), (129, 127, 24), (2, 400, 40), (5, 3, 1100)]


def rows(count: int, dim: int, dtype: torch.dtype = torch.float32, length: float = 1.0, seed: int = 0) -> Tensor:
    """Random rows of about this length."""
    generator = torch.Generator().manual_seed(seed + 1000 * count + dim)
    return (length * dim**-0.5 * torch.randn(count, dim, generator=generator)).to(DEVICE, dtype)


def both(m: int, n: int, dim: int, precision: str = "float32", length: float = 1.0) -> tuple[Tensor, Tensor]:
    return rows(m, dim, DTYPES[precision], length), rows(n, dim, DTYPES[precision], length, seed=1)


def some_excluded(m: int, n: int) -> Tensor:
    """For each row a column, or a number that is none."""
    own = (torch.arange(m) * 7) % (n + 3) - 1
    own[::11] += 2**32
    return own.to(DEVICE)


class TileTests(ABC):
    """A family's class of tests names its `operations` and says how to launch them and what their losses are."""

    operations: Sequence[str]
    of_one_set: Sequence[str] = ()  # those of S = scale x x^T without its diagonal, to which y is nothing
    quickest: Sequence[str] = ()  # those whose largest tiles are tested where no sweep is wanted

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "operation" in metafunc.fixturenames:
            metafunc.parametrize("operation", self.operations)

    @abstractmethod
    def launch(
        self, operation: str, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, exclude: Tensor | None, precision: str
    ) -> dict[str, Tensor]:
        """loss, dx, dy, dscale and, as the operation has them, dbias or shift, of a loss per row (and column), whose
        gradients are random (`random_gradient`), or of one loss, whose gradient is 1."""

    @abstractmethod
    def losses(self, operation: str, S: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """loss and, as the operation has it, shift, by the naive formula."""

    def fused(
        self, operation: str, x: Tensor, y: Tensor, scale: float, bias: float, exclude: Tensor | None, precision: str
    ) -> dict[str, Tensor]:
        scalars = (torch.tensor(float(value), device=DEVICE) for value in (scale, bias))
        with poisoned():
            return self.launch(operation, x, y, *scalars, exclude, precision)

    def eager(
        self,
        operation: str,
        x: Tensor,
        y: Tensor,
        scale: float,
        bias: float,
        exclude: Tensor | None,
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        x, y = (t.detach().to(dtype).requires_grad_() for t in (x, y))
        wide = torch.promote_types(dtype, torch.float32)
        s, b = (torch.tensor(value, device=DEVICE, dtype=wide, requires_grad=True) for value in (scale, bias))
        if operation in self.of_one_set:
            exclude = torch.arange(x.shape[0], device=DEVICE)
        S = (x @ (x if operation in self.of_one_set else y).T * s).to(dtype)
        if exclude is not None:
            S = S.masked_fill(torch.arange(S.shape[1], device=DEVICE) == exclude[:, None], float("-inf"))
        results = self.losses(operation, S, b)
        loss = results["loss"]
        g = random_gradient(loss.shape[0]).to(loss.dtype) if loss.dim() else None
        gradients = torch.autograd.grad(loss, (x, y, s, b), g, allow_unused=True, materialize_grads=True)
        results |= dict(zip(("dx", "dy", "dscale", "dbias"), gradients, strict=True))
        return {name: value.detach() for name, value in results.items()}

    def compare(
        self,
        operation: str,
        x: Tensor,
        y: Tensor,
        scale: float = 2.0,
        bias: float = -1.0,
        exclude: Tensor | None = None,
        precision: str = "float32",
    ) -> None:
        if operation in self.of_one_set:
            y, exclude = x[:1], None
        inputs = operation, x, y, scale, bias, exclude
        exact, theirs = self.eager(*inputs), self.eager(*inputs, DTYPES[precision])
        # Rounding of a similarity, and of the gradient's sums. TF32 rounds operands to 11 bits, where eager rounds to
        # 24.
        eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(torch.float32).eps
        lengths = [t.double().norm(dim=1).max().item() for t in (x, x if operation in self.of_one_set else y)]
        similarity = abs(scale) * lengths[0] * lengths[1]
        if exact["loss"].dim():
            size = random_gradient(exact["loss"].shape[0]).norm().item()  # of the weights
            loss = 1 + similarity
        else:
            size = exact["dbias"].item() + 1e-30
            loss = (1 + similarity + abs(bias)) * (exact["loss"].norm().item() if bias else 1)
        floor = {
            "loss": 8 * eps * loss,
            "dx": 4 * eps * (1 + similarity) * abs(scale) * lengths[1] * size,
            "dy": 4 * eps * (1 + similarity) * abs(scale) * lengths[0] * size,
            "dscale": 4 * eps * (1 + similarity) * lengths[0] * lengths[1] * size,
            "dbias": 4 * eps * (1 + similarity) * size,
            "shift": 8 * eps * similarity,
        }
        if precision in ("bfloat16", "float16"):  # the gradient's own; eager may be lucky with a single number
            unit = torch.finfo(DTYPES[precision]).eps
            for name in ("dx", "dy"):
                floor[name] += unit * exact[name].norm().item()
            floor["dscale"] += unit * lengths[0] * lengths[1] * size / 4
        assert_as_accurate(self.fused(*inputs, precision), exact, theirs, floor)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("m,n,dim", SIZES)
    def test_sizes(self, m, n, dim, operation, precision):
        if operation in self.of_one_set:
            m = max(m, 2)  # one row alone has no log-sum-exp: test_excludes_every_column
        x, y = both(m, n, dim, precision)
        excludes = [None]
        if n > 8:
            excludes = [None, some_excluded(m, n)] if THOROUGH else [some_excluded(m, n)]
        for exclude in excludes:
            if exclude is not None and operation == "pair" and m < 3:
                exclude = exclude.clamp_min(1)  # else a column would be left with no row
                exclude[-1] = -1
            self.compare(operation, x, y, exclude=exclude, precision=precision)

    @pytest.mark.parametrize("scale", [3e9, -1e20, 1e35])
    def test_huge_scales(self, scale, operation):
        """Shifts come back from the forward pass to the last bit: the largest exponential is 1, however large the
        scale."""
        x, y = both(70, 60, 24)
        inputs = operation, x, x[:1] if operation in self.of_one_set else y, scale, -1.0, None
        ours, exact = self.fused(*inputs, "float32"), self.eager(*inputs)
        for name in ("loss", "dx", "dy", "dscale"):
            assert (ours[name].double() - exact[name]).norm() <= 1e-4 * exact[name].norm(), name

    @pytest.mark.parametrize("precision", ["tf32", "float16"] if THOROUGH else ["float16"])
    def test_largest_tiles(self, precision, operation):
        if not THOROUGH and operation not in self.quickest:
            pytest.skip("in a sweep only")
        self.compare(operation, *both(2060, 70, 16, precision), precision=precision)
        if operation not in self.of_one_set and THOROUGH:
            self.compare(operation, *both(70, 2060, 16, precision), precision=precision)

    @pytest.mark.parametrize("dim,precision", [(24, "float32"), (130, "bfloat16"), (24, "float16")])
    @pytest.mark.parametrize("scale,bias,length", [(100, -10, 1), (-1, 2, 1), (1, 0, 20), (0, 0, 1)])
    def test_scales(self, scale, bias, length, dim, precision, operation):
        inputs = both(33, 70, dim, precision, length)
        self.compare(operation, *inputs, float(scale), float(bias), some_excluded(33, 70), precision)

    @pytest.mark.parametrize("dim,precision", [(24, "bfloat16"), (140, "float16")])
    def test_float32_rows_with_short_products(self, dim, precision, operation):
        x, y = both(65, 33, dim)
        inputs = operation, x, y, 10.0, -10.0, None
        ours, exact = self.fused(*inputs, precision), self.eager(*inputs)
        for name in ("dx", "dy", "loss"):
            assert (ours[name] - exact[name]).norm() <= 2e-2 * exact[name].norm()
        assert ours["dx"].dtype == torch.float32

    @pytest.mark.parametrize("m,n", [(0, 3), (3, 0), (0, 0)])
    @pytest.mark.parametrize("dim", [3, 300])
    def test_empty(self, m, n, dim, operation):
        x, y = both(m, n, dim)
        if operation in self.of_one_set:
            x, y = x[:0], y[:0]
        result = self.fused(operation, x, y, 2.0, -1.0, some_excluded(m, n) if n else None, "float32")
        assert result["dx"].shape == x.shape and result["dy"].shape == y.shape
        assert not result["dx"].nan_to_num().any() and not result["dy"].nan_to_num().any()
        if not result["loss"].dim():
            assert result["loss"] == result["dbias"] == 0

    @pytest.mark.parametrize("dim", [24, 140])
    def test_strides(self, dim, operation):
        x, y = both(33, 65, dim)
        exclude = some_excluded(33, 65)
        wide = torch.full((130, 2 * dim + 1), float("nan"), device=DEVICE)
        strided = x.T.contiguous().T, wide[::2, 1 : 2 * dim : 2].copy_(y)
        every_third = exclude.repeat_interleave(3)[::3]
        expected = self.fused(operation, x, y, 5.0, -1.0, exclude, "float32")
        for name, value in self.fused(operation, *strided, 5.0, -1.0, every_third, "float32").items():
            assert torch.equal(value, expected[name]), name

    def test_rows_that_need_no_padding(self, operation):
        x, y = both(128, 256, 64, "bfloat16")
        assert pad(x, "bfloat16") is x and pad(x, "float16") is not x
        assert pad(x[1:], "bfloat16") is not x
        self.compare(operation, x, y, exclude=some_excluded(128, 256), precision="bfloat16")

    @pytest.mark.parametrize("dim", [32, 140])
    def test_splits(self, dim, operation, monkeypatch):
        x, y = both(70, 300, dim)  # 3 units of columns in 2 splits, or in one
        for programs in (accumulate.PROGRAMS, 1):
            monkeypatch.setattr(accumulate, "PROGRAMS", programs)
            self.compare(operation, x, y, exclude=some_excluded(70, 300))

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_same_bits_every_time(self, operation, precision):
        inputs = operation, *both(70, 300, 32, precision), 5.0, -1.0, some_excluded(70, 300), precision
        first, second = (self.fused(*inputs) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name])

    def test_offsets_beyond_32_bits(self, operation):
        x, y = both(3, 5, 8, "float16")
        expected = self.fused(operation, x, y, 2.0, -1.0, None, "float16")
        for name, value in self.fused(operation, far_apart(x), y, 2.0, -1.0, None, "float16").items():
            assert torch.equal(value, expected[name])
