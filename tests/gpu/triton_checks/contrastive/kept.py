"""Products that a forward pass keeps: the backward pass reads them, and both passes give what they give without."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastssl.kernels import contrastive as kernels
from fastssl.kernels.contrastive import sums
from tests.gpu.triton_checks.common.compile_gate import Case
from tests.gpu.triton_checks.common.kernels import WEIGH, in_blocks, kept_cases
from tests.gpu.triton_checks.common.numerics import DEVICE, INTERPRETED, poisoned, random_gradient
from tests.gpu.triton_checks.common.tiles import both
from tests.gpu.triton_checks.contrastive.logsumexp import FORWARD, SUMS, WEIGHTS

OF_SUMS = {f"{name}_kept": {**SUMS[name], "step_j": 1} for name in ("self", "pair")}
OF_WEIGHTS = {f"{name}_kept": in_blocks(WEIGHTS[name]) for name in ("pair", "dy", "softmax")}
for constants, step in zip(OF_WEIGHTS.values(), ("step_j", "step_i", "step_j"), strict=True):
    del constants["kept"], constants["step_i"], constants["step_j"]
    constants[step] = 1
# Of each operation: the sizes of its matrix, and both passes with `keep` bytes and what becomes of them in between.
SIZES = {"similarity": (70, 37), "pair": (37, 70), "flat": (170, 37), "self": (170, 170)} | dict.fromkeys(
    ("nt_xent", "clip_loss", "info_nce"), (140, 140)
)
Between = Callable[[Tensor], Tensor]

if INTERPRETED:
    from tests.gpu.triton_checks.common import interpreter

    interpreter.one_configuration(sums._forward_tile)


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    yield from kept_cases(FORWARD, OF_SUMS, capability, sweep, ({"T": 64}, {"T": 128}))
    yield from kept_cases(WEIGH, OF_WEIGHTS, capability, sweep)


def both_passes(name: str, x: Tensor, y: Tensor, keep: int, precision: str, between: Between) -> list[Tensor]:
    s, g = torch.tensor(5.0, device=DEVICE), random_gradient(x.shape[0])
    if name == "similarity":
        *outputs, kept = kernels.similarity_logsumexp(x, y, s, None, True, keep, precision)
        total, shift, weighted = outputs
        backward = kernels.similarity_logsumexp_backward
        return [*outputs, *backward(g / total, x, y, s, None, shift, weighted, between(kept), True, precision)]
    if name in ("pair", "flat"):
        *outputs, kept = kernels.pair_logsumexp(x, y, s, None, keep, precision)
        row_total, row_shift, column_total, column_shift = outputs
        grads = g / row_total, random_gradient(y.shape[0]) / column_total
        backward = kernels.pair_logsumexp_backward
        return [*outputs, *backward(*grads, x, y, s, None, row_shift, column_shift, between(kept), precision)]
    if name == "self":
        total, shift, kept = kernels.self_logsumexp(x, s, keep, precision)
        return [total, shift, *kernels.self_logsumexp_backward(g / total, x, s, shift, between(kept), precision)]
    if name == "nt_xent":
        z1, z2 = x.chunk(2)
        *outputs, kept = kernels.nt_xent(z1, z2, s, True, keep, precision)
        return [*outputs, *kernels.nt_xent_backward(g, z1, z2, s, *outputs[1:], between(kept), True, precision)]
    if name == "clip_loss":
        *outputs, kept = kernels.clip_loss(x, y, s, 0.1, "none", True, keep, precision)
        inputs = g, x, y, s, *outputs[1:], between(kept), 0.1, "none", True, precision
        return [*outputs, *kernels.clip_loss_backward(*inputs)]
    *outputs, kept = kernels.info_nce(x, y, s, 0.1, "none", True, True, keep, precision)
    inputs = g, x, y, s, *outputs[1:], between(kept), 0.1, "none", True, True, precision
    return [*outputs, *kernels.info_nce_backward(*inputs)]


@pytest.mark.parametrize("dim,precision", [(24, "float32"), (140, "tf32")])
@pytest.mark.parametrize("name", SIZES)
def test_kept_products_change_nothing(name, dim, precision):
    rows, columns = SIZES[name]
    x, y = both(rows, columns, dim)
    whole = 4 * (rows + 127 & -128) * (columns + 127 & -128)

    def run(keep: int, between: Between = lambda kept: kept) -> list[Tensor]:
        with poisoned():
            return both_passes(name, x, y, keep, precision, between)

    expected = run(0)
    for mine, other in zip(run(whole), expected, strict=True):
        if INTERPRETED:  # where products have the same bits in tiles of any shape
            assert torch.equal(mine, other)
        else:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    for mine, other in zip(run(whole - 4), expected, strict=True):  # too little to keep all
        assert torch.equal(mine, other)
    others = run(whole, torch.zeros_like)  # the backward pass reads them: it is led astray
    assert not all(torch.allclose(mine, other) for mine, other in zip(others, expected, strict=True))


def test_what_reads_no_products_keeps_none():
    x, y = both(33, 33, 24, "bfloat16")
    s = torch.tensor(5.0, device=DEVICE)
    for precision in ("bfloat16", "tf32"):  # rows are in registers there
        *_, kept = kernels.pair_logsumexp(x, y, s, None, 4 * 128 * 128, precision)
        assert kept.shape == (4 * 128 * 128,) and not kept.any()
