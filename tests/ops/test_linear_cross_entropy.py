"""The cross-entropy of a linear layer: what it is, what it leaves out, and gradients taken in the forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import fastssl
from fastssl.functional import linear_cross_entropy
from fastssl.nn import LinearCrossEntropyLoss
from fastssl.ops.linear_cross_entropy import _backward, _forward
from tests.recorder import Recorder

NAN = float("nan")
BACKWARD = {"linear_cross_entropy_backward", "linear_cross_entropy_backward_portable"}


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _leaf(*shape: int, seed: int = 0) -> Tensor:
    return _normal(*shape, seed=seed).requires_grad_()


def _labels(count: int, classes: int, ignored: float = 0.0) -> Tensor:
    source = torch.Generator().manual_seed(3)
    labels = torch.randint(classes, (count,), generator=source)
    return labels.where(torch.rand(count, generator=source) >= ignored, -100)


def _pytorch(x: Tensor, w: Tensor, y: Tensor, linear_bias: Tensor | None = None, **named: object) -> Tensor:
    return F.cross_entropy(F.linear(x.double(), w.double(), linear_bias), y, **named)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_pytorchs(reduction, label_smoothing, weighted, kernels):
    """Losses, and the gradients of all reductions, those that the forward pass takes among them."""
    x, w, b, y = _leaf(70, 20), _leaf(90, 20, seed=1), _leaf(90, seed=2), _labels(70, 90, 0.4)
    weight = _normal(90, seed=4).abs() if weighted else None
    named = {"reduction": reduction, "label_smoothing": label_smoothing}
    results = []
    for loss in (
        linear_cross_entropy(x, w, y, linear_bias=b, weight=weight, **named),
        _pytorch(x, w, y, b.double(), weight=weight.double() if weighted else None, **named),
    ):
        results.append([z.double() for z in (loss, *torch.autograd.grad(2 * loss.sum(), (x, w, b)))])
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("count", [1, 33, 129, 300])
@pytest.mark.parametrize("classes", [1, 31, 65, 257])
def test_every_edge(count, classes, kernels):
    x, w, y = _leaf(count, 8), _leaf(classes, 8, seed=1), _labels(count, classes, 0.2)
    y[0] = classes - 1
    results = []
    for loss in (linear_cross_entropy(x, w, y), _pytorch(x, w, y)):
        results.append([z.double() for z in (loss, *torch.autograd.grad(loss, (x, w)))])
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "sizes, dtype, soft",
    [
        *(((2500, 8, 70), dtype, soft) for dtype in (torch.float32, torch.bfloat16) for soft in (False, True)),
        ((40, 500, 9000), torch.float32, False),
        ((40, 1024, 9000), torch.bfloat16, False),
    ],
    ids=str,
)
def test_many_rows_and_many_words(sizes, dtype, soft):
    """Rows that are visited in several blocks; and a weight that is packed, or read where it lies, block by block."""
    rows, dim, classes = sizes
    x, w, b = ((z / dim**0.25).to(dtype).requires_grad_() for z in (_normal(*s, seed=s[0]) for s in _shapes(*sizes)))
    y, weight = _labels(rows, classes, 0.4), _normal(classes, seed=4).abs()
    if soft:
        y = _normal(rows, classes, seed=5).softmax(1).to(dtype).requires_grad_()
    named, leaves = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}, (x, w, b, *([y] if soft else []))
    loss = linear_cross_entropy(x, w, y, linear_bias=b, **named)
    target = y.double() if soft else y
    expected = _pytorch(x, w, target, b.double(), **named | {"weight": weight.double()})
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for found, right in zip(*(torch.autograd.grad(z, leaves) for z in (loss, expected)), strict=True):
        assert (found.double() - right.double()).norm() <= tolerance * right.double().norm()


def test_logits_that_are_computed_twice():
    """As a large weight's in bfloat16, whose gradient would take too much in float32: the same results."""
    sizes = rows, _, classes = 514, 1024, 65_600
    numbers = [(z / 4).bfloat16() for z in (_normal(*s, seed=s[0]) for s in _shapes(*sizes))]
    y, weight = _labels(rows, classes), _normal(classes, seed=4).abs()
    y[-1] = classes - 1
    results, before = [], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for dtype in (torch.bfloat16, torch.float32):
            x, w, b = (z.to(dtype).requires_grad_() for z in numbers)
            temperature = torch.tensor(1.5, requires_grad=True)
            named = {"linear_bias": b, "weight": weight, "label_smoothing": 0.1, "temperature": temperature}
            loss = linear_cross_entropy(x, w, y, **named)
            results.append([loss, *torch.autograd.grad(loss, (x, w, b, temperature))])
    finally:
        torch.set_float32_matmul_precision(before)
    for found, right in zip(*results, strict=True):
        assert (found - right).norm() <= 4e-3 * right.norm()


def _shapes(rows: int, dim: int, classes: int) -> tuple[tuple[int, ...], ...]:
    return (rows, dim), (classes, dim), (classes,)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_take_no_part(reduction, backend):
    """They may hold NaN."""
    x, w, y = _normal(50, 12), _leaf(40, 12, seed=1), _labels(50, 40, 0.6)
    expected = _pytorch(x[y >= 0], w, y[y >= 0], reduction=reduction)
    x[y < 0] = NAN
    x.requires_grad_()
    loss = linear_cross_entropy(x, w, y, reduction=reduction)
    grad_x, grad_w = torch.autograd.grad(loss.sum(), (x, w))
    if reduction == "none":
        assert not loss[y < 0].any()
        loss = loss[y >= 0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert grad_w.isfinite().all() and not grad_x[y < 0].any() and grad_x[y >= 0].all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_where_nothing_may_wait(reduction, monkeypatch):
    """On other devices the portable code masks them."""
    monkeypatch.setattr("fastssl.ops.linear_cross_entropy._labelled", lambda *_: None)
    with fastssl.use_backend("portable"):
        test_ignored_rows_take_no_part(reduction, None)


def test_ignored_rows_cost_no_products():
    x, w, y = _normal(50, 12), _normal(40, 12, seed=1), _labels(50, 40, 0.6)

    def operations(x: Tensor, y: Tensor) -> int:
        numbers = torch.ones(1), None, torch.ones(len(x)), 0.0, -100, False, True, True, True, "float32"
        with FlopCounterMode(display=False) as counted:
            _forward(x, w, w.new_empty(0), y, *numbers)
        return counted.get_total_flops()

    assert 0 < operations(x, y) == operations(x[y >= 0], y[y >= 0]) < operations(x, y.clamp(min=0))


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("of_weight", [False, True])
def test_what_needs_no_gradient_costs_no_product(of_input, of_weight):
    x, w, y = _normal(50, 12), _normal(40, 12, seed=1), _labels(50, 40)
    tensors, numbers = (x, w, w.new_empty(0), y, torch.ones(1), None, torch.ones(50)), (0.0, -100, False)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # of shapes
    for function, arguments, flags in (
        (_forward, tensors, (True, of_input, of_weight)),
        (_backward, (torch.ones(()), *tensors), (of_input, of_weight, False)),
    ):
        with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
            function(*arguments, *numbers, *flags, "float32")
        assert counted.get_total_flops() == (1 + of_input + of_weight) * 2 * 50 * 40 * 12


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_some_inputs_are_those_of_all(soft, reduction, kernels):
    """Whether the others need none, or are not asked for."""
    target = _normal(50, 40, seed=3).softmax(1) if soft else _labels(50, 40, 0.3)
    values = [_normal(50, 12), _normal(40, 12, seed=1), _normal(40, seed=2), torch.tensor(0.5), target]

    def found(needed: list[bool], asked: list[bool]) -> list[Tensor]:
        x, w, bias, temperature, y = (z.clone().requires_grad_(n) for z, n in zip(values, needed, strict=True))
        loss = linear_cross_entropy(x, w, y, linear_bias=bias, temperature=temperature, reduction=reduction).sum()
        inputs = [z for z, a in zip((x, w, bias, temperature, y), asked, strict=True) if a]
        return list(torch.autograd.grad(loss, inputs))

    everything = [True, True, True, True, soft]
    gradients = found(everything, everything)
    for i in range(4 + soft):
        one = [i == j for j in range(5)]
        for asked, needed in ((one, everything), (one, one)):
            assert torch.equal(*found(needed, asked), gradients[i])
        others = [not o and a for o, a in zip(one, everything, strict=True)]
        assert all(map(torch.equal, found(others, others), gradients[:i] + gradients[i + 1 :]))


@pytest.mark.parametrize("ignore_index", [None, 7, -1])
def test_ignore_index(ignore_index, backend):
    x, w, y = _leaf(20, 6), _leaf(9, 6, seed=1), _labels(20, 9)
    y[::2] = -100 if ignore_index is None else ignore_index
    loss = linear_cross_entropy(x, w, y, ignore_index=ignore_index)
    expected = _pytorch(x, w, y, ignore_index=-100 if ignore_index is None else ignore_index)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("weight", [None, torch.rand(5)])
def test_no_row_labelled(rows, weight, backend):
    x, w = _leaf(rows, 4), _leaf(5, 4)
    y = torch.full((rows,), -100)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(x, w, y, weight=weight, reduction=reduction)
        gradients = torch.autograd.grad(loss.sum(), (x, w))
        assert not any(g.any() for g in gradients)
        assert loss.isnan() if reduction == "mean" else not loss.any()


@pytest.mark.parametrize("wrong", [-1, 5, -101, 1 << 40])
@pytest.mark.parametrize("chosen", ["auto", "portable"])
def test_labels_out_of_range(wrong, chosen):
    y = torch.tensor([0, -100, wrong, 4])
    with fastssl.use_backend(chosen), pytest.raises(IndexError, match=f"target must be from 0 to below 5.*got {wrong}"):
        linear_cross_entropy(_normal(4, 3), _normal(5, 3), y)


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e30, 1e37])
def test_huge_logits(scale, kernels):
    """A softmax is then a maximum."""
    x, w, y = _leaf(40, 1), scale * _normal(70, 1, seed=1), _labels(40, 70)
    loss = linear_cross_entropy(x, w, y, reduction="none")
    expected = _pytorch(x, w, y, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(z.sum(), x)[0] / scale for z in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_confident_rows_keep_their_gradient(precision, kernels):
    """1 - Q of a label is exact where Q rounds to 1."""
    torch.set_float32_matmul_precision(precision)
    x = (3 * torch.eye(32)).requires_grad_()  # products of bfloat16 are exact
    w, y = 3 * torch.eye(32), torch.arange(32)
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(x, w, y, reduction=reduction)
        expected = _pytorch(x, w, y, reduction=reduction)
        torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
        gradients = [torch.autograd.grad(z.sum(), x)[0] for z in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=8e-3, atol=0)


def test_words_that_cannot_be(kernels):
    """A bias of minus infinity: probability 0."""
    x, w, y, bias = _leaf(40, 6), _leaf(70, 6, seed=1), _labels(40, 70) // 2, torch.zeros(70)
    bias[40:] = -torch.inf
    bias.requires_grad_()
    loss = linear_cross_entropy(x, w, y, linear_bias=bias)
    expected = _pytorch(x, w[:40], y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, (x, w, bias))
    torch.testing.assert_close(gradients[:2], torch.autograd.grad(expected, (x, w)), rtol=1e-4, atol=1e-6)
    assert not gradients[2][40:].any() and gradients[2][:40].any()


# Gradients taken in the forward pass


def _loss(dtype: torch.dtype = torch.float32, **named: object) -> tuple[list[Tensor], Tensor]:
    leaves = [_normal(40, 8).to(dtype).requires_grad_(), _normal(50, 8, seed=1).to(dtype).requires_grad_()]
    return leaves, linear_cross_entropy(*leaves, _labels(40, 50, 0.2), **named)


@pytest.mark.sanitized
def test_bfloat16_rows_are_packed_alike_however_they_lie():
    """Contiguous, one element off any alignment, and with room between rows: the same bits."""
    rows, words, dim = 70, 4160, 64
    source = {n: _normal(n, dim, seed=n).bfloat16() for n in (rows, words)}
    misaligned = {n: x.new_empty(x.numel() + 1)[1:].view(n, dim).copy_(x) for n, x in source.items()}
    apart = {n: x.new_empty(n, 2 * dim)[:, :dim].copy_(x) for n, x in source.items()}
    results = []
    for lying in (source, misaligned, apart):
        x, w = (lying[n].detach().requires_grad_() for n in (rows, words))
        loss = linear_cross_entropy(x, w, _labels(rows, words))
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.3, 65536.0, 0.0, -2.0])
def test_a_loss_weight(factor, backend):
    leaves, loss = _loss()
    with Recorder() as ran:
        gradients = torch.autograd.grad(factor * loss, leaves)
    assert not ran & BACKWARD
    expected = torch.autograd.grad(_pytorch(*leaves, _labels(40, 50, 0.2)), leaves)
    expected = [factor * x for x in expected]
    torch.testing.assert_close(list(gradients), expected, rtol=1e-4, atol=1e-6 * abs(factor))


def test_what_was_handed_out_is_not_touched_again(backend):
    bias, temperature = _leaf(50, seed=2), torch.tensor(0.7, requires_grad=True)
    leaves, loss = _loss(linear_bias=bias, temperature=temperature)
    leaves += [bias, temperature]
    with Recorder() as ran:
        first = torch.autograd.grad(loss, leaves, 2 * torch.ones(()), retain_graph=True)
        assert not ran & BACKWARD
        copies = [x.clone() for x in first]
        second = torch.autograd.grad(-3 * loss, leaves)
        assert ran & BACKWARD
    assert all(map(torch.equal, first, copies))
    torch.testing.assert_close([x / 2 for x in first], [x / -3 for x in second], rtol=1e-4, atol=1e-6)


def test_float16_leaves_its_gradient_to_the_backward_pass(backend):
    """It may be too small before a loss scale multiplies it."""
    leaves, loss = _loss(torch.float16)
    with Recorder() as ran:
        (found, _) = torch.autograd.grad(1e4 * (1e-8 * loss.float()), leaves)
    assert ran & BACKWARD
    (expected, _) = torch.autograd.grad(1e-4 * _pytorch(*leaves, _labels(40, 50, 0.2)), leaves)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-7)


def test_second_derivatives_of_what_was_taken(backend):
    """Of "mean", by the inputs and by a learnable temperature."""
    directions = _normal(40, 8, seed=5)
    results = []
    for function in (linear_cross_entropy, fastssl.reference.linear_cross_entropy.linear_cross_entropy):
        temperature = torch.tensor(0.5, requires_grad=True)
        leaves, y = [_leaf(40, 8), _leaf(50, 8, seed=1), temperature], _labels(40, 50, 0.2)
        loss = function(*leaves[:2], y, temperature=temperature, normalize=True, label_smoothing=0.1)
        (gradient, *others) = torch.autograd.grad(2 * loss, leaves, create_graph=True)
        results.append([gradient, *others, *torch.autograd.grad((gradient * directions).sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_one_program_for_all_numbers_of_rows():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=counter)
    for i in range(6):
        x, w, y = _leaf(5 + 3 * i, 20), _leaf(30, 20, seed=1), _labels(5 + 3 * i, 30, 0.3)
        results = []
        for function in (compiled, linear_cross_entropy):
            loss = function(x, w, y)
            results.append((loss.detach(), *torch.autograd.grad(2 * loss, (x, w))))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_float64_targets_of_float32_rows(backend):
    x, w, target = _leaf(9, 5), _leaf(12, 5, seed=1), _normal(9, 12, seed=2).softmax(1).double().requires_grad_()
    loss = linear_cross_entropy(x, w, target)
    expected = _pytorch(x, w, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(z, (x, w, target)) for z in (loss, expected)]
    assert [g.dtype for g in gradients[0]] == [torch.float32, torch.float32, torch.float64]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# The module


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="PyTorch 2.13 has it first")
def test_the_module_is_pytorchs():
    named = {"bias": True, "weight": _normal(30).abs(), "ignore_index": 3, "label_smoothing": 0.1}
    theirs, ours = (cls(8, 30, **named) for cls in (nn.LinearCrossEntropyLoss, LinearCrossEntropyLoss))
    ours.load_state_dict(theirs.state_dict())
    x, y = _leaf(20, 8), _labels(20, 30)
    results = []
    for module in (ours, theirs):
        loss = module(x, y)
        results.append((loss, *torch.autograd.grad(loss, (x, *module.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_tied_weight():
    embedding = nn.Embedding(30, 8)
    loss = LinearCrossEntropyLoss(8, 30, bias=True, linear_weight=embedding.weight)
    assert loss.linear.weight is embedding.weight and [x.shape for x in loss.parameters()] == [(30, 8), (30,)]
    tokens = _labels(20, 30)
    loss(embedding(tokens), tokens).backward()
    x = embedding.weight.detach().requires_grad_()
    _pytorch(x[tokens], x, tokens).backward()
    torch.testing.assert_close(embedding.weight.grad, x.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "named, error, match",
    [
        ({"num_classes": 0}, ValueError, "num_classes must be positive, got 0"),
        ({"in_features": 1.5}, TypeError, "in_features must be an integer, got float"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(30,\), got \(7,\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0"),
        ({"linear_weight": torch.ones(30, 8)}, TypeError, "linear_weight must be a Parameter, got Tensor"),
        ({"linear_weight": nn.Parameter(torch.ones(8, 30))}, ValueError, r"linear_weight must have shape \(30, 8\)"),
        ({"reduction": "average"}, ValueError, "reduction must be 'none', 'mean' or 'sum'"),
        ({"ignore_index": "pad"}, TypeError, "ignore_index must be an integer, got str"),
    ],
)
def test_bad_arguments_of_the_module(named, error, match):
    with pytest.raises(error, match=match):
        LinearCrossEntropyLoss(**{"in_features": 8, "num_classes": 30, **named})
