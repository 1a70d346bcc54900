"""The drop-in modules but NTXentLoss, against transcriptions of their formulas and the classes they replace."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastssl
from fastssl import nn as ours

pytestmark = pytest.mark.usefixtures("device")


def _rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, unit: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (F.normalize(x, dim=-1) if unit else x).to(dtype).requires_grad_()


def _value_and_gradients(loss: nn.Module, inputs: list, *others) -> list[Tensor]:
    value = loss(*inputs, *others)
    leaves = [x for x in inputs if isinstance(x, Tensor)]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _assert_agree(first: list[Tensor], second: list[Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, check_dtype=False)


@pytest.fixture(scope="module")
def metric_learning() -> ModuleType:
    return pytest.importorskip("pytorch_metric_learning.losses")


def _clip_formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = scale * image @ text.T
    own = torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _siglip_formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = scale * image @ text.T + (0 if bias is None else bias)
    return -F.logsigmoid(logits * (2 * torch.eye(len(image)) - 1)).sum() / len(image)


FORMULAS = {"ClipLoss": _clip_formula, "SigLipLoss": _siglip_formula}


def _clip_inputs(batch: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (9.0, -4.0))
    return [_rows(batch, dim, dtype=dtype), _rows(batch, dim, seed=1, dtype=dtype), scale, bias]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("batch, dim", [(1, 3), (2, 8), (9, 5), (40, 16)])
def test_clip_formulas(name, batch, dim, backend):
    inputs = _clip_inputs(batch, dim)
    expected = _value_and_gradients(FORMULAS[name], inputs[:3] if name == "ClipLoss" else inputs)
    if name == "ClipLoss":
        expected.append(torch.tensor(0.0))  # a bias common to all logits changes nothing, and says so
    _assert_agree(_value_and_gradients(getattr(ours, name)(), inputs), expected)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("element", [(), (1,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 32])
def test_open_clip(name, element, bias, batch, open_clip, backend):
    image, text, *scalars = _clip_inputs(batch, 12)
    scalars = [s.detach().reshape(element).requires_grad_() for s in scalars]
    inputs = [image, text, *(scalars if bias else scalars[:1])]
    others = () if bias else (None,)
    theirs, mine = getattr(open_clip, name)(), getattr(ours, name)()
    _assert_agree(_value_and_gradients(mine, inputs, *others), _value_and_gradients(theirs, inputs, *others))
    for loss in (mine, theirs):
        output = loss(image, text, scalars[0], logit_bias=scalars[1], output_dict=True)
        assert list(output) == ["contrastive_loss"] and output["contrastive_loss"].shape == ()


@pytest.mark.parametrize("name", FORMULAS)
def test_open_clip_attributes(name, open_clip):
    theirs, mine = getattr(open_clip, name), getattr(ours, name)
    for attribute, value in vars(theirs()).items():
        if not attribute.startswith("_") and attribute not in ("prev_num_logits", "labels", "training"):
            assert getattr(mine(), attribute) == value
    assert not mine().state_dict() and not list(mine().parameters())


def _parameters(function) -> list[tuple]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_clip_dtypes(name, dtype, backend):
    inputs = _clip_inputs(6, 8, dtype)
    loss = getattr(ours, name)()(*inputs)
    assert loss.dtype == dtype
    exact = FORMULAS[name](*(x.detach().double() for x in inputs))
    torch.testing.assert_close(loss.detach().double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert [g.dtype for g in torch.autograd.grad(loss, inputs)] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("name", FORMULAS)
def test_clip_autocast(name, backend):
    inputs = _clip_inputs(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = getattr(ours, name)()(*inputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, FORMULAS[name](*inputs), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_clip_numbers(name):
    """Scale and bias may be numbers."""
    image, text, *_ = _clip_inputs(6, 8)
    torch.testing.assert_close(getattr(ours, name)()(image, text, 9.0, -4.0), FORMULAS[name](image, text, 9.0, -4.0))


def test_clip_bad_arguments():
    with pytest.raises(ValueError, match="use_horovod must be False.*True"):
        ours.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl must be None, 'bidir'.*got 'ring'"):
        ours.SigLipLoss(dist_impl="ring")
    image, text, scale, bias = _clip_inputs(6, 8)
    for loss in (ours.ClipLoss, ours.SigLipLoss):
        with pytest.raises(ValueError, match=r"rank and world_size must be .*default group.*got \(1, 2\)"):
            loss(rank=1, world_size=2)(image, text, scale, bias)
        with pytest.raises(ValueError, match=r"same shape, got \(6, 8\) and \(5, 8\)"):
            loss()(image, text[:5], scale, bias)
        with pytest.raises(ValueError, match=r"logit_scale must be .* shape \(2,\)"):
            loss()(image, text, torch.ones(2), bias)


class SupConFormula(nn.Module):
    """Anchor by anchor."""

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature, self.mode, self.factor = temperature, contrast_mode, temperature / base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        batch, views = features.shape[:2]
        features = features.flatten(2)
        labels = list(range(batch)) if labels is None else labels.tolist()
        places = [(b, v) for v in range(views) for b in range(batch)]
        losses = []
        for b, v in places if self.mode == "all" else [(b, 0) for b in range(batch)]:
            others = [place for place in places if place != (b, v)]
            if not others:
                losses.append(features.sum() * 0)
                continue
            similarities = torch.stack([features[b, v] @ features[o] for o in others]) / self.temperature
            positive = torch.tensor([labels[o[0]] == labels[b] for o in others])
            log_probabilities = similarities.log_softmax(0)[positive]
            losses.append(-log_probabilities.sum() / max(len(log_probabilities), 1))
        return self.factor * torch.stack(losses).mean()


LABELS = {"none": None, "some": [3, 1, 3, 0, 1, 7], "all": [2] * 6, "own": [5, 0, 1, 2, 4, 3]}


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("labels", LABELS)
def test_supcon_formula(mode, views, labels, backend):
    features = _rows(6, views, 8)
    labels = LABELS[labels] and torch.tensor(LABELS[labels])
    for temperatures in ((0.07, 0.07), (0.5, 0.07)):
        args = temperatures[0], mode, temperatures[1]
        _assert_agree(
            _value_and_gradients(ours.SupConLoss(*args), [features], labels),
            _value_and_gradients(SupConFormula(*args), [features], labels),
        )


def test_supcon_does_not_normalise(backend):
    features = _rows(4, 2, 8, unit=False)
    for mode in ("all", "one"):
        torch.testing.assert_close(ours.SupConLoss(1.0, mode)(features), SupConFormula(1.0, mode)(features))


def test_supcon_flattens_what_follows(backend):
    features = _rows(4, 2, 3, 5)
    for mode in ("all", "one"):
        torch.testing.assert_close(
            ours.SupConLoss(0.5, mode)(features), ours.SupConLoss(0.5, mode)(features.flatten(2))
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_supcon_labels(dtype, shape):
    labels = torch.tensor(LABELS["some"])
    features = _rows(6, 2, 8)
    assert torch.equal(
        ours.SupConLoss()(features, labels.to(dtype).reshape(shape)), ours.SupConLoss()(features, labels)
    )


def test_supcon_without_labels_is_simclr(backend):
    features = _rows(6, 2, 8)
    value = ours.NTXentLoss(0.07)(*features.unbind(1))
    torch.testing.assert_close(ours.SupConLoss()(features), value)


def test_supcon_metric_learning(metric_learning, backend):
    """Where every row has a positive. It normalises."""
    features, labels = _rows(8, 8, unit=False), torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])
    expected = _value_and_gradients(lambda x: metric_learning.SupConLoss(temperature=0.2)(x, labels), [features])
    loss = ours.SupConLoss(0.2, base_temperature=0.2)
    _assert_agree(_value_and_gradients(lambda x: loss(F.normalize(x, dim=1)[:, None], labels), [features]), expected)


def test_supcon_bad_arguments(backend):
    with pytest.raises(ValueError, match="contrast_mode must be 'all' or 'one', got 'two'"):
        ours.SupConLoss(contrast_mode="two")
    loss, features = ours.SupConLoss(), _rows(6, 2, 8)
    with pytest.raises(ValueError, match="mask must be None.*Tensor"):
        loss(features, mask=torch.eye(6))
    with pytest.raises(ValueError, match=r"features must have shape \(B, V, ...\), got \(6, 8\)"):
        loss(features[:, 0])
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\).*got \(5,\)"):
        loss(features, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels must have dtype torch.int64, got torch.float32"):
        loss(features, torch.zeros(6))


class DCLFormula(nn.Module):
    """Row by row."""

    def __init__(self, temperature: float = 0.1, weight_fn=None) -> None:
        super().__init__()
        self.temperature, self.weight_fn = temperature, weight_fn

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        views = [F.normalize(x, dim=1) for x in (out0, out1)]
        losses = []
        for z, other in (views, views[::-1]):
            weight = torch.ones(len(z)) if self.weight_fn is None else self.weight_fn(z, other)
            for i in range(len(z)):
                rest = [y[j] @ z[i] / self.temperature for y in (z, other) for j in range(len(z)) if j != i]
                losses.append(torch.stack(rest).logsumexp(0) - weight[i] * (z[i] @ other[i]) / self.temperature)
        return torch.stack(losses).mean()


def _distance(out0: Tensor, out1: Tensor) -> Tensor:
    """One that tells its arguments apart."""
    return ((out0 - 2 * out1) ** 2).sum(1) + out0[:, 0]


@pytest.mark.parametrize("weight_fn", [None, _distance])
@pytest.mark.parametrize("temperature", [0.1, 2.0])
@pytest.mark.parametrize("batch", [2, 9])
def test_dcl_formula(weight_fn, temperature, batch, backend):
    views = [_rows(batch, 8, unit=False), _rows(batch, 8, seed=1, unit=False)]
    _assert_agree(
        _value_and_gradients(ours.DCLLoss(temperature, weight_fn), views),
        _value_and_gradients(DCLFormula(temperature, weight_fn), views),
    )


@pytest.mark.filterwarnings("ignore:To copy construct")  # lightly's weights
@pytest.mark.parametrize("gather_distributed", [False, True])
@pytest.mark.parametrize("batch", [2, 9, 32])
def test_dcl_lightly(batch, gather_distributed, lightly, backend):
    views = [_rows(batch, 8, unit=False), _rows(batch, 8, seed=1, unit=False)]
    for args in ((0.1, None), (0.5, _distance)):
        args = (*args, gather_distributed)
        _assert_agree(
            _value_and_gradients(ours.DCLLoss(*args), views), _value_and_gradients(lightly.DCLLoss(*args), views)
        )
    for args in ((), (0.2,), (0.1, 0.9, gather_distributed)):
        _assert_agree(
            _value_and_gradients(ours.DCLWLoss(*args), views), _value_and_gradients(lightly.DCLWLoss(*args), views)
        )


def test_dcl_lightly_arguments(lightly):
    for name in ("DCLLoss", "DCLWLoss"):
        theirs, mine = getattr(lightly, name), getattr(ours, name)
        for method in ("__init__", "forward"):
            assert _parameters(getattr(mine, method)) == _parameters(getattr(theirs, method))
        assert set(vars(mine())) == set(vars(theirs()))


def test_dcl_needs_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed"):
        ours.DCLLoss(gather_distributed=True)


def _info_nce_formula(query: Tensor, key: Tensor, negatives: Tensor | None, temperature: float) -> Tensor:
    query, key = (F.normalize(x, dim=-1) for x in (query, key))
    if negatives is None:
        return F.cross_entropy(query @ key.T / temperature, torch.arange(len(query)))
    negatives = F.normalize(negatives, dim=-1)
    others = query @ negatives.T if negatives.dim() == 2 else torch.einsum("bd,bkd->bk", query, negatives)
    logits = torch.cat([(query * key).sum(1, keepdim=True), others], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


@pytest.mark.parametrize("mode, shape", [("unpaired", None), ("unpaired", (5, 8)), ("paired", (6, 5, 8))])
def test_info_nce_formula(mode, shape, backend):
    inputs = [_rows(6, 8, unit=False), _rows(6, 8, seed=1, unit=False)]
    inputs.append(None if shape is None else _rows(*shape, seed=2, unit=False))
    for temperature in (0.1, 1.0):
        _assert_agree(
            _value_and_gradients(ours.InfoNCELoss(temperature, mode), inputs),
            _value_and_gradients(_info_nce_formula, inputs, temperature),
        )


def test_info_nce_options(backend):
    """They are the function's."""
    query, key = _rows(6, 8, unit=False), _rows(6, 8, seed=1, unit=False)
    options = dict(symmetric=True, normalize=False, label_smoothing=0.1, reduction="none")
    expected = torch.stack(
        [
            F.cross_entropy(s, torch.arange(6), label_smoothing=0.1, reduction="none")
            for s in (query @ key.T / 0.7, key @ query.T / 0.7)
        ]
    ).mean(0)
    torch.testing.assert_close(ours.InfoNCELoss(0.7, **options)(query, key), expected)
    negatives = _rows(5, 8, seed=2, unit=False)
    both = ours.InfoNCELoss(0.5, in_batch_negatives=True, normalize=False)(query, key, negatives)
    logits = query @ torch.cat([key, negatives]).T / 0.5
    torch.testing.assert_close(both, F.cross_entropy(logits, torch.arange(6)))


@pytest.mark.parametrize("rows, dim", [(2, 3), (33, 20)])
def test_koleo_lightly(rows, dim, lightly, backend):
    features = _rows(rows, dim, unit=False)
    for eps in (1e-8, 0.1):
        _assert_agree(
            *(_value_and_gradients(module.KoLeoLoss(eps=eps), [features]) for module in (ours, lightly)), rtol=1e-5
        )


def test_koleo_lightly_arguments(lightly):
    for method in ("__init__", "forward"):
        assert _parameters(getattr(ours.KoLeoLoss, method)) == _parameters(getattr(lightly.KoLeoLoss, method))
    with pytest.raises(ValueError, match="p must be 2.*got 1"):
        ours.KoLeoLoss(p=1)


LOSSES = {
    "ClipLoss": lambda: _clip_inputs(6, 8),
    "SigLipLoss": lambda: _clip_inputs(6, 8),
    "SupConLoss": lambda: [_rows(6, 2, 8)],
    "DCLLoss": lambda: [_rows(6, 8), _rows(6, 8, seed=1)],
    "DCLWLoss": lambda: [_rows(6, 8), _rows(6, 8, seed=1)],
    "KoLeoLoss": lambda: [_rows(6, 8)],
    "InfoNCELoss": lambda: [_rows(6, 8), _rows(6, 8, seed=1), _rows(4, 8, seed=2)],
}


@pytest.mark.parametrize("name", LOSSES)
def test_compile(name):
    torch._dynamo.reset()
    loss, inputs = getattr(ours, name)(), LOSSES[name]()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    _assert_agree(_value_and_gradients(compiled, inputs), _value_and_gradients(loss, inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_reference_backend(name):
    """Modules follow `use_backend`, as functions do."""
    loss, inputs = getattr(ours, name)(), LOSSES[name]()
    with fastssl.use_backend("reference"):
        expected = _value_and_gradients(loss, inputs)
    _assert_agree(_value_and_gradients(loss, inputs), expected)
