"""MoCo's queue, against a list."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastssl
from fastssl.functional import enqueue_, info_nce, similarity_logsumexp
from fastssl.nn import InfoNCELoss, MemoryBank, MemoryBankModule
from fastssl.reference import memory_bank as reference
from tests.inputs import DTYPES, unit

pytestmark = pytest.mark.sanitized


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_the_last_keys_are_kept(size):
    """Batches that divide the queue's size, that do not, none at all, and more than it holds."""
    bank = MemoryBank(size, 3)
    expected, position = bank.keys.clone(), 0
    for seed, batch in enumerate([4, 4, 3, 1, 0, 17, 5, 7, 2, 64, 15]):
        keys = unit(batch, 3, seed=seed)
        for key in keys:
            expected[position] = key
            position = (position + 1) % size
        bank.update(keys)
        assert torch.equal(bank.keys, expected) and bank.position == position, seed


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("new", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_reference(dtype, new, normalize, backend):
    """Numbers of features about a vector's length, any start, batches that wrap around, new keys with gaps."""
    for dim, start, count in ((1, 0, 3), (15, 6, 0), (16, 6, 4), (33, 13, 7), (130, -2, 20), (5, 3, 1)):
        memory = torch.full((count, dim + 3), math.nan, dtype=new)
        new_keys = memory[:, 1:-2].copy_(3 * torch.randn(count, dim, generator=torch.Generator().manual_seed(dim)))
        for rows in (new_keys, new_keys.T.contiguous().T):
            keys, position = torch.randn(7, dim, dtype=torch.float64).to(dtype), torch.tensor(start)
            expected, end = keys.clone(), torch.tensor(start % 7)
            reference.enqueue_(expected, end, rows, normalize)
            enqueue_(keys, position, rows, normalize)
            wide = torch.finfo(torch.promote_types(new, torch.float32)).eps
            tolerance = 2 * torch.finfo(dtype).eps + 4 * wide if normalize else 0
            torch.testing.assert_close(keys, expected, rtol=tolerance, atol=0)
            assert position == end


def test_a_row_is_normalised_as_accurately_as_by_eager_code(backend):
    x = torch.randn(500, 2000, generator=torch.Generator().manual_seed(0))
    keys = torch.full((500, 2000), math.nan)
    enqueue_(keys, torch.tensor(0), x, True)
    exact = F.normalize(x.double(), dim=1)
    assert (keys - exact).norm() <= 2 * (F.normalize(x, dim=1) - exact).norm()


def test_rows_without_length_and_nan(backend):
    """Rows of zeros stay, short ones are x / 1e-12, NaN comes through."""
    keys = torch.ones(4, 3)
    enqueue_(keys, torch.tensor(0), torch.tensor([[0.0, 0, 0], [1e-13, 0, 0], [math.nan, 1, 1], [0, 3, 4]]), True)
    assert keys[0].tolist() == [0, 0, 0] and keys[1].tolist() == pytest.approx([0.1, 0, 0])
    assert keys[2].isnan().all() and keys[3].tolist() == pytest.approx([0, 0.6, 0.8])


def test_new_keys_may_be_old_ones(backend):
    keys = torch.arange(8.0).view(8, 1).repeat(1, 4)
    enqueue_(keys, torch.tensor(6), keys[:4])
    assert keys[:, 0].tolist() == [2, 3, 2, 3, 4, 5, 0, 1]


def test_only_the_queue_is_written(backend):
    """Of a queue with gaps, or transposed: the last `size` keys, and nothing between rows."""
    memory = torch.full((10, 9), math.nan)
    for keys in (memory[1:9:2, 2:7], memory[1:6, 2:8:2].T):
        keys.zero_()
        size, dim = keys.shape
        new_keys = torch.arange(1.0, size + 3)[:, None].expand(-1, dim)
        position = torch.tensor(1)
        enqueue_(keys, position, new_keys)
        assert position == (size + 3) % size
        assert sorted(keys[:, 0].tolist()) == list(range(3, size + 3)) and (keys == keys[:, :1]).all()
        assert memory.isnan().sum() == memory.numel() - keys.numel()
        memory.fill_(math.nan)


def test_autograd_sees_the_change(backend):
    weight, keys = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
    kept = (weight @ keys.T).sum()
    enqueue_(keys, torch.tensor(0), torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_backends_agree():
    results = []
    for name in ("auto", "portable", "reference"):
        keys, position = torch.zeros(5, 3), torch.tensor(3)
        with fastssl.use_backend(name):
            enqueue_(keys, position, torch.arange(12.0).view(4, 3), True)
        results.append((keys, position))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


@pytest.mark.parametrize("suffix", ["_", "_portable_"])
def test_opcheck(suffix):
    args = torch.zeros(5, 3), torch.tensor(3), torch.randn(4, 3), True
    torch.library.opcheck(getattr(torch.ops.fastssl, "enqueue" + suffix).default, args)


KEYS, ZERO = torch.zeros(5, 3), torch.tensor(0)


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
@pytest.mark.parametrize(
    "args, error, match",
    [
        ((KEYS, ZERO, [1.0]), TypeError, "new_keys must be a Tensor, got list"),
        ((KEYS, 0, KEYS), TypeError, "position must be a Tensor, got int"),
        ((KEYS, ZERO.float(), KEYS), ValueError, r"position must be 0-d int64, got torch.float32 of shape \(\)"),
        ((KEYS, ZERO[None], KEYS), ValueError, r"position must be 0-d int64, got torch.int64 of shape \(1,\)"),
        ((KEYS, ZERO, KEYS[:, :2]), ValueError, r"new_keys must have shape \(B, 3\), as keys has it, got \(5, 2\)"),
        ((KEYS, ZERO, KEYS[0]), ValueError, r"new_keys must have shape \(B, D\), got \(3,\)"),
        ((KEYS[:0], ZERO, KEYS), ValueError, r"keys must have at least one row, got shape \(0, 3\)"),
        ((KEYS.long(), ZERO, KEYS), ValueError, "keys must have a floating-point dtype.*int64"),
        ((KEYS, ZERO, KEYS.to("meta")), ValueError, "same device, got cpu and meta"),
        ((torch.zeros(3).expand(5, 3), ZERO, KEYS), ValueError, r"keys must have no two .*strides \(0, 1\)"),
        ((torch.zeros(11).as_strided((5, 3), (2, 1)), ZERO, KEYS), ValueError, r"keys must have no two .*\(2, 1\)"),
    ],
)
def test_bad_queues(args, error, match, chosen):
    with fastssl.use_backend(chosen), pytest.raises(error, match=match):
        enqueue_(*args)


def test_may_normalise_what_it_is_given():
    bank = MemoryBank(4, 3, normalize=True)
    keys = 5 * unit(2, 3)
    bank.update(keys)
    torch.testing.assert_close(bank.keys[:2], unit(2, 3))


def test_is_updated_in_place():
    bank = MemoryBank(8, 3)
    keys, address = bank.keys, bank.keys.data_ptr()
    bank.update(unit(5, 3).requires_grad_())
    assert bank.keys is keys and keys.data_ptr() == address and not keys.requires_grad
    assert torch.equal(keys[:5], unit(5, 3))


def test_starts_with_random_unit_rows():
    torch.manual_seed(0)
    bank = MemoryBank(100, 16)
    torch.testing.assert_close(bank.keys.norm(dim=1), torch.ones(100))
    assert (bank.keys @ bank.keys.T).fill_diagonal_(0).abs().mean() < 0.3


def test_state_dict():
    """Goes on where it was."""
    first, second = MemoryBank(7, 3), MemoryBank(7, 3)
    first.update(unit(5, 3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    for bank in (first, second):
        bank.update(unit(4, 3, seed=1))
    assert torch.equal(first.keys, second.keys) and first.position == second.position == 2
    assert sorted(nn.ModuleDict({"bank": first}).state_dict()) == ["bank.keys", "bank.position"]


def _loss(query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    return info_nce(query, key, negative_keys=keys, temperature=0.2, normalize=False)


def _losses_of_similarities(query: Tensor, key: Tensor, keys: Tensor) -> Tensor:
    return F.softplus(similarity_logsumexp(query, keys, scale=5.0, offset=5 * (query * key).sum(1))).mean()


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
@pytest.mark.parametrize("loss", [_loss, _losses_of_similarities])
def test_may_be_overwritten_before_the_backward_pass(loss, chosen):
    """The queue that a loss saw counts, not the one that is there when it is differentiated."""
    bank = MemoryBank(8, 6)
    steps = [(unit(3, 6, seed=2 * s).requires_grad_(), unit(3, 6, seed=2 * s + 1)) for s in range(4)]
    expected = []
    losses = 0
    for query, key in steps:
        with fastssl.use_backend(chosen):
            expected.append(torch.autograd.grad(loss(query, key, bank.keys.clone()), query)[0])
            losses = losses + loss(query, key, bank.keys)
            bank.update(key)
    for x, y in zip(torch.autograd.grad(losses, [query for query, _ in steps]), expected, strict=True):
        assert torch.equal(x, y)


def test_keys_that_need_a_gradient_must_not_be_overwritten(backend):
    query, keys = unit(3, 6).requires_grad_(), unit(8, 6, seed=1).requires_grad_()
    loss = similarity_logsumexp(query, keys, scale=5.0).sum()
    with torch.no_grad():
        keys[0] = 0
    with pytest.raises(RuntimeError, match="y was modified in place .* version 1, expected 0"):
        loss.backward()


def test_no_copy_of_the_queue(backend):
    """A step with a queue of 64 MiB allocates less than 8, or in the portable code the blocks it works in."""
    bank, loss = MemoryBank(1 << 17, 128), InfoNCELoss(0.2, normalize=False)
    query, key = unit(2, 128).requires_grad_(), unit(2, 128, seed=1)
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
        query, key = unit(5, 6, seed=2 * seed).requires_grad_(), unit(5, 6, seed=2 * seed + 1)
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


@pytest.mark.parametrize("place", [7, -7, 5])
@pytest.mark.parametrize("name", ["auto", "portable", "reference"])
def test_a_position_beyond_the_last_row_goes_round(name, place):
    keys, position = torch.zeros(5, 3), torch.tensor(place)
    with fastssl.use_backend(name):
        enqueue_(keys, position, torch.ones(1, 3))
    assert keys.nonzero()[:, 0].unique().tolist() == [place % 5] and position == (place + 1) % 5


def test_dtypes():
    bank = MemoryBank(4, 3, dtype=torch.bfloat16)
    bank.update(unit(2, 3))
    assert bank.keys.dtype == torch.bfloat16 and torch.equal(bank.keys[:2], unit(2, 3).bfloat16())
    bank.double().update(unit(2, 3))
    assert bank.keys.dtype == torch.float64 and bank.position.dtype == torch.int64 and bank.position == 0


@pytest.mark.parametrize(
    "args, error, match",
    [
        ((0, 8), ValueError, "size must be positive, got 0"),
        ((8, -1), ValueError, "dim must be positive, got -1"),
        (((8, 8), 8), TypeError, "size must be an integer, got tuple"),
    ],
)
def test_bad_arguments(args, error, match):
    with pytest.raises(error, match=match):
        MemoryBank(*args)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 2, 3)])
def test_bad_keys(shape):
    with pytest.raises(ValueError, match=r"keys must have shape \(B, 3\), got"):
        MemoryBank(8, 3).update(torch.ones(shape))


@pytest.mark.parametrize("feature_dim_first", [True, False])
def test_lightlys_module(feature_dim_first, lightly):
    """Its arguments, buffers and returns, while the bank goes round."""
    from lightly.models.modules.memory_bank import MemoryBankModule as Theirs

    modules = []
    for module in (MemoryBankModule, Theirs):
        torch.manual_seed(5)
        modules.append(module(size=(7, 3), gather_distributed=False, feature_dim_first=feature_dim_first))
    ours, theirs = modules
    assert ours.size == theirs.size == (7, 3) and not ours.state_dict() and not theirs.state_dict()
    for seed, batch in enumerate([3, 3, 3, 7, 1, 2]):
        output = unit(batch, 3, seed=seed).requires_grad_()
        before = ours.bank.clone()
        for update in (False, True):
            results = [module(output, labels=None, update=update) for module in modules]
            assert all(result[0] is output for result in results)
            assert torch.equal(results[0][1], results[1][1]) and results[0][1].shape == results[1][1].shape
            assert torch.equal(results[0][1], before.T if feature_dim_first else before)
            assert torch.equal(ours.bank, theirs.bank) and torch.equal(ours.bank_ptr, theirs.bank_ptr)
    for module in (MemoryBankModule(0), Theirs(0)):
        assert module(output, update=True)[0] is output and module(output)[1] is None


@pytest.mark.parametrize(
    ("size", "error", "match"),
    [
        (3, ValueError, r"size must be a \(rows, features\) pair, or 0 for no bank, got 3"),
        ((-1, 8), ValueError, "size must not be negative, got -1"),
        (2.5, TypeError, "size must be an integer, got float"),
        ((2, None), TypeError, "size must be an integer, got NoneType"),
    ],
)
def test_bad_sizes_of_lightlys_module(size, error, match):
    with pytest.raises(error, match=match):
        MemoryBankModule(size)


@pytest.mark.parametrize(("output", "error"), [(torch.ones(2, 4), ValueError), ([[1.0]], TypeError)])
def test_bad_output_for_lightlys_module(output, error):
    bank = MemoryBankModule((7, 3))
    before = bank.bank.clone()
    with pytest.raises(error, match="output must "):
        bank(output, update=True)
    assert torch.equal(bank.bank, before)


def test_a_position_that_is_a_negated_view_is_refused():
    """It used to end the process."""
    position = torch._neg_view(torch.tensor(0))
    with pytest.raises(ValueError, match="position must not be a negated view"):
        enqueue_(torch.zeros(4, 2), position, torch.ones(1, 2))
