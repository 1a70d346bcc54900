"""Log-sum-exps of similarities with chosen rows: values against float64, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastssl.kernels.contrastive import selected_logsumexp, selected_logsumexp_backward
from fastssl.kernels.contrastive.selected_logsumexp import (
    BD,
    BK,
    BLOCK,
    exponentials,
    scale_rows,
    selected_dots,
    through_norms,
    weighted_sums,
)
from fastssl.ops.contrastive.selected_logsumexp import _backward, _forward
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.launches import count_launches
from tests.gpu.triton_checks.common.numerics import (
    DEVICE,
    INTERPRETED,
    assert_as_accurate,
    far_apart,
    poisoned,
    random_gradient,
)

_FLOATS = ("divisor", "scale", "weights", "weighted", "S", "total", "shift", "gradient", "factor", "norms", "out")
_POINTERS = {"x": "rows", "y": "rows", "z": "rows", **dict.fromkeys(_FLOATS, "fp32"), "share": "fp64"}
_POINTERS |= dict.fromkeys(("ids", "order", "first"), "i64")
_KERNELS = [
    Kernel(f, {name: kind for name, kind in _POINTERS.items() if name in f.arg_names}, (), ("x_row", "y_row", "z_row"))
    for f in (selected_dots, exponentials, weighted_sums, scale_rows, through_norms)
]
_OF_LISTS = {"factor": None, "order": None, "first": None}
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    for rows in ("fp32", "bf16", "fp16") if sweep else ("fp32", "bf16"):
        for kernel in _KERNELS:
            sizes = {"BLOCK": BLOCK} if "BLOCK" in kernel.jit.arg_names else {"BK": BK, "BD": BD}
            variants = [{}]
            if kernel.function is weighted_sums:
                variants = [{"ids": None}, _OF_LISTS]
            elif "divisor" in kernel.pointers:
                variants.append({"divisor": None})
            for absent in variants:
                constants = tuple({**sizes, **absent}.items())
                yield Case(kernel, "plain" if absent else "all", capability, "float32", rows, constants)


def _inputs(rows: int, count: int, dim: int, choices: int, dtype: torch.dtype) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dim, generator=source).to(DEVICE, dtype) for n in (rows, count))
    ids = torch.randint(-2, count, (rows, choices), generator=source)  # some name none, and some rows are named often
    ids[:, ::3] = ids[:, ::3].clamp(max=count // 2)
    if rows > 2:
        ids[1] = -1
    return [x, y, ids.to(DEVICE), torch.tensor([0.6], device=DEVICE)]


def _found(functions, inputs: list[Tensor], gradient: Tensor, normalize: bool) -> dict[str, Tensor]:
    forward, backward = functions
    names = "total", "shift", "weighted", "exponentials", "norms"
    with poisoned():
        kept = dict(zip(names, forward(*inputs, normalize, True), strict=True))
        alone = dict(zip(names, forward(*inputs, normalize, False), strict=True))
        gradients = backward(gradient, *inputs, *list(kept.values())[1:], True, normalize)
        partial = backward(gradient, *inputs, *list(kept.values())[1:], False, normalize)
    for name in ("total", "shift"):
        assert torch.equal(alone[name], kept[name])
    assert len(alone["weighted"]) == len(alone["exponentials"]) == len(partial[1]) == 0
    assert torch.equal(partial[0], gradients[0]) and torch.equal(partial[2], gradients[2])
    return {**kept, **dict(zip(("dx", "dy", "dscale"), gradients, strict=True))}


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "rows, count, dim, choices", [(1, 1, 1, 1), (5, 9, 70, 40), (70, 6, 24, 3), (3, 4, 130, 0), (3, 50, 8, 2)]
)
def test_values(rows, count, dim, choices, normalize, dtype):
    inputs, gradient = _inputs(rows, count, dim, choices, dtype), random_gradient(rows)
    ours = _found((selected_logsumexp, selected_logsumexp_backward), inputs, gradient, normalize)
    wide = [z.double() if z.is_floating_point() else z for z in inputs]
    exact = _found((_forward, _backward), wide, gradient.double(), normalize)
    theirs = _found((_forward, _backward), inputs, gradient, normalize)
    assert {name: (z.shape, z.dtype) for name, z in ours.items()} == {n: (z.shape, z.dtype) for n, z in theirs.items()}
    floor = {name: EPS[dtype] * z.norm().item() + 1e-6 for name, z in exact.items()}
    assert_as_accurate(ours, exact, theirs, floor)


def test_rows_that_nobody_names_are_not_read():
    x, y, ids, scale = _inputs(6, 20, 40, 4, torch.float32)
    ids.clamp_(max=9)
    y[12] = float("nan")
    found = _found(
        (selected_logsumexp, selected_logsumexp_backward), [x, y, ids, scale], torch.ones(6).to(DEVICE), True
    )
    assert all(z.isfinite().all() for name, z in found.items() if name != "norms") and not found["dy"][10:].any()


def test_strides():
    x, y, ids, scale = _inputs(6, 9, 40, 5, torch.bfloat16)
    spread = [x.T.contiguous().T, torch.stack([y, y], 1).flatten(0, 1)[::2], torch.cat([ids, ids], 1)[:, :5], scale]
    functions, gradient = (selected_logsumexp, selected_logsumexp_backward), random_gradient(6)
    found, expected = (_found(functions, inputs, gradient, True) for inputs in (spread, [x, y, ids, scale]))
    assert all(torch.equal(found[name], z) for name, z in expected.items())


def test_offsets_beyond_32_bits():
    x, y, ids, scale = _inputs(4, 3, 8, 2, torch.bfloat16)
    functions, gradient = (selected_logsumexp, selected_logsumexp_backward), random_gradient(4)
    far = [far_apart(x), far_apart(y), ids, scale]
    found, expected = (_found(functions, inputs, gradient, True) for inputs in (far, [x, y, ids, scale]))
    assert all(torch.equal(found[name], z) for name, z in expected.items())


@pytest.mark.skipif(not INTERPRETED, reason="launches are counted in the interpreter")
def test_launches():
    inputs, gradient, kept = _inputs(70, 50, 24, 3, torch.bfloat16), random_gradient(70), []
    assert count_launches(lambda: kept.extend(selected_logsumexp(*inputs, True, True))) == 9
    assert count_launches(lambda: selected_logsumexp_backward(gradient, *inputs, *kept[1:], True, True)) == 8
