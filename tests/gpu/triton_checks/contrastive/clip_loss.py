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
from tests.gpu.triton_checks.common.numerics import INTERPRETED, random_gradient
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

    def launch(self, x, y, g, scale, normalize, precision, reduction="none"):
        *outputs, kept = kernels.clip_loss(x, y, scale, self.label_smoothing, reduction, normalize, 0, precision)
        assert all(t.dtype == torch.float32 for t in outputs)
        inputs = g, x, y, scale, *outputs[1:], kept, self.label_smoothing, reduction, normalize, precision
        return outputs[0], *kernels.clip_loss_backward(*inputs)

    def losses(self, x, y, scale, normalize):
        if normalize:
            x, y = (F.normalize(z, dim=1) for z in (x, y))
        return reference.contrastive.clip_loss(x, y, scale, label_smoothing=self.label_smoothing, reduction="none")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dim", [24, 140])
    def test_nan_reaches_everything(self, value, dim):
        x, y = rows(70, dim)
        y[5, 7] = value
        assert all(t.isnan().all() for t in self.fused(x, y, random_gradient(70), 2.0))
