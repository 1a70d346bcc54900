"""BarlowTwinsLoss and VICRegLoss, against loops over features and the classes they replace."""

from __future__ import annotations

import importlib
import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from fastssl import nn as ours
from fastssl.functional import covariance_loss, variance_loss

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(2, 1), (2, 7), (3, 2), (10, 10), (9, 40), (40, 9), (64, 100), (100, 64)]


def _views(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two views that have something in common, and deviations of 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    common, *own = (torch.randn(shape, generator=generator) for _ in range(3))
    size = torch.linspace(0.4, 1.2, shape[-1])
    return [((common + 0.7 * x) * size + 0.5).to(dtype).requires_grad_() for x in own]


def _value_and_gradients(loss: nn.Module, views: list[Tensor]) -> list[Tensor]:
    value = loss(*views)
    return [value.detach(), *torch.autograd.grad(value, views)]


def _assert_agree(first: list[Tensor], second: list[Tensor], rtol: float = 1e-4) -> None:
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * y.abs().max().item(), check_dtype=False)


def _barlow_twins_formula(z_a: Tensor, z_b: Tensor, lambda_param: float) -> float:
    """Two features at a time."""
    rows, dim = z_a.shape
    loss = 0.0
    for i in range(dim):
        for j in range(dim):
            x, y = z_a[:, i], z_b[:, j]
            x, y = x - x.sum() / rows, y - y.sum() / rows
            deviations = [math.sqrt((t * t).sum() / rows + 1e-5) for t in (x, y)]
            correlation = (x * y).sum().item() / rows / math.prod(deviations)
            loss += (1 - correlation) ** 2 if i == j else lambda_param * correlation**2
    return loss


def _vicreg_formula(z_a: Tensor, z_b: Tensor, weights: tuple[float, float, float], eps: float) -> float:
    """Two features at a time."""
    rows, dim = z_a.shape
    invariance = sum((x - y) ** 2 for x, y in zip(z_a.flatten().tolist(), z_b.flatten().tolist(), strict=True))
    variance = covariance = 0.0
    for z in (z_a, z_b):
        for i in range(dim):
            variance += max(0.0, 1 - math.sqrt(z[:, i].var().item() + eps)) / dim / 2
            for j in range(dim):
                if i != j:
                    covariance += torch.cov(z[:, [i, j]].T)[0, 1].item() ** 2 / dim
    terms = invariance / (rows * dim), variance, covariance
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


@pytest.mark.parametrize("shape", [(2, 3), (4, 2), (6, 6), (5, 9)])
@pytest.mark.parametrize("lambda_param", [5e-3, 1.0, 0.0])
def test_barlow_twins_formula(shape, lambda_param, backend):
    views = [z.detach() for z in _views(*shape)]
    expected = _barlow_twins_formula(*(z.double() for z in views), lambda_param)
    assert ours.BarlowTwinsLoss(lambda_param)(*views).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shape", [(2, 3), (4, 2), (6, 6), (5, 9)])
@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_vicreg_formula(shape, weights, backend):
    views = [z.detach() for z in _views(*shape)]
    expected = _vicreg_formula(*(z.double() for z in views), weights, 0.01)
    assert ours.VICRegLoss(*weights, eps=0.01)(*views).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, options", [("BarlowTwinsLoss", (0.3,)), ("VICRegLoss", (3.0, 5.0, 0.7, False, 0.02))])
def test_lightly(name, options, shape, lightly, backend):
    """Values, and gradients against those in float64."""
    for arguments in ((), options):
        theirs, mine = (getattr(module, name)(*arguments) for module in (lightly, ours))
        views = _views(*shape)
        double = [z.detach().double().requires_grad_() for z in views]
        torch.testing.assert_close(mine(*views), theirs(*views), rtol=1e-5, atol=1e-5)
        # Of two rows the standardised ones are 1 and -1 whatever they were, and the gradient what eps leaves.
        rtol = 1e-4 if shape[0] > 2 or name == "VICRegLoss" else 0.02
        _assert_agree(_value_and_gradients(mine, views), _value_and_gradients(theirs, double), rtol)


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss"])
def test_lightly_arguments(name, lightly):
    """The same names, order and defaults, and a state of the same emptiness."""
    theirs, mine = getattr(lightly, name), getattr(ours, name)
    for method in ("__init__", "forward"):
        parameters = [
            [(p.name, p.default, p.kind) for p in inspect.signature(getattr(loss, method)).parameters.values()]
            for loss in (mine, theirs)
        ]
        assert parameters[0] == parameters[1]
    for attribute, value in vars(theirs()).items():
        if not attribute.startswith("_") and attribute != "training":
            assert getattr(mine(), attribute) == value
    assert not mine().state_dict() and not list(mine().parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_lightly_terms(shape, dtype, lightly, backend):
    theirs = importlib.import_module("lightly.loss.vicreg_loss")
    z = _views(*shape, dtype=dtype)[:1]
    close = 1e-4 if dtype == torch.float32 else 1e-12
    _assert_agree(_value_and_gradients(variance_loss, z), _value_and_gradients(theirs.variance_loss, z), close)
    _assert_agree(_value_and_gradients(covariance_loss, z), _value_and_gradients(theirs.covariance_loss, z), close)
    torch.testing.assert_close(variance_loss(*z, eps=0.3), theirs.variance_loss(*z, eps=0.3))


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 1, 8), (9, 2, 2, 6)])
def test_vicreg_of_positions(shape, lightly, backend):
    """VICRegL's feature maps: the mean over the positions."""
    views = _views(*shape)
    _assert_agree(_value_and_gradients(ours.VICRegLoss(), views), _value_and_gradients(lightly.VICRegLoss(), views))
    flat = [z.detach().flatten(1, -2) for z in views]
    losses = [ours.VICRegLoss()(*(z[:, i] for z in flat)) for i in range(flat[0].shape[1])]
    torch.testing.assert_close(ours.VICRegLoss()(*views), torch.stack(losses).mean())


@pytest.mark.parametrize("loss", [ours.BarlowTwinsLoss(), ours.VICRegLoss()], ids=["barlow_twins", "vicreg"])
def test_views_are_exchangeable(loss, backend):
    views = _views(12, 8)
    torch.testing.assert_close(loss(*views), loss(*views[::-1]))


def test_what_the_losses_want(backend):
    """0 for views that agree, whose features deviate by 1 and correlate with no other."""
    z = torch.randn(65, 17, generator=torch.Generator().manual_seed(0))
    z = torch.linalg.qr(torch.cat([torch.ones(65, 1), z], 1).double())[0][:, 1:] * 65**0.5
    assert ours.BarlowTwinsLoss()(z, z).item() == pytest.approx(0, abs=1e-8)
    assert ours.VICRegLoss()(z, z).item() == pytest.approx(0, abs=1e-8)
    collapsed = torch.ones_like(z)
    assert ours.BarlowTwinsLoss()(collapsed, collapsed).item() == pytest.approx(17)
    assert ours.VICRegLoss()(collapsed, collapsed).item() == pytest.approx(25 * (1 - 0.01))


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(name, dtype, backend):
    loss, views = getattr(ours, name)(), _views(20, 30, dtype=dtype)
    value, *gradients = _value_and_gradients(loss, views)
    assert [x.dtype for x in (value, *gradients)] == [dtype] * 3
    exact = loss(*(z.detach().double() for z in views))
    torch.testing.assert_close(value.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss"])
def test_autocast(name, backend):
    loss, views = getattr(ours, name)(), _views(20, 30)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*views)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(*views), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss"])
def test_bad_arguments(name, monkeypatch):
    loss, z = getattr(ours, name)(), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"z_a must have at least 2 rows, got shape \(1, 3\)"):
        loss(z[:1], z[:1])
    with pytest.raises(ValueError, match=r"z_a and z_b must have the same shape, got \(4, 3\) and \(3, 3\)"):
        loss(z, z[:3])
    with pytest.raises(TypeError, match="z_b must be a Tensor, got list"):
        loss(z, z.tolist())
    with pytest.raises(ValueError, match="lambda_param must be finite, got nan"):
        getattr(ours, name)(lambda_param=math.nan)
    with pytest.raises(TypeError, match="lambda_param must be a number, got str"):
        getattr(ours, name)("5e-3")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed must be False where torch.distributed is not available"):
        getattr(ours, name)(gather_distributed=True)


def test_bad_arguments_of_vicreg():
    with pytest.raises(ValueError, match="eps must not be negative, got -0.1"):
        ours.VICRegLoss(eps=-0.1)
    with pytest.raises(ValueError, match="nu_param must be finite, got inf"):
        ours.VICRegLoss(nu_param=math.inf)
    with pytest.raises(ValueError, match=r"z_a must have shape \(B, D\), got \(4, 3, 2\)"):
        ours.VICRegLoss()(torch.ones(4, 3, 2), torch.ones(4, 2, 3))


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss"])
def test_gathering_in_one_process(name):
    views = _views(6, 4)
    assert torch.equal(getattr(ours, name)(gather_distributed=True)(*views), getattr(ours, name)()(*views))


def test_repr():
    assert repr(ours.BarlowTwinsLoss(0.1)) == "BarlowTwinsLoss(lambda_param=0.1, gather_distributed=False)"
    assert "nu_param=2.0, gather_distributed=False, eps=0.0001" in repr(ours.VICRegLoss(nu_param=2.0))


def test_vicreg_without_positions():
    with pytest.raises(ValueError, match=r"at least one position, got shape \(4, 0, 5\)"):
        ours.VICRegLoss()(torch.randn(4, 0, 5), torch.randn(4, 0, 5))
