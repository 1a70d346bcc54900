"""The drop-in modules, against a transcription of their formulas and against the classes they replace."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastssl
from fastssl.nn import NTXentLoss

pytestmark = pytest.mark.usefixtures("device")


def _views(batch: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, dim, generator=generator).to(dtype).requires_grad_() for _ in range(2))


class Formula(nn.Module):
    """SimCLR's loss, or MoCo's where there is a bank, sample by sample."""

    def __init__(self, temperature: float, bank: Tensor | None = None) -> None:
        super().__init__()
        self.temperature, self.bank, self.position = temperature, bank, 0

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([out0, out1]).double(), dim=1)
        batch, losses = len(out0), []
        for i in range(batch if self.bank is not None else 2 * batch):
            positive = z[i] @ z[(i + batch) % (2 * batch)]
            if self.bank is None:
                others = torch.stack([z[i] @ z[j] for j in range(2 * batch) if j != i])
            else:
                others = torch.cat([positive[None], self.bank @ z[i]])
            losses.append(-(positive / self.temperature).exp().div((others / self.temperature).exp().sum()).log())
        if self.bank is not None and out0.requires_grad:
            self.bank = self.bank.clone()
            for row in z[batch:].detach():
                self.bank[self.position] = row
                self.position += 1
                if self.position == len(self.bank):
                    self.position = 0
                    break
        return torch.stack(losses).mean()


def _step(loss: nn.Module, views: tuple[Tensor, Tensor]) -> list[Tensor]:
    value = loss(*views)
    return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, views))]


def _assert_steps_agree(ours: nn.Module, theirs: nn.Module, batches: list[int], dim: int) -> None:
    for seed, batch in enumerate(batches):
        views = _views(batch, dim, seed)
        for x, y in zip(_step(ours, views), _step(theirs, views), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1, 10, -1.0])
def test_formula(temperature, backend):
    _assert_steps_agree(NTXentLoss(temperature), Formula(temperature), [1, 2, 5, 16], dim=8)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64])
def test_formula_with_memory_bank(size, backend):
    """Batches that end before, at, and past the end of the bank, or are longer than the bank."""
    ours = NTXentLoss(0.2, memory_bank_size=(size, 6))
    theirs = Formula(0.2, ours.memory_bank.bank.double())
    _assert_steps_agree(ours, theirs, [4, 4, 3, 1, 5, 17, 2], dim=6)
    torch.testing.assert_close(ours.memory_bank.bank.double(), theirs.bank)
    assert ours.memory_bank.bank_ptr.tolist() == [theirs.position]


@pytest.mark.parametrize("temperature", [0.07, 0.5, 10, -1.0])
@pytest.mark.parametrize("bank", [0, (1, 6), (8, 6), (64, 6)])
@pytest.mark.parametrize("gather_distributed", [False, True])
def test_lightly(temperature, bank, gather_distributed, lightly_nt_xent_loss, backend):
    """Argument for argument, with the same random bank from the same seed."""
    torch.manual_seed(0)
    theirs = lightly_nt_xent_loss(temperature, bank, gather_distributed)
    torch.manual_seed(0)
    ours = NTXentLoss(temperature, bank, gather_distributed)
    _assert_steps_agree(ours, theirs, [4, 3, 1, 20, 8], dim=6)
    torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
    if bank:
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


def test_lightly_state(lightly_nt_xent_loss):
    """The same parameters, buffers and saved state."""
    ours, theirs = (loss(0.5, (8, 6)) for loss in (NTXentLoss, lightly_nt_xent_loss))
    assert not [*ours.parameters()] and not ours.state_dict() and not theirs.state_dict()
    assert [(n, b.shape, b.dtype) for n, b in ours.named_buffers()] == [
        (n, b.shape, b.dtype) for n, b in theirs.named_buffers()
    ]
    for name in ("temperature", "gather_distributed"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("size", "gather_distributed"):
        assert getattr(ours.memory_bank, name) == getattr(theirs.memory_bank, name)


BAD = [
    ({"temperature": 0.0}, r"temperature .*1e-8.*0\.0"),
    ({"temperature": 1e-9}, r"temperature .*1e-8.*1e-09"),
    ({"memory_bank_size": -1}, r"memory_bank_size .*negative.*-1"),
    ({"memory_bank_size": (-1, 8)}, "memory_bank_size .*negative.*-1"),
    ({"memory_bank_size": 64}, r"memory_bank_size .*pair.*64"),
    ({"memory_bank_size": (64,)}, r"memory_bank_size .*pair.*\(64,\)"),
    ({"memory_bank_size": (2, 3, 4)}, r"memory_bank_size .*pair.*\(2, 3, 4\)"),
]


@pytest.mark.parametrize("kwargs, match", BAD)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        NTXentLoss(**kwargs)


@pytest.mark.parametrize("kwargs, _", BAD)
def test_bad_arguments_are_lightlys(kwargs, _, lightly_nt_xent_loss):
    with pytest.raises(ValueError):
        lightly_nt_xent_loss(**kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"memory_bank_size": (0, 8)}, {"memory_bank_size": [4, 8]}])
def test_good_arguments(kwargs, lightly_nt_xent_loss):
    for loss in (NTXentLoss, lightly_nt_xent_loss):
        assert loss(**kwargs)(*_views(3, 8)).isfinite()


def test_gather_needs_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed"):
        NTXentLoss(gather_distributed=True)


def test_bad_inputs(backend):
    out0, out1 = _views(4, 8)
    for loss in (NTXentLoss(), NTXentLoss(memory_bank_size=(16, 8))):
        with pytest.raises(ValueError, match=r"same shape.*\(4, 8\).*\(1, 8\)"):
            loss(out0, out1[:1])
    with pytest.raises(ValueError, match=r"memory_bank_size.s 6 features.*\(4, 8\)"):
        NTXentLoss(memory_bank_size=(16, 6))(out0, out1)


@pytest.mark.parametrize("temperature", [0.1, 1, 7])
@pytest.mark.parametrize("batch", [1, 2, 8, 16])
def test_all_rows_parallel(batch, temperature, backend):
    """Nothing tells the positive from the negatives: the loss is the logarithm of their number, one pair's is 0."""
    out0, out1 = (torch.rand(batch, 1) * torch.tensor([[1.0, 2.0]]) for _ in range(2))
    out0.requires_grad_()
    assert NTXentLoss(temperature)(out0, out1).item() == pytest.approx(math.log(2 * batch - 1))
    for size in (1, 2, 8, 15, 16, 17):
        loss = NTXentLoss(temperature, (size, 2))
        for _ in range(size // batch + 2):
            value = loss(out0, out1).item()
        assert value == pytest.approx(math.log(size + 1))


def test_bank_is_left_alone_without_gradient():
    loss = NTXentLoss(memory_bank_size=(16, 8))
    before = loss.memory_bank.bank.clone()
    out0, out1 = _views(4, 8)
    with torch.no_grad():
        loss(out0, out1)
    loss(out0.detach(), out1)
    assert torch.equal(loss.memory_bank.bank, before) and loss.memory_bank.bank_ptr == 0
    loss(out0, out1.detach())
    assert torch.equal(loss.memory_bank.bank[4:], before[4:]) and loss.memory_bank.bank_ptr == 4
    torch.testing.assert_close(loss.memory_bank.bank[:4], F.normalize(out1.detach(), dim=1))


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
def test_several_forward_passes_before_a_backward_pass(chosen):
    """The bank that each one saw counts, not the one that the last one left."""
    torch.manual_seed(0)
    loss, apart = NTXentLoss(memory_bank_size=(5, 8)), NTXentLoss(memory_bank_size=(5, 8))
    apart.memory_bank.bank.copy_(loss.memory_bank.bank)
    batches = [_views(4, 8, seed) for seed in range(3)]
    with fastssl.use_backend(chosen):
        gradients = [torch.autograd.grad(apart(*views), views) for views in batches]
        total = sum(loss(*views) for views in batches)
        together = torch.autograd.grad(total, [v for views in batches for v in views])
    for x, y in zip(together, (g for pair in gradients for g in pair), strict=True):
        torch.testing.assert_close(x, y)


def test_no_copy_of_the_bank():
    """A step with a bank of 64 MiB allocates less than 8."""
    loss, views = NTXentLoss(memory_bank_size=(1 << 17, 128)), _views(2, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(*views).backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 1 << 23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bank", [0, (16, 8)])
def test_dtypes(dtype, bank, backend):
    views, exact = _views(6, 8, dtype=dtype), NTXentLoss(memory_bank_size=bank).double()
    loss = NTXentLoss(memory_bank_size=bank)
    loss.memory_bank.bank.copy_(exact.memory_bank.bank)
    value = loss(*views)
    assert value.dtype == dtype
    expected = exact(*(v.double() for v in views))
    torch.testing.assert_close(value.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("bank", [0, (16, 8)])
def test_autocast(bank, backend):
    model, loss = nn.Linear(8, 8), NTXentLoss(memory_bank_size=bank)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model(torch.randn(6, 8)), model(torch.randn(6, 8)))
    assert value.dtype == torch.float32
    value.backward()
    assert model.weight.grad.isfinite().all() and model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bank", [0, (16, 8)])
def test_compile(bank):
    torch._dynamo.reset()
    torch.manual_seed(0)
    ours = NTXentLoss(memory_bank_size=bank)
    torch.manual_seed(0)
    compiled = torch.compile(NTXentLoss(memory_bank_size=bank), fullgraph=True, backend="aot_eager")
    _assert_steps_agree(ours, compiled, [6, 6, 6, 6], dim=8)
    torch.testing.assert_close(ours.memory_bank.bank, compiled.memory_bank.bank)


def test_learnable_temperature():
    temperature = torch.tensor(0.3, requires_grad=True)
    for bank in (0, (16, 8)):
        loss = NTXentLoss(temperature, bank)(*_views(6, 8))
        assert torch.autograd.grad(loss, temperature)[0].abs() > 0


def test_memory_bank_without_rows():
    assert NTXentLoss().memory_bank.bank.shape == (0,)
    assert not list(NTXentLoss(memory_bank_size=(0, 8)).memory_bank.bank)
