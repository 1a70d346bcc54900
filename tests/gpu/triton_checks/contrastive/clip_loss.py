"""CLIP's Triton kernels: values against the float64 formula, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from fastssl import reference
from fastssl.kernels import contrastive as kernels
from fastssl.kernels.contrastive import positives, sums
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.kernels import POINTERS, row_cases
from tests.gpu.triton_checks.common.numerics import DEVICE, INTERPRETED, random_gradient
from tests.gpu.triton_checks.common.pairs import PairTests, rows

module = import_module("fastssl.kernels.contrastive.clip_loss")  # which a function of that name has replaced
LOSSES = Kernel(module._losses, POINTERS)
FACTORS = Kernel(module._factors, POINTERS)

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.few_programs(module, positives)
    interpreter.one_configuration(sums._forward_tile)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    """The kernels over tiles are those of pair_logsumexp, the last one is info_nce's."""
    for normalized in ({}, {"inverse1": None, "inverse2": None}) if sweep else ({},):
        yield from row_cases(LOSSES, "", normalized, capability, sweep, positives.WARPS)
    if sweep or capability == 80:
        yield Case(FACTORS, "clip_loss", capability, "float32", "fp32", (("BR", module.ROWS_OF_FACTORS),))


class TestClipLoss(PairTests):
    launches = 6 + 10, 6 + 11

    def launch(self, x, y, g, scale, normalize, precision):
        *outputs, kept = kernels.clip_loss(x, y, scale, self.label_smoothing, "none", normalize, 0, precision)
        assert all(t.dtype == torch.float32 for t in outputs)
        inputs = g, x, y, scale, *outputs[1:], kept, self.label_smoothing, "none", normalize, precision
        return outputs[0], *kernels.clip_loss_backward(*inputs)

    def losses(self, x, y, scale, normalize):
        if normalize:
            x, y = (F.normalize(z, dim=1) for z in (x, y))
        return reference.contrastive.clip_loss(x, y, scale, label_smoothing=self.label_smoothing, reduction="none")

    @pytest.mark.parametrize("reduction,share", [("sum", 1.0), ("mean", 1 / 9)])
    def test_reductions(self, reduction, share):
        x, y = rows(9, 24)
        s, g = torch.tensor(2.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)
        results = []
        for how, gradient in ((reduction, g), ("none", g.mul(share).expand(9))):
            loss, *outputs = kernels.clip_loss(x, y, s, 0.1, how, True, 0, "float32")
            gradients = kernels.clip_loss_backward(gradient, x, y, s, *outputs, 0.1, how, True, "float32")
            results.append((loss.sum(), *gradients))
        (loss, *gradients), (total, *expected) = results
        torch.testing.assert_close((loss, *gradients), (total * share, *expected))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dim", [24, 140])
    def test_nan_reaches_everything(self, value, dim):
        x, y = rows(70, dim)
        y[5, 7] = value
        assert all(t.isnan().all() for t in self.fused(x, y, random_gradient(70), 2.0))
