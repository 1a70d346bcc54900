"""Sinkhorn-Knopp and the center of a teacher: what the generic tests cannot know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.functional import ema_update_, sinkhorn_center, sinkhorn_knopp, update_center_
from tests.accuracy import with_tensors

pytestmark = pytest.mark.usefixtures("device")


def _logits(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def _by_scaling(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """As SwAV's code and DINOv2's have it: exponentials, prototype by prototype and sample by sample."""
    share = (logits / temperature).exp().T
    share /= share.sum()
    for _ in range(iterations):
        share /= share.sum(1, keepdim=True) * share.shape[0]
        share /= share.sum(0, keepdim=True) * share.shape[1]
    return share.T * share.shape[1]


@pytest.mark.parametrize("iterations", [1, 2, 3, 8])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_assignments_are_those_of_alternate_scaling(iterations, temperature, backend):
    logits = _logits(33, 20, scale=0.3)
    expected = _by_scaling(logits.double(), temperature, iterations)
    result = sinkhorn_knopp(logits, temperature=temperature, iterations=iterations)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e30])
def test_scales_at_which_exponentials_overflow(scale, kernels):
    """Each sample has a prototype of its own, which it is assigned to, whatever the scale."""
    logits = scale * (10 * torch.eye(9) + _logits(9, 9, scale=1e-3))
    assert not _by_scaling(logits, 0.04, 3).isfinite().all()
    torch.testing.assert_close(sinkhorn_knopp(logits), torch.eye(9))


def test_prototypes_get_equal_shares(backend):
    shares = sinkhorn_knopp(_logits(64, 16), temperature=0.3, iterations=50).sum(0)
    torch.testing.assert_close(shares, torch.full((16,), 4.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count, prototypes", [(1, 1023), (7, 1024), (9, 1025), (13, 2049), (70, 31), (130, 3)])
def test_every_edge_of_a_block(count, prototypes, dtype, kernels):
    """Of rows and of columns."""
    logits = _logits(count, prototypes, dtype=dtype)
    center = torch.zeros(prototypes)
    update_center_(center, logits, 0.0)
    torch.testing.assert_close(center.double(), logits.double().mean(0), rtol=1e-5, atol=1e-6)
    for iterations in (1, 2):
        options = {"temperature": 0.3, "iterations": iterations}
        for function in (sinkhorn_center, sinkhorn_knopp):
            expected = function(logits.double(), **options)
            torch.testing.assert_close(function(logits, **options).double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("prototypes", [65600, 140000])
def test_more_prototypes_than_the_cache_holds_rows_of(prototypes):
    logits = _logits(5, prototypes, scale=0.1)
    torch.testing.assert_close(sinkhorn_center(logits).double(), sinkhorn_center(logits.double()), rtol=1e-5, atol=1e-6)


def test_same_bits_with_any_number_of_threads():
    logits, results = _logits(520, 700, scale=0.2), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        center = torch.zeros(700)
        update_center_(center, logits)
        results.append((sinkhorn_center(logits), sinkhorn_knopp(logits), center))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_rows_are_one_batch_in_whatever_tensors_they_come(backend):
    logits = _logits(12, 7, scale=0.2)
    expected = sinkhorn_center(logits)
    for pieces in ([logits[:5], logits[5:]], logits.view(3, 4, 7), [logits[:4], logits[4:].view(2, 4, 7), logits[:0]]):
        torch.testing.assert_close(sinkhorn_center(pieces), expected, rtol=1e-6, atol=1e-6)
        whole, parts = torch.ones(7), torch.ones(7)
        update_center_(whole, logits)
        update_center_(parts, pieces)
        torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(sinkhorn_knopp(logits.view(3, 4, 7)).view(12, 7), sinkhorn_knopp(logits))


def test_a_teacher_is_a_constant(backend):
    logits = _logits(6, 5).requires_grad_()
    assert not sinkhorn_center(logits).requires_grad and not sinkhorn_knopp(logits).requires_grad

    def loss(x: Tensor) -> Tensor:
        return (x * sinkhorn_knopp(x)).sum()

    torch.testing.assert_close(torch.func.grad(loss)(logits), sinkhorn_knopp(logits))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_a_tensor_is_not_waited_for(temperature, backend):
    assert sinkhorn_center(_logits(6, 5), temperature=torch.tensor(temperature)).isnan().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_is_not_hidden(poison, kernels):
    logits = _logits(40, 70)
    logits[3, 65] = poison
    assert sinkhorn_center(logits).isnan().all()
    assert sinkhorn_knopp(logits, iterations=1)[3].isnan().all()
    center = torch.zeros(70)
    update_center_(center, logits)
    assert not center[65].isfinite() and center[:65].isfinite().all()


def test_minus_infinity_is_a_prototype_that_a_row_does_not_have(kernels):
    """It may be the first logit of a row and of a column, and fill a chunk."""
    logits = _logits(40, 2100, scale=0.2)
    logits[0, :1500] = logits[1:9, 0] = -float("inf")
    center = sinkhorn_center(logits)
    assert center.isfinite().all()
    torch.testing.assert_close(center.double(), sinkhorn_center(logits.double()), rtol=1e-5, atol=1e-6)
    assert (sinkhorn_knopp(logits)[0, :1500] == 0).all()


def test_center_is_that_of_dino(backend):
    """Its buffer of shape (1, K); in place, so that autograd knows."""
    center, logits = _logits(1, 30), 5 + _logits(20, 30)
    expected = 0.9 * center + 0.1 * logits.mean(0, keepdim=True)
    version = center._version
    update_center_(center, logits)
    torch.testing.assert_close(center, expected)
    assert center._version > version


def test_center_of_extreme_momentum_is_a_moving_average_s(backend):
    """0 copies, whatever center holds; 1 changes nothing; rows that agree with it leave every bit as it is."""
    for momentum, before in ((0.0, float("nan")), (1.0, 3.0), (0.3, 0.5)):
        center, logits = torch.full((4,), before), torch.full((8, 4), 0.5)
        expected = center.clone()
        ema_update_([expected], [logits[0]], momentum)
        update_center_(center, logits, momentum)
        torch.testing.assert_close(center, expected, rtol=0, atol=0)


def test_without_rows_the_center_stays(backend):
    center = torch.ones(4)
    update_center_(center, torch.empty(0, 4))
    update_center_(center, torch.empty(2, 0, 4))
    update_center_(center, torch.empty(0, 3, 4))
    assert (center == 1).all()
    assert sinkhorn_center(torch.empty(0, 4)).isnan().all() and sinkhorn_knopp(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.skipif(fastssl._native.status()["_C"] is not None, reason="needs the C++ library")
@pytest.mark.parametrize(
    "name, args, match",
    [
        ("column_logsumexp", ([], 1.0), "at least one matrix"),
        ("column_logsumexp", ([torch.ones(2, 3), torch.ones(2, 4)], 1.0), "must have shapes"),
        ("column_logsumexp", ([torch.ones(2, 3), torch.ones(2, 3).half()], 1.0), "must have shapes"),
        ("column_sums", ([torch.ones(3)],), "at least one matrix"),
        ("column_sums", ([torch.ones(3, 2).long()],), "float32, bfloat16 or float16"),
        ("assignment_sums", ([torch.ones(2, 3)], torch.ones(2), 1.0), "center must be float32 of shape"),
        ("assignments", (torch.ones(2, 3), torch.ones(3).half(), 1.0), "center must be float32 of shape"),
    ],
)
def test_kernels_read_nothing_out_of_bounds(name, args, match):
    with pytest.raises(ValueError, match=match):
        getattr(torch.ops.fastssl, name)(*with_tensors(args))
