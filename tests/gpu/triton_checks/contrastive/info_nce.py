"""InfoNCE's Triton kernels: values against the float64 formula, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from fastssl import reference
from fastssl.kernels import contrastive as kernels
from fastssl.kernels.contrastive import positives, sums
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.kernels import PADDED, POINTERS, row_cases
from tests.gpu.triton_checks.common.numerics import DEVICE, INTERPRETED, poisoned, random_gradient
from tests.gpu.triton_checks.common.pairs import PairTests, rows

module = import_module("fastssl.kernels.contrastive.info_nce")  # which a function of that name has replaced
FINISH = Kernel(module._finish, POINTERS, multiples=PADDED)
FACTORS = Kernel(module._factors, POINTERS)
PROJECT = Kernel(positives.project, POINTERS, multiples=PADDED)
NOT_NORMALIZED = {"inverse1": None, "inverse2": None}
NO_SLOPES = {"gradient": None, "query_slope": None, "scale_slope": None}

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.few_programs(module, positives)
    interpreter.one_configuration(sums._forward_tile)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    """The kernels over tiles are those of similarity_logsumexp."""
    for normalized in ({}, NOT_NORMALIZED) if sweep else ({},):
        for variant, absent in (("", {}), ("loss", NO_SLOPES)):
            yield from row_cases(FINISH, variant, {**absent, **normalized}, capability, sweep, positives.WARPS)
        for variant, absent in (("share, extra", {}), ("extra", {"share": None}), ("share", {"extra": None})):
            yield from row_cases(PROJECT, variant, {**absent, **normalized}, capability, sweep, positives.WARPS)
    if sweep or capability == 80:
        yield Case(FACTORS, "info_nce", capability, "float32", "fp32", (("BR", module.ROWS_OF_FACTORS),))


class TestInfoNCE(PairTests):
    launches = 4 + 12, 7 + 12

    def launch(self, x, y, g, scale, normalize, precision, reduction="none"):
        *outputs, kept = kernels.info_nce(x, y, scale, self.label_smoothing, reduction, normalize, True, 0, precision)
        assert all(t.dtype == torch.float32 for t in outputs)
        inputs = g, x, y, scale, *outputs[1:], kept, self.label_smoothing, reduction, True, normalize, precision
        return outputs[0], *kernels.info_nce_backward(*inputs)

    def losses(self, x, y, scale, normalize):
        named = {"normalize": normalize, "label_smoothing": self.label_smoothing, "reduction": "none"}
        return reference.contrastive.info_nce(x, y, temperature=1 / scale, **named)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dim", [24, 140])
    def test_nan_reaches_what_it_touches(self, value, dim):
        g = random_gradient(70)
        x, y = rows(70, dim)
        x[5, 7] = value
        loss, dx, dy, dscale = self.fused(x, y, g, 2.0)
        assert loss.isnan().nonzero().tolist() == dx.isnan().any(1).nonzero().tolist() == [[5]]
        assert dy.isnan().all() and dscale.isnan()
        x, y = rows(70, dim)
        y[5, 7] = value
        assert all(t.isnan().all() for t in self.fused(x, y, g, 2.0))

    @pytest.mark.parametrize("dim", [24, 140])
    def test_what_is_not_wanted_changes_nothing(self, dim):
        (x, y), g, s = rows(70, dim), random_gradient(70), torch.tensor(5.0, device=DEVICE)
        with poisoned():
            *outputs, kept = kernels.info_nce(x, y, s, 0.1, "none", True, True, 0, "float32")
            *same, none, nothing, _ = kernels.info_nce(x, y, s, 0.1, "none", True, False, 0, "float32")
            assert none.shape == (0, dim) and nothing.shape == (0,)
            for mine, other in zip(same, outputs[:4], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            arguments = g, x, y, s, *outputs[1:], kept, 0.1, "none"
            grad_query, grad_key, grad_scale = kernels.info_nce_backward(*arguments, True, True, "float32")
            of_query, none, of_scale = kernels.info_nce_backward(*arguments, False, True, "float32")
        assert grad_key.shape == y.shape and none.shape == (0, dim)
        assert torch.equal(of_query, grad_query) and torch.equal(of_scale, grad_scale)
