"""What stands in for lightly's: here the helpers; the losses are compared in tests/nn."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from fastssl.integrations import lightly as ours


@pytest.fixture
def utils(lightly):
    return importlib.import_module("lightly.models.utils")


def _values_and_gradients(function, *inputs):
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    output = function(*leaves)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    output.backward(grad)
    return [output, *(x.grad for x in leaves)]


def _assert_same(mine, theirs, *inputs, **tolerances):
    ours_, theirs_ = (_values_and_gradients(function, *inputs) for function in (mine, theirs))
    torch.testing.assert_close(ours_, theirs_, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_at_index(utils, dtype):
    tokens, index = torch.randn(3, 7, 5, dtype=dtype), torch.rand(3, 7).argsort(1)[:, :4]
    _assert_same(ours.get_at_index, utils.get_at_index, tokens, index)
    _assert_same(ours.set_at_index, utils.set_at_index, tokens, index, torch.randn(3, 4, 5, dtype=dtype))
    _assert_same(ours.mask_at_index, utils.mask_at_index, tokens, index, torch.randn(1, 1, 5))
    ids = torch.arange(21).view(3, 7, 1)
    assert torch.equal(ours.get_at_index(ids, index), utils.get_at_index(ids, index))


@pytest.mark.parametrize("place", [-1, 7])
def test_index_out_of_range(place):
    tokens, index = torch.randn(3, 7, 5), torch.full((3, 1), place)
    for call in (
        lambda: ours.get_at_index(tokens, index),
        lambda: ours.set_at_index(tokens, index, torch.zeros(3, 1, 5)),
        lambda: ours.mask_at_index(tokens, index, torch.zeros(5)),
    ):
        with pytest.raises((IndexError, RuntimeError), match="range|bounds|from 0"):
            call()


@pytest.mark.parametrize("mask_class_token", [False, True])
@pytest.mark.parametrize("length, ratio", [(50, 0.75), (7, 0.0), (7, 1.0), (1, 0.5), (0, 0.5)])
def test_random_token_mask(utils, length, ratio, mask_class_token):
    torch.manual_seed(0)
    keep, mask = ours.random_token_mask((4, length), ratio, mask_class_token)
    for mine, theirs in zip((keep, mask), utils.random_token_mask((4, length), ratio, mask_class_token), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(torch.cat([keep, mask], 1).sort(1).values, torch.arange(length).expand(4, -1))
    if length and not mask_class_token:
        assert not keep[:, 0].any()
    if length == 50:
        assert len({tuple(row) for row in mask.tolist()}) == 4 and not torch.equal(mask[0], mask[0].sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_negative_cosine_similarity(lightly, dtype):
    x = torch.randn(2, 6, 9, dtype=dtype)
    x[0, 2] = 0  # below the least length
    close = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}  # theirs rounds each step
    for dim in (1, 0):
        _assert_same(ours.NegativeCosineSimilarity(dim), lightly.NegativeCosineSimilarity(dim), *x, **close)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (module.NegativeCosineSimilarity()(*x) for module in (ours, lightly))
    torch.testing.assert_close(mine, theirs, check_dtype=False, **(close or {"rtol": 1e-5, "atol": 1e-5}))
    assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_update_momentum(utils):
    student, teacher = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2))
    theirs = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    theirs.load_state_dict(teacher.state_dict())
    for m in (0.9, 0.0):
        ours.update_momentum(student, teacher, m)
        utils.update_momentum(student, theirs, m)
        torch.testing.assert_close(teacher.state_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="momentum"):
        ours.update_momentum(student, teacher, 1.1)


def test_arguments_of_lightly_1_5():
    torch.manual_seed(0)
    z = torch.randn(2, 6, 8, requires_grad=True)
    loss = ours.NTXentLoss(memory_bank_size=16)
    with pytest.raises(TypeError):
        loss(None, z[1])
    loss(*z)
    assert loss.memory_bank.bank.shape == (16, 8) and loss.memory_bank.bank_ptr.item() == 6
    bank = loss.memory_bank
    loss(*z)
    assert loss.memory_bank is bank and bank.bank_ptr.item() == 12
    for size in (-1, (4,), 1.5):
        with pytest.raises((TypeError, ValueError), match="memory_bank_size"):
            ours.NTXentLoss(memory_bank_size=size)
    assert ours.MSNLoss(regularization_weight=0.0, me_max_weight=0.5).regularization_weight == 0.5
    with pytest.raises(AssertionError, match="same shape"):
        ours.VICRegLoss()(torch.randn(4, 3), torch.randn(4, 2))
