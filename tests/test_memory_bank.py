"""MoCo's queue, against a list."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.functional import info_nce, similarity_logsumexp
from fastssl.nn import InfoNCELoss, MemoryBank


def _unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_the_last_keys_are_kept(size):
    """Batches that divide the queue's size, that do not, none at all, and more than it holds."""
    bank = MemoryBank(size, 3)
    expected, position = bank.keys.clone(), 0
    for seed, batch in enumerate([4, 4, 3, 1, 0, 17, 5, 7, 2, 64, 15]):
        keys = _unit(batch, 3, seed=seed)
        for key in keys:
            expected[position] = key
            position = (position + 1) % size
        bank.update(keys)
        assert torch.equal(bank.keys, expected) and bank.position == position, seed


def test_is_updated_in_place():
    bank = MemoryBank(8, 3)
    keys, address = bank.keys, bank.keys.data_ptr()
    bank.update(_unit(5, 3).requires_grad_())
    assert bank.keys is keys and keys.data_ptr() == address and not keys.requires_grad
    assert torch.equal(keys[:5], _unit(5, 3))


def test_starts_with_random_unit_rows():
    torch.manual_seed(0)
    bank = MemoryBank(100, 16)
    torch.testing.assert_close(bank.keys.norm(dim=1), torch.ones(100))
    assert (bank.keys @ bank.keys.T).fill_diagonal_(0).abs().mean() < 0.3


def test_state_dict():
    """Goes on where it was."""
    first, second = MemoryBank(7, 3), MemoryBank(7, 3)
    first.update(_unit(5, 3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    for bank in (first, second):
        bank.update(_unit(4, 3, seed=1))
    assert torch.equal(first.keys, second.keys) and first.position == second.position == 2
    assert sorted(nn.ModuleDict({"bank": first}).state_dict()) == ["bank.keys", "bank.position"]


def _loss(query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    return info_nce(query, key, negative_keys=keys, temperature=0.2, normalize=False)


def test_may_be_overwritten_before_the_backward_pass(backend):
    """The queue that a loss saw counts, not the one that is there when it is differentiated."""
    bank = MemoryBank(8, 6)
    steps = [(_unit(3, 6, seed=2 * s).requires_grad_(), _unit(3, 6, seed=2 * s + 1)) for s in range(4)]
    expected = []
    losses = 0
    for query, key in steps:
        expected.append(torch.autograd.grad(_loss(query, key, bank.keys.clone()), query)[0])
        losses = losses + _loss(query, key, bank.keys)
        bank.update(key)
    for x, y in zip(torch.autograd.grad(losses, [query for query, _ in steps]), expected, strict=True):
        assert torch.equal(x, y)


def test_keys_that_need_a_gradient_must_not_be_overwritten(backend):
    query, keys = _unit(3, 6).requires_grad_(), _unit(8, 6, seed=1).requires_grad_()
    loss = similarity_logsumexp(query, keys, scale=5.0).sum()
    with torch.no_grad():
        keys[0] = 0
    with pytest.raises(RuntimeError, match="y was modified in place .* version 1, expected 0"):
        loss.backward()


def test_no_copy_of_the_queue(backend):
    """A step with a queue of 64 MiB allocates less than 8, or in the portable code the blocks it works in."""
    bank, loss = MemoryBank(1 << 17, 128), InfoNCELoss(0.2, normalize=False)
    query, key = _unit(2, 128).requires_grad_(), _unit(2, 128, seed=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value = loss(query, key, bank.keys)
        bank.update(key)
        value.backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 1 << 23


@pytest.mark.parametrize("size", [7, 4])
def test_compile(size):
    torch._dynamo.reset()
    torch.manual_seed(0)
    bank = MemoryBank(size, 6)
    other = MemoryBank(size, 6)
    other.load_state_dict(bank.state_dict())

    def step(bank: MemoryBank, query: Tensor, key: Tensor) -> Tensor:
        loss = _loss(query, key, bank.keys)
        bank.update(key)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        query, key = _unit(5, 6, seed=2 * seed).requires_grad_(), _unit(5, 6, seed=2 * seed + 1)
        pairs = [(step, bank), (compiled, other)]
        values = [(f(b, query, key), b) for f, b in pairs]
        gradients = [torch.autograd.grad(value, query)[0] for value, _ in values]
        torch.testing.assert_close(values[0][0], values[1][0])
        torch.testing.assert_close(*gradients)
        assert torch.equal(bank.keys, other.keys) and bank.position == other.position


def test_update_does_not_wait_for_the_device():
    """Nothing in it needs a value: it runs on tensors that have none."""
    with torch.device("meta"):
        bank = MemoryBank(7, 3)
        bank.update(torch.randn(5, 3))
        bank.update(torch.randn(20, 3))
    assert bank.keys.is_meta and bank.position.is_meta


def test_dtypes():
    bank = MemoryBank(4, 3, dtype=torch.bfloat16)
    bank.update(_unit(2, 3))
    assert bank.keys.dtype == torch.bfloat16 and torch.equal(bank.keys[:2], _unit(2, 3).bfloat16())
    bank.double().update(_unit(2, 3))
    assert bank.keys.dtype == torch.float64 and bank.position.dtype == torch.int64 and bank.position == 0


@pytest.mark.parametrize(
    "args, error, match",
    [
        ((0, 8), ValueError, "size must be at least 1, got 0"),
        ((8, -1), ValueError, "dim must be at least 1, got -1"),
        (((8, 8), 8), TypeError, "size must be an int, got tuple"),
    ],
)
def test_bad_arguments(args, error, match):
    with pytest.raises(error, match=match):
        MemoryBank(*args)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 2, 3)])
def test_bad_keys(shape):
    with pytest.raises(ValueError, match=r"keys must have shape \(B, 3\), got"):
        MemoryBank(8, 3).update(torch.ones(shape))
