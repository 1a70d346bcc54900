"""SigLIP's Triton kernel: values against the float64 formula, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels import sigmoid
from fastssl.kernels.common.launch import DTYPES
from tests.gpu.triton_checks.common.compile_gate import Case
from tests.gpu.triton_checks.common.kernels import NO_FACTORS, accumulate_cases, collect_cases
from tests.gpu.triton_checks.common.numerics import DEVICE
from tests.gpu.triton_checks.common.tiles import TileTests, both

_ABSENT = {"WEIGHT": "sigmoid", "aligned": None, **NO_FACTORS}
WEIGHTS = {
    "sigmoid": {"EXCLUDE": "row", **_ABSENT},
    "sigmoid_dy": {"EXCLUDE": "column", "losses": None, **_ABSENT},
    "sigmoid_loss": {"EXCLUDE": "row", "gradient": None, "tops": None, "totals": None, **_ABSENT},
}


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    yield from accumulate_cases(WEIGHTS, capability, sweep, largest="sigmoid")
    yield from collect_cases("sigmoid", {"peak": None, "shift": None}, capability, sweep)


class TestSoftplus(TileTests):
    operations = ("softplus",)

    def launch(self, operation, x, y, scale, bias, exclude, precision):
        total, dx, dy, dscale, dbias = sigmoid.similarity_softplus(x, y, scale, bias, exclude, True, precision)
        again, none, nor, zero, _ = sigmoid.similarity_softplus(x, y, scale, bias, exclude, False, precision)
        assert none.shape == nor.shape == (0, x.shape[1]) and zero == 0
        torch.testing.assert_close(again, total, equal_nan=True)
        assert dx.dtype == dy.dtype == torch.float32
        return {"loss": total, "dx": dx, "dy": dy, "dscale": dscale, "dbias": dbias}

    def losses(self, operation, S, bias):
        return {"loss": F.softplus(S + bias, threshold=80).sum(dtype=torch.promote_types(S.dtype, torch.float32))}

    @pytest.mark.parametrize("dim", [24, 140])
    def test_nan_reaches_what_it_touches(self, dim):
        x, y = both(70, 33, dim)
        x.abs_(), y.abs_()
        x[5] = 1.0
        x[5, 7] = float("nan")
        x[6:9] = 0
        result = self.fused("softplus", x, y, 2.0, 0.0, None, "float32")
        assert all(result[name].isnan().all() for name in ("loss", "dscale", "dbias", "dy"))
        assert result["dx"].isnan().any(1).nonzero().tolist() == [[5]]

    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("dim", [24, 140])
    def test_keeps_its_digits(self, dim, precision):
        """Where every similarity is far below 0 the weights are all tiny; where it is huge nothing overflows."""
        x, y = both(65, 33, dim)
        x, y = (t.to(DTYPES[precision]).float() for t in (x, y))
        for bias in (-20.0, -60.0):
            inputs = "softplus", x, y, 3.0, bias, None
            ours, exact = self.fused(*inputs, precision), self.eager(*inputs)
            short = torch.finfo(DTYPES[precision]).eps
            for name, value in exact.items():
                allowed = 1e-5 if name in ("loss", "dbias") else max(short, 1e-5)
                assert (ours[name] - value).norm() <= allowed * value.norm(), name
        near = torch.tensor([[0.0], [1.0], [-1.0]], device=DEVICE)
        for bias in (0.0, 1000.0, -1000.0):
            inputs = "softplus", near, near, 1000.0, bias, None
            ours, exact = self.fused(*inputs, precision), self.eager(*inputs)
            for name, value in exact.items():
                torch.testing.assert_close(ours[name].double(), value, rtol=1e-5, atol=1e-5)
