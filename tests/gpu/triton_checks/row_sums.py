"""The Triton kernels that add up rows by their ids: values against float64, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from fastssl.kernels import row_sums as kernels
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.kernels import POINTERS
from tests.gpu.triton_checks.common.launches import count_launches
from tests.gpu.triton_checks.common.numerics import DEVICE, INTERPRETED, far_apart, poisoned, random_gradient
from tests.gpu.triton_checks.common.tiles import rows

OWN = POINTERS | {"z": "rows", "weighted": "fp32", "order": "i64", "ids": "i64"}
PIECES, JOIN = (Kernel(getattr(kernels, name), OWN) for name in ("_pieces", "_join"))
ABSENT = {
    "alone": dict.fromkeys(("inverse", "weight", "weighted")),
    "normalised": dict.fromkeys(("weight", "weighted")),
    "both": {},
    "both, as they are": {"inverse": None},
}


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    def case(kernel: Kernel, variant: str, absent: Mapping[str, None], dtype: str, tile: Mapping[str, int]) -> Case:
        constants = ("PIECE", kernels.PIECE), ("WIDTH", tile["WIDTH"]), *absent.items()
        return Case(kernel, variant, capability, "float32", dtype, constants, tile["num_warps"])

    if sweep or capability == 80:
        for variant, absent in ABSENT.items():
            for dtype in ("bf16", "fp16", "fp32"):
                yield case(PIECES, variant, absent, dtype, kernels.ALONG)
        for variant, absent in (("alone", {"weighted": None}), ("both", {})):
            yield case(JOIN, variant, absent, "fp32", kernels.ACROSS)


def ids_of(count: int, many: int) -> Tensor:
    """Half of them are the same one; most of `many` are nobody's where there are more than `count`."""
    ids = torch.randint(0, many, (count,), generator=torch.Generator().manual_seed(count))
    ids[::2] = many // 2
    return ids.to(DEVICE)


def of_formula(z: Tensor, ids: Tensor, many: int) -> Tensor:
    return z.new_zeros((many, z.shape[1]), dtype=torch.float64).index_add_(0, ids, z.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "count, dim, many", [(1, 1, 1), (31, 3, 1), (32, 64, 4), (65, 300, 200), (97, 16, 97), (1300, 5, 1), (2200, 5, 3)]
)
def test_sums(count, dim, many, dtype):
    """Ids of one piece, of several, and of more than are joined at once."""
    z, ids = rows(count, dim, dtype), ids_of(count, many)
    with poisoned():
        sums = kernels.sum_rows(z, ids, many)
    assert sums.dtype == torch.float32 and sums.is_contiguous()
    torch.testing.assert_close(sums.double(), of_formula(z, ids, many), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first, last", [(64, 96), (64, 97), (33, 96), (0, 64), (0, 1088), (5, 1100)])
def test_an_id_between_others(first, last):
    """Which begins or ends with a piece, or in one, and goes on for as many as are joined at once."""
    ids = torch.zeros(1200, dtype=torch.int64, device=DEVICE)
    ids[first:last], ids[last:] = 1, 2
    z = rows(1200, 3)
    with poisoned():
        sums = kernels.sum_rows(z, ids, 3)
    torch.testing.assert_close(sums.double(), of_formula(z, ids, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("count, many", [(1, 1), (97, 3), (1300, 1)])
def test_weighted_sums_beside_them(count, many, normalize):
    z, ids, weight = rows(count, 70 if count < 100 else 10), ids_of(count, many), random_gradient(count)
    inverse = 1 / z.double().norm(dim=1) if normalize else None
    with poisoned():
        sums, weighted = kernels.room_for_sums(z, many), kernels.room_for_sums(z, many)
        kernels.sum_into(sums, many, z, ids, ids.argsort(stable=True), inverse, weight, weighted)
    unit = z.double() if inverse is None else z * inverse[:, None]
    named = ids.unique()
    for mine, exact in ((sums, unit), (weighted, unit * weight[:, None])):
        torch.testing.assert_close(mine[named].double(), of_formula(exact, ids, many)[named], rtol=1e-5, atol=1e-5)


def test_rows_of_other_ids_are_apart():
    """What is not finite is in no other sum."""
    z, ids = rows(70, 8), torch.arange(70, device=DEVICE) // 40
    z[3, 0], z[38, 1] = float("inf"), float("nan")
    sums = kernels.sum_rows(z, ids, 3)
    assert sums[0, 0].isinf() and sums[0, 1].isnan() and sums[1:].isfinite().all() and (sums[2] == 0).all()


def test_strides():
    z, ids = rows(70, 24), ids_of(70, 4)
    wide = torch.full((140, 49), float("nan"), device=DEVICE)
    expected = kernels.sum_rows(z, ids, 4)
    for strided in (z.T.contiguous().T, wide[::2, 1:48:2].copy_(z)):
        assert torch.equal(kernels.sum_rows(strided, ids.repeat_interleave(2)[::2], 4), expected)


def test_offsets_beyond_32_bits():
    z, ids = rows(3, 8, torch.float16), torch.tensor([1, 0, 1], device=DEVICE)
    assert torch.equal(kernels.sum_rows(far_apart(z), ids, 2), kernels.sum_rows(z, ids, 2))


def test_nothing():
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    with poisoned():
        assert torch.equal(kernels.sum_rows(rows(1, 8)[:0], ids, 3), torch.zeros(3, 8, device=DEVICE))
        assert kernels.sum_rows(rows(4, 8)[:, :0], ids_of(4, 2), 2).shape == (2, 0)


@pytest.mark.skipif(not INTERPRETED, reason="launches are counted in the interpreter")
def test_launches():
    z, ids = rows(256, 8), ids_of(256, 5)
    assert count_launches(lambda: kernels.sum_rows(z, ids, 5)) == 4
