"""What holds for the softmax contrastive losses in particular."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastssl
from fastssl import reference
from fastssl._exponential_sums import pair_sums
from fastssl.functional import (
    clip_loss,
    dcl,
    info_nce,
    nt_xent,
    similarity_logsumexp,
    sup_con,
)
from fastssl.reference import OPS, Sample
from tests.accuracy import (
    Results,
    assert_as_accurate_as_eager,
    evaluate,
    public,
    relative_error,
    truth_and_eager,
    unreduced,
    with_gradients,
)
from tests.inputs import normal

pytestmark = pytest.mark.usefixtures("device")

SIZES = (1, 3, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513)
DIMS = (1, 2, 15, 16, 17, 31, 33, 100, 128, 130, 257, 768)


def _sample(name: str, *args, **kwargs) -> Sample:
    leaves = (x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
    return unreduced(OPS[name], Sample(name, tuple(leaves), kwargs))


def _assert_as_accurate_as_eager(name: str, *args, **kwargs) -> None:
    sample = _sample(name, *args, **kwargs)
    assert_as_accurate_as_eager(OPS[name], sample, evaluate(public(OPS[name]), sample))


@functools.cache
def _ragged(name: str, rows: int, columns: int, dim: int) -> tuple[Sample, tuple[Results, Results]]:
    x, y = normal(rows, dim), normal(columns, dim, seed=1)
    if name == "similarity_logsumexp":
        sample = _sample(name, F.normalize(x), F.normalize(y), exclude=torch.arange(rows) + columns // 2)
    elif name == "clip_loss":
        sample = _sample(name, F.normalize(x), F.normalize(y), 10.0)
    elif name == "sup_con":
        sample = _sample(name, x, torch.arange(rows) % 7, temperature=0.2)
    else:
        sample = _sample(name, x, y, temperature=0.2)
    return sample, truth_and_eager(OPS[name], sample)


@pytest.mark.parametrize("rows", [pytest.param(n, marks=[pytest.mark.unsanitized] * (n > 500)) for n in SIZES])
@pytest.mark.parametrize("name", ["nt_xent", "similarity_logsumexp", "clip_loss", "sup_con", "dcl"])
@pytest.mark.sanitized
def test_every_edge_of_a_tile(name, rows, kernels):
    columns = dict(zip(DIMS, SIZES, strict=False)) if name == "similarity_logsumexp" else dict.fromkeys(DIMS, rows)
    for dim in DIMS:
        sample, yardstick = _ragged(name, rows, columns[dim], dim)
        assert_as_accurate_as_eager(OPS[name], sample, evaluate(public(OPS[name]), sample), yardstick)


@pytest.mark.parametrize("clusters", [None, 16])
@pytest.mark.parametrize("precision, bound", [("highest", 2e-6), ("high", 2e-3), ("medium", 5e-3)])
def test_gradient_error_of_each_precision(precision, bound, clusters, kernels):
    z1 = normal(512, 128)
    z2 = z1 + 0.5 * normal(512, 128, seed=1)
    if clusters:
        z1, z2 = (z + 2 * normal(clusters, 128, seed=2).repeat(512 // clusters, 1) for z in (z1, z2))
    torch.set_float32_matmul_precision(precision)
    results = with_gradients(nt_xent, z1, z2)
    truth = with_gradients(reference.contrastive.nt_xent, z1.double(), z2.double())
    for gradient, true in zip(results[1:], truth[1:], strict=True):
        assert relative_error(gradient, true) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_antipodal_pair_at_low_temperature(dtype, backend):
    """B = 1: the one similarity is exp(-100), or exp(100), which float32 cannot hold, and the loss is 0."""
    z = torch.ones(1, 4, dtype=dtype)
    for other in (-z, z):
        loss, dz1, dz2 = with_gradients(lambda a, b: nt_xent(a, b, temperature=0.01), z, other)
        assert loss == 0
        assert dz1.abs().max() < 1e-5 and dz2.abs().max() < 1e-5


def test_a_pair_alone_has_no_loss(backend):
    for seed in range(20):
        for temperature in (0.1, 1.0, 7.0):
            assert nt_xent(normal(1, 2, seed=seed), normal(1, 2, seed=99 - seed), temperature=temperature) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, -0.01])
def test_antipodal_clusters(temperature, kernels):
    """Similarities from -1 / T to 1 / T in one row: a shift that is fixed for all rows under- or overflows."""
    pole = normal(1, 8)
    z1 = torch.cat([pole.expand(40, 8), -pole.expand(1, 8)]) + 1e-3 * normal(41, 8, seed=1)
    z2 = torch.cat([pole.expand(40, 8), pole]) + 1e-3 * normal(41, 8, seed=2)
    _assert_as_accurate_as_eager("nt_xent", z1, z2, temperature=temperature)


def test_long_rows_that_are_not_normalised(kernels):
    """Similarities of up to a thousand, and of both signs."""
    rows = 5 * normal(70, 40), 5 * normal(70, 40, seed=1)
    _assert_as_accurate_as_eager("nt_xent", *rows, temperature=1.0, normalize=False)
    _assert_as_accurate_as_eager("similarity_logsumexp", *rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 33, 150])
def test_identical_rows(batch, dtype, backend):
    """Every row is every other: log(2B - 1), never below 0, and no gradient."""
    z = normal(1, 16, dtype=dtype).expand(batch, 16)
    for temperature in (0.5, 0.05, 0.01):
        loss, dz1, _ = with_gradients(lambda a, b, t=temperature: nt_xent(a, b, temperature=t, reduction="none"), z, z)
        assert (loss >= 0).all()
        expected = torch.full_like(loss, 2 * batch - 1).log()
        torch.testing.assert_close(loss, expected, rtol=torch.finfo(dtype).eps, atol=2e-5)
        assert dz1.abs().max() <= 4 * batch * torch.finfo(dtype).eps / temperature


@pytest.mark.parametrize("scale", [1e-10, 1e15, 1e30])
def test_length_of_rows_does_not_matter(scale, kernels):
    z1, z2 = normal(17, 24), normal(17, 24, seed=1)
    loss, dz1, _ = with_gradients(nt_xent, z1, z2)
    scaled_loss, scaled_dz1, _ = with_gradients(nt_xent, z1 * scale, z2)
    torch.testing.assert_close(scaled_loss, loss)
    torch.testing.assert_close(scaled_dz1.double() * scale, dz1.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [3e-13, 1e-14, 1e-30])
def test_rows_too_short_to_normalise(scale, kernels):
    """Divided by 1e-12 as they are, they keep a length, and their gradient is not projected."""
    _assert_as_accurate_as_eager("nt_xent", scale * F.normalize(normal(17, 24)), normal(17, 24, seed=1))


def test_all_rows_zero(backend):
    """S = 0: the loss of a guess, and F.normalize's gradient, which is not projected."""
    for result, expected in zip(
        with_gradients(nt_xent, torch.zeros(9, 8), torch.zeros(9, 8)),
        with_gradients(reference.contrastive.nt_xent, torch.zeros(9, 8), torch.zeros(9, 8)),
        strict=True,
    ):
        torch.testing.assert_close(result, expected)


def test_mean_of_an_empty_batch_is_nan(backend):
    assert nt_xent(torch.ones(0, 8), torch.ones(0, 8)).isnan()


@pytest.mark.parametrize("first", [256, 40, 7, 1])
@pytest.mark.sanitized
def test_nan_is_in_the_loss_of_every_row_that_meets_it(first, kernels):
    """Also where nothing else is in a tile but what fills it up."""
    x, y = (F.normalize(normal(first + 20, 8, seed=i), dim=1) for i in range(2))
    y[first:] = float("nan")
    losses = clip_loss(x, y, 10.0, reduction="none"), info_nce(x, y, reduction="none"), nt_xent(x, y, reduction="none")
    assert all(loss.isnan().all() for loss in losses)
    sums = pair_sums(x, y[first:], torch.tensor(10.0), None, "float32")[0]
    assert sums[0].isnan().all()


@pytest.mark.parametrize("value, expected", [(0.0, "nan"), (float("inf"), "finite"), (float("nan"), "nan")])
def test_a_tensor_temperature_without_meaning(value, expected, backend):
    loss = nt_xent(normal(5, 8), normal(5, 8, seed=1), temperature=torch.tensor(value))
    assert loss.isnan() if expected == "nan" else loss.isfinite()


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 80), dim=st.integers(1, 70), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 2**30))
def test_symmetries(batch, dim, temperature, seed):
    """Of the losses under a permutation of the samples, a rotation of all rows, and a change of their lengths."""
    z1, z2 = normal(batch, dim, seed=seed), normal(batch, dim, seed=seed + 1)

    def losses(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nt_xent(a, b, temperature=temperature, reduction="none").view(2, batch)

    expected = losses(z1, z2)
    close = {"rtol": 1e-4, "atol": 1e-5 / temperature}
    assert (expected >= 0).all()
    torch.testing.assert_close(losses(z2, z1), expected.flip(0), **close)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses(z1[order], z2[order]), expected[:, order], **close)
    rotation = torch.linalg.qr(normal(dim, dim, seed=seed).double())[0].float()
    torch.testing.assert_close(losses(z1 @ rotation, z2 @ rotation), expected, **close)
    lengths = torch.logspace(-3, 3, batch)[:, None]
    torch.testing.assert_close(losses(z1 * lengths, z2 / lengths), expected, **close)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 60), first=st.integers(1, 90), second=st.integers(1, 90), seed=st.integers(0, 2**30))
def test_logsumexp_of_two_queues_is_that_of_both(rows, first, second, seed):
    x, y = normal(rows, 20, seed=seed), normal(first + second, 20, seed=seed + 1)
    apart = torch.logaddexp(similarity_logsumexp(x, y[:first]), similarity_logsumexp(x, y[first:]))
    torch.testing.assert_close(similarity_logsumexp(x, y), apart, rtol=1e-5, atol=1e-5)


def test_nt_xent_is_a_logsumexp(backend):
    z1, z2 = F.normalize(normal(70, 30)), F.normalize(normal(70, 30, seed=1))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = torch.cat([a, b])
        positive = 2 * (z * z.roll(70, 0)).sum(1)
        return similarity_logsumexp(z, z, scale=2.0, exclude=torch.arange(140), offset=positive)

    for result, expected in zip(
        with_gradients(loss, z1, z2),
        with_gradients(lambda a, b: nt_xent(a, b, normalize=False, reduction="none"), z1, z2),
        strict=True,
    ):
        torch.testing.assert_close(result, expected)


def test_a_queue_may_move_on_before_the_backward_pass(backend):
    x, queue = normal(9, 8).requires_grad_(), normal(20, 8, seed=1)
    expected = torch.autograd.grad(similarity_logsumexp(x, queue).sum(), x)
    output = similarity_logsumexp(x, queue).sum()
    queue.fill_(7)
    torch.testing.assert_close(torch.autograd.grad(output, x, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="y was modified in place.*second derivative"):
        torch.autograd.grad(output, x, create_graph=True)


def test_a_y_that_needs_its_gradient_may_not(backend):
    x, y = normal(9, 8), normal(20, 8, seed=1).requires_grad_()
    output = similarity_logsumexp(x, y).sum()
    with torch.no_grad():
        y.fill_(7)
    with pytest.raises(RuntimeError, match="y was modified in place.*its gradient"):
        output.backward()


CONFIDENT = {
    "in batch": lambda q, k, queue: info_nce(q, k, temperature=0.04, reduction="none"),
    "symmetric": lambda q, k, queue: info_nce(q, k, temperature=0.04, symmetric=True, reduction="none"),
    "queue": lambda q, k, queue: info_nce(q, k, queue, temperature=0.04, reduction="none"),
    "paired": lambda q, k, queue: info_nce(
        q, k, queue.expand(len(q), *queue.shape), negative_mode="paired", temperature=0.04, reduction="none"
    ),
    "clip": lambda q, k, queue: clip_loss(F.normalize(q), F.normalize(k), 25.0, reduction="none"),
}


@pytest.mark.parametrize("loss", CONFIDENT.values(), ids=CONFIDENT)
def test_confident_losses_keep_their_digits(loss, kernels):
    """Losses of 1e-12 to 1e-4, where log(sum) - positive would have lost every digit."""
    q, queue = normal(33, 40), normal(70, 40, seed=2)
    k = q + 0.05 * normal(33, 40, seed=1)
    results = with_gradients(lambda q, k: loss(q, k, queue), q, k)
    with fastssl.use_backend("reference"):
        truth = with_gradients(lambda q, k: loss(q, k, queue.double()), q.double(), k.double())
    assert truth[0].max() < 1e-4 and truth[0].min() > 0
    torch.testing.assert_close(results[0].double(), truth[0], rtol=1e-4, atol=0)
    for gradient, true in zip(results[1:], truth[1:], strict=True):
        assert relative_error(gradient, true) < 1e-4


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 80), dim=st.integers(1, 70), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 2**30))
def test_losses_that_are_one_another(batch, dim, temperature, seed):
    z1, z2 = normal(batch, dim, seed=seed), normal(batch, dim, seed=seed + 1)
    x, y = F.normalize(z1), F.normalize(z2)
    close = {"rtol": 1e-4, "atol": 1e-5 / temperature}
    options = {"temperature": temperature, "reduction": "none"}

    symmetric = info_nce(z1, z2, symmetric=True, **options)
    torch.testing.assert_close(symmetric, clip_loss(x, y, 1 / temperature, reduction="none"), **close)
    one_way = info_nce(z1, z2, **options) + info_nce(z2, z1, **options)
    torch.testing.assert_close(symmetric, one_way / 2, **close)
    own_labels = clip_loss(x, y, 1 / temperature, labels=torch.arange(batch) - 3, reduction="none")
    torch.testing.assert_close(symmetric, own_labels, **close)

    pairs = nt_xent(z1, z2, **options)
    torch.testing.assert_close(sup_con(torch.cat([z1, z2]), torch.arange(batch).repeat(2), **options), pairs, **close)
    views = sup_con(torch.stack([z1, z2], 1), torch.arange(batch), **options)
    torch.testing.assert_close(views.T.flatten(), pairs, **close)
    torch.testing.assert_close(F.softplus(dcl(z1, z2, **options)), pairs, **close)

    others = torch.stack([torch.cat([z2[:i], z2[i + 1 :]]) for i in range(batch)])
    paired = info_nce(z1, z2, others, negative_mode="paired", **options)
    torch.testing.assert_close(info_nce(z1, z2, **options), paired, **close)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 60), keys=st.integers(0, 50), seed=st.integers(0, 2**30), smoothing=st.floats(0, 1))
def test_permuted_rows_have_permuted_losses(batch, keys, seed, smoothing):
    z1, z2, queue = normal(batch, 20, seed=seed), normal(batch, 20, seed=seed + 1), normal(keys, 20, seed=seed + 2)
    labels = torch.randint(-2, 2 + batch // 3, (batch,), generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    scale, options = 3.0, {"reduction": "none"}
    for loss in (
        lambda a, b, _: info_nce(a, b, queue, in_batch_negatives=True, **options),
        lambda a, b, _: info_nce(a, b, symmetric=True, label_smoothing=smoothing, **options),
        lambda a, b, labels: clip_loss(a, b, scale, labels=labels, label_smoothing=smoothing, **options),
        lambda a, _, labels: sup_con(a, labels, **options),
        lambda a, b, _: dcl(a, b, **options).view(2, -1).T,
    ):
        expected = loss(z1, z2, labels)[order]
        torch.testing.assert_close(loss(z1[order], z2[order], labels[order]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clip_loss(z2, z1, scale), clip_loss(z1, z2, scale), rtol=1e-4, atol=1e-4)


METRICS = {
    "in batch": (info_nce, {}),
    "queue": (info_nce, {"negative_keys": normal(65, 8, seed=2)}),
    "queue and batch": (info_nce, {"negative_keys": normal(65, 8, seed=2), "in_batch_negatives": True}),
    "paired": (info_nce, {"negative_keys": normal(33, 7, 8, seed=2), "negative_mode": "paired"}),
    "paired and batch": (
        info_nce,
        {"negative_keys": normal(33, 7, 8, seed=2), "negative_mode": "paired", "in_batch_negatives": True},
    ),
    "negative temperature": (info_nce, {"temperature": -0.5}),
    "not normalized": (info_nce, {"normalize": False}),
    "symmetric": (info_nce, {"symmetric": True}),
    "no negatives": (info_nce, {"in_batch_negatives": False}),
    "clip": (clip_loss, {"logit_scale": torch.tensor(3.0, requires_grad=True)}),
    "labels": (clip_loss, {"logit_scale": 3.0, "labels": torch.arange(33) // 2}),
}


@pytest.mark.parametrize("loss, options", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics(loss, options, dtype, kernels):
    x = normal(33, 8, dtype=dtype).requires_grad_()
    y = (x + 1.5 * normal(33, 8, seed=1, dtype=dtype)).detach().requires_grad_()
    options = {k: v.to(dtype) if k == "negative_keys" else v for k, v in options.items()}
    value, metrics = loss(x, y, return_metrics=True, **options)
    torch.testing.assert_close(value, loss(x, y, **options), rtol=0, atol=0)
    with fastssl.use_backend("reference"):
        _, expected = loss(x, y, return_metrics=True, **options)
    for name, metric in metrics.items():
        assert metric.dtype == torch.float32 and metric.shape == () and not metric.requires_grad
        torch.testing.assert_close(metric, expected[name], rtol=1e-5, atol=1e-6)
    of_pairs = {"positive_similarity", "alignment"}
    accuracies = {"accuracy"} if loss is info_nce else {"image_accuracy", "text_accuracy"}
    assert metrics.keys() == of_pairs | (set() if "labels" in options else accuracies)
    if not {"in_batch_negatives", "temperature", "labels"} & options.keys():
        assert all(0 < metrics[name] < 1 for name in accuracies)
    value.backward()


def test_metrics_are_what_they_say(backend):
    """Two rows whose positives are more similar than their negatives, and one whose is not."""
    q = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    k = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    _, metrics = info_nce(q, k, return_metrics=True)
    assert metrics.keys() == {"accuracy", "positive_similarity", "alignment"}
    torch.testing.assert_close(metrics["accuracy"], torch.tensor(2 / 3))
    torch.testing.assert_close(metrics["positive_similarity"], torch.tensor(2 / 3))
    torch.testing.assert_close(metrics["alignment"], torch.tensor(2 / 3))
    _, metrics = clip_loss(q, k, 1.0, return_metrics=True)
    assert metrics.keys() == {"image_accuracy", "text_accuracy", "positive_similarity", "alignment"}
    torch.testing.assert_close(metrics["image_accuracy"], torch.tensor(1 / 3))
    torch.testing.assert_close(metrics["text_accuracy"], torch.tensor(1 / 3))
    torch.testing.assert_close(metrics["positive_similarity"], torch.tensor(5 / 3))
    torch.testing.assert_close(metrics["alignment"], torch.tensor(3.0))


def test_metrics_of_one_pair_and_of_none(backend):
    for loss in (info_nce, lambda a, b, **kw: clip_loss(a, b, 2.0, **kw)):
        _, metrics = loss(normal(1, 4), -normal(1, 4), return_metrics=True)
        assert all(metric == 1 for name, metric in metrics.items() if name.endswith("accuracy"))
        _, metrics = loss(normal(0, 4), normal(0, 4), return_metrics=True)
        assert all(metric.isnan() for metric in metrics.values())


def test_metrics_compile():
    torch._dynamo.reset()
    q, k, queue = normal(9, 8), normal(9, 8, seed=1), normal(20, 8, seed=2)
    for function in (
        lambda: info_nce(q, k, queue, in_batch_negatives=True, return_metrics=True),
        lambda: info_nce(q, k, symmetric=True, return_metrics=True),
        lambda: clip_loss(q, k, 2.0, return_metrics=True),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), function())


@pytest.mark.parametrize("variant", ["", "_portable"])
@pytest.mark.parametrize("exclude", [None, torch.arange(9) - 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_rectangles(dtype, exclude, variant):
    """pair_logsumexp, which a ring of processes runs on its own rows and another's."""
    x, y = normal(9, 8, dtype=dtype).requires_grad_(), normal(8, 5, seed=1, dtype=dtype).T.requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    op = getattr(torch.ops.fastssl, f"pair_logsumexp{variant}").default
    torch.library.opcheck(op, (x, y, scale, exclude, 3000, str(dtype).removeprefix("torch.")))


MEMORY = """
    import sys, torch, fastssl
    from fastssl.functional import clip_loss, info_nce, nt_xent, siglip_loss, sup_con, topk_similarity
    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
    def step(rows):
        x, y = (torch.randn(rows, 64).requires_grad_() for _ in range(2))
        with fastssl.use_backend(sys.argv[1]):
            for output in eval(sys.argv[2]):
                if output.requires_grad:
                    output.backward()
    step(256)
    before = peak()
    for rows in map(int, sys.argv[3:]):
        step(rows)
        print(peak() - before)
"""
OTHERS = """(
    clip_loss(x, y, 0.1, return_metrics=True)[0],
    sup_con(x, torch.arange(rows) % 100),
    info_nce(x[::4], y[::4], y.detach(), in_batch_negatives=True),
    siglip_loss(x, y, 0.1),
    topk_similarity(x[::4], y, 20)[0],
)"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "backend, rows, losses, bound",
    [
        pytest.param("auto", 32768, "[nt_xent(x[::2], y[::2])]", 200, id="auto-nt_xent"),
        pytest.param("portable", 16384, "[nt_xent(x[::2], y[::2])]", 300, id="portable-nt_xent"),
        pytest.param("auto", 8192, OTHERS, 150, id="auto-others"),
    ],
)
def test_memory_is_linear_in_the_batch(backend, rows, losses, bound):
    """The similarities would take 4,096, 1,024 and 256 MiB; the rows and their gradients take a few, and the portable
    code's blocks 16 each."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), backend, losses, str(rows // 2), str(rows)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    half, full = map(float, run.stdout.split())
    growth = 3 / 4 * rows**2 * 4 / 2**20  # of one matrix of similarities
    assert full < bound
    assert full - half < growth / 3


def test_compile_follows_a_schedule():
    """A temperature, or scale, that is another number at every step."""
    torch._dynamo.reset()
    x, y = normal(5, 8), normal(5, 8, seed=1)
    named = {nt_xent: "temperature", similarity_logsumexp: "scale", info_nce: "temperature", clip_loss: "logit_scale"}
    for function, name in named.items():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for value in (0.5, 0.4, 0.3):
            torch.testing.assert_close(compiled(x, y, **{name: value}), function(x, y, **{name: value}))


def test_use_backend_reference_is_the_formula():
    z1, z2 = normal(9, 8), normal(9, 8, seed=1)
    with fastssl.use_backend("reference"):
        assert torch.equal(nt_xent(z1, z2), reference.contrastive.nt_xent(z1, z2))
