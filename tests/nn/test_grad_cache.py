"""grad_cache gives the gradients of a single pass, with one chunk's activations in memory."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl import grad_cache
from fastssl.distributed import rank, world_size
from fastssl.functional import clip_loss, info_nce, nt_xent
from fastssl.nn import NTXentLoss
from tests.distributed.processes import mean_of_all, run_processes

pytestmark = pytest.mark.usefixtures("device")

BATCH, DIM = 13, 8


def encoder(seed: int = 0, extra: type[nn.Module] | None = None) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(DIM, 16), extra() if extra else nn.Tanh(), nn.Tanh(), nn.Linear(16, DIM)
    return nn.Sequential(*layers).double()


def samples(rows: int = BATCH, seed: int = 1) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad for module in modules for p in module.parameters()]


def by_chunks(module: nn.Module, x: Tensor, chunk_size: int) -> Tensor:
    """A single pass whose graph holds all chunks."""
    return torch.cat([module(chunk) for chunk in x.tensor_split(math.ceil(len(x) / chunk_size))])


@pytest.mark.parametrize("chunk_size", [1, 3, BATCH - 1, BATCH, 100])
def test_one_encoder(chunk_size):
    ours, plain, x = encoder(), encoder(), samples()
    weight = torch.rand(BATCH, DIM, dtype=torch.float64)

    def loss_fn(z: Tensor) -> Tensor:  # of all pairs of samples
        return ((z @ z.T).softmax(1) @ weight).square().sum()

    loss = grad_cache(ours, x, loss_fn, chunk_size=chunk_size)
    expected = loss_fn(plain(x))
    expected.backward()
    assert not loss.requires_grad
    torch.testing.assert_close((loss, *gradients(ours)), (expected.detach(), *gradients(plain)))
    grad_cache(ours, x, loss_fn, chunk_size=chunk_size)
    torch.testing.assert_close(gradients(ours), [2 * g for g in gradients(plain)])


def test_two_views_by_one_encoder_that_returns_both():
    ours, plain, views = encoder(), encoder(), (samples(seed=1), samples(seed=2))
    loss = grad_cache(lambda a, b: (ours(a), ours(b)), views, nt_xent, chunk_size=5)
    expected = nt_xent(*map(plain, views))
    expected.backward()
    torch.testing.assert_close((loss, *gradients(ours)), (expected.detach(), *gradients(plain)))


@pytest.mark.parametrize("chunk_size", [2, 20, 40])
def test_several_encoders_with_inputs_of_all_kinds(chunk_size):
    """Queries, and twice as many documents, two of whose encoders are one; the temperature learns."""
    ours, plain = (nn.ModuleList([encoder(0), encoder(1)]) for _ in range(2))
    x = samples(12), (samples(12, 2), samples(12, 3)), {"a": samples(24, 4), "b": torch.arange(24)}
    temperatures = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def encoders(modules: nn.ModuleList):
        return [modules[0], lambda a, b: modules[1](a + b), lambda a, b: [b, modules[1](a * b.sin()[:, None])]]

    def loss_fn(temperature: Tensor):
        return lambda q, k, ids, n: info_nce(q, k, n[ids % 2 == 0], temperature=temperature)

    loss = grad_cache(encoders(ours), x, loss_fn(temperatures[0]), chunk_size=chunk_size)
    query, key, negative = encoders(plain)
    expected = loss_fn(temperatures[1])(query(x[0]), key(*x[1]), *negative(**x[2]))
    expected.backward()
    torch.testing.assert_close((loss, *gradients(ours)), (expected.detach(), *gradients(plain)))
    torch.testing.assert_close(temperatures[0].grad, temperatures[1].grad)


def test_gradients_by_finite_differences():
    """An independent witness: neither side of the other tests' comparisons."""
    model, x = encoder(), samples()
    grad_cache((model, model), (x, x.flip(1)), clip_loss_of(5.0), chunk_size=4)
    weight, step = model[0].weight, 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[2, 3] += sign * step if sign > 0 else -2 * step
            values.append(clip_loss_of(5.0)(model(x), model(x.flip(1))))
    torch.testing.assert_close(weight.grad[2, 3], (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-9)


def clip_loss_of(logit_scale):
    return lambda a, b: clip_loss(*(nn.functional.normalize(z, dim=1) for z in (a, b)), logit_scale)


@pytest.mark.parametrize("extra", [nn.Dropout, lambda: nn.BatchNorm1d(16)])
def test_random_numbers_and_buffers_repeat_themselves(extra):
    """As in a pass over the same chunks: gradients, the random numbers that follow, buffers and their counters."""
    ours, views = encoder(extra=extra), (samples(), samples(seed=2))
    nn.utils.parametrizations.spectral_norm(ours[3])
    plain = copy.deepcopy(ours)
    torch.manual_seed(3)
    loss = grad_cache((ours, ours), views, nt_xent_with_noise, chunk_size=4)
    following = torch.rand(3)
    torch.manual_seed(3)
    expected = nt_xent_with_noise(*(by_chunks(plain, view, 4) for view in views))
    expected.backward()
    assert torch.equal(following, torch.rand(3))
    torch.testing.assert_close((loss, *gradients(ours)), (expected.detach(), *gradients(plain)))
    assert all(torch.equal(*pair) for pair in zip(ours.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_buffers_of_encoders_without_a_second_pass(frozen):
    """A teacher, or an embedding that the loss ignores: its batch statistics are taken all the same, and once."""
    ours = encoder(extra=lambda: nn.BatchNorm1d(16)).requires_grad_(not frozen)
    plain, student, views = copy.deepcopy(ours), encoder(1), (samples(), samples(seed=2), samples(seed=3))
    grad_cache((ours, student, ours), views, lambda a, b, c: (b * c).var(), chunk_size=4)
    z = by_chunks(plain, views[0], 4), by_chunks(plain, views[2], 4)
    (encoder(1)(views[1]) * z[1]).var().backward()
    assert all(torch.equal(*pair) for pair in zip(ours.buffers(), plain.buffers(), strict=True))
    if not frozen:
        torch.testing.assert_close(gradients(ours), gradients(plain))


def test_lazy_and_expanded_buffers():
    ours, plain = (encoder(extra=lambda: nn.LazyBatchNorm1d(dtype=torch.float64)) for _ in range(2))
    for module in (ours, plain):
        module[0].register_buffer("scale", torch.ones(1).expand(3, 4))
    loss = grad_cache(ours, samples(), torch.var, chunk_size=4)
    expected = by_chunks(plain, samples(), 4).var()
    expected.backward()
    torch.testing.assert_close((loss, *gradients(ours)), (expected.detach(), *gradients(plain)))
    assert all(torch.equal(*pair) for pair in zip(ours.buffers(), plain.buffers(), strict=True))


def nt_xent_with_noise(z1: Tensor, z2: Tensor) -> Tensor:
    return nt_xent(z1 + torch.rand_like(z1), z2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_random_numbers_of_cuda_repeat_themselves():
    ours = encoder(extra=nn.Dropout).cuda()
    plain, view = copy.deepcopy(ours), samples()  # which each chunk takes to the GPU
    torch.manual_seed(3)
    grad_cache(lambda x: ours(x.cuda()), view, torch.var, chunk_size=4)
    following = torch.rand(3, device="cuda")
    torch.manual_seed(3)
    torch.var(by_chunks(plain, view.cuda(), 4)).backward()
    assert torch.equal(following, torch.rand(3, device="cuda"))
    torch.testing.assert_close(gradients(ours), gradients(plain))


class Scale(torch.autograd.Function):
    """The identity; whether its passes are under autocast goes to `seen`."""

    seen: list[tuple[str, bool]] = []

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        Scale.seen.append(("forward", torch.is_autocast_enabled("cpu")))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        Scale.seen.append(("backward", torch.is_autocast_enabled("cpu")))
        return gradient


def test_autocast():
    """Forward passes are under it, backward ones are not; the numbers are those of a pass over the same chunks."""
    ours, plain, x = encoder().float(), encoder().float(), samples().float()
    Scale.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = grad_cache(lambda x: Scale.apply(ours(x)), x, torch.var, chunk_size=4)
        expected = torch.var(by_chunks(plain, x, 4))
    expected.backward()
    assert Scale.seen == 4 * [("forward", True)] + 4 * [("forward", True), ("backward", False)]
    torch.testing.assert_close(loss, expected.detach())
    for gradient, reference in zip(gradients(ours), gradients(plain), strict=True):  # of float32 weights
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=2e-3)


def test_gradient_scaling():
    ours, plain, x = encoder().float(), encoder().float(), samples().float()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(ours.parameters(), lr=0.1)
    loss = grad_cache(ours, x, lambda z: scaler.scale(torch.var(z)), chunk_size=4)
    expected = torch.var(plain(x))
    expected.backward()
    torch.testing.assert_close(loss, 1024 * expected.detach())
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradients(ours), gradients(plain))


class Counting(nn.Module):
    """An encoder that counts its samples, with and without a graph."""

    def __init__(self, frozen: bool = False):
        super().__init__()
        self.module, self.samples = encoder().requires_grad_(not frozen), {True: 0, False: 0}

    def forward(self, x: Tensor) -> Tensor:
        self.samples[torch.is_grad_enabled()] += len(x)
        return self.module(x)


def test_what_is_embedded_once():
    """A single chunk, and what needs no gradient, whose embeddings are constants for the loss."""
    single = Counting()
    grad_cache(single, samples(), torch.var, chunk_size=BATCH)
    assert single.samples == {True: BATCH, False: 0}

    frozen, learning = Counting(frozen=True), Counting()
    needs = []

    def loss_fn(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        needs.append([z.requires_grad for z in (a, b, ids)])
        return (a * b + ids[:, None]).var()

    ids = torch.arange(BATCH)
    grad_cache((frozen, lambda x, i: (learning(x), i)), (samples(), (samples(), ids)), loss_fn, chunk_size=4)
    assert needs == [[False, True, False]]
    assert frozen.samples == {True: 4, False: BATCH - 4}
    assert learning.samples == {True: 4 + BATCH, False: BATCH - 4}
    grad_cache((learning, learning), (samples(), samples()), lambda a, b: a.var(), chunk_size=4)  # not of b
    assert learning.samples[True] == 4 + BATCH + 4 + 4 + BATCH


def test_activations_of_one_chunk_are_in_memory():
    alive, most = 0, 0

    class Saved:
        def __init__(self, x: Tensor):
            nonlocal alive, most
            self.x = x.detach()  # not in a cycle with its graph
            alive += x.numel()
            most = max(most, alive)
            weakref.finalize(self, self.forget, x.numel())

        @staticmethod
        def forget(size: int):
            nonlocal alive
            alive -= size

    model = encoder()

    def peak(chunk_size: int) -> int:
        nonlocal most
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
            grad_cache(
                (model, model), (samples(512), samples(512, 2)), lambda a, b: (a - b).mean(), chunk_size=chunk_size
            )
        assert alive == 0
        return most

    assert peak(16) <= peak(512) / 2 / 16  # of either view


def _check_data_parallel() -> None:
    """Every gradient is reduced once, with its module's last chunk, and is that of the whole batch in one process."""
    single, reduced = encoder(), []
    parallel = DistributedDataParallel(encoder())

    def reduce(_, bucket):
        reduced.extend(bucket.parameters())
        handle = dist.all_reduce(bucket.buffer().div_(world_size()), async_op=True)
        return handle.get_future().then(lambda future: future.value()[0])

    parallel.register_comm_hook(None, reduce)
    views = samples(6 * world_size()), samples(6 * world_size(), 2)
    expected = nt_xent(*map(single, views))
    expected.backward()
    mine = [view[6 * rank() :][:6] for view in views]
    inside = nn.Sequential(nn.Identity(), parallel)
    for step, encoders in enumerate([(parallel, parallel), (inside, parallel.forward)]):
        for chunk_size in (2, 6):
            parallel.zero_grad()
            reduced.clear()
            loss = grad_cache(encoders, mine, NTXentLoss(gather_distributed=True), chunk_size=chunk_size)
            torch.testing.assert_close(mean_of_all(loss), expected.detach())
            torch.testing.assert_close(gradients(parallel), gradients(single))
            assert len(reduced) == len(gradients(single)), f"{step}, {chunk_size}"


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As transformers' ModelOutput: a mapping of what is not None, with attributes, that PyTorch can take apart."""

    embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value


torch.utils._pytree.register_pytree_node(
    Output, lambda x: (list(x.values()), list(x)), lambda values, names: Output(**dict(zip(names, values, strict=True)))
)


class Outputs(nn.Module):
    """Returns what is asked for."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.kind = encoder(extra=nn.Dropout), kind

    def forward(self, x: Tensor, mask: Tensor | None = None, normalize: bool = False, scale: float = 1.0) -> Any:
        z = self.model(x if mask is None else x * mask) * scale
        z = nn.functional.normalize(z, dim=1) if normalize else z
        return self.kind(embeds=z, hidden_states=(z.detach(), z.square()))


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, collections.UserDict, Output])
@pytest.mark.parametrize(
    "inputs",
    [
        samples(),
        (samples(), None, True),
        {"x": samples(), "mask": None, "normalize": True},
        collections.UserDict(x=samples(), mask=samples(seed=4), scale=0.5),
    ],
    ids=["tensor", "tuple", "dict", "mapping"],
)
def test_mappings_none_and_flags(kind, inputs):
    def loss_fn(output: Any) -> Tensor:
        assert type(output) is (dict if kind is collections.UserDict else kind)
        z = output.embeds if kind is Output else output["embeds"]
        return nt_xent(z, z.flip(0)) + output["hidden_states"][1].mean()

    model = Outputs(kind).eval()
    output = (
        model(**inputs)
        if isinstance(inputs, Mapping)
        else model(*inputs)
        if isinstance(inputs, tuple)
        else model(inputs)
    )
    expected = loss_fn(dict(output) if kind is collections.UserDict else output)
    expected.backward()
    exact = gradients(model)
    for chunk_size in (4, BATCH):
        loss = grad_cache(model, inputs, loss_fn, chunk_size=chunk_size)
        torch.testing.assert_close(loss, expected.detach())
        for ours, theirs in zip(gradients(model), exact, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_outputs_of_several_encoders():
    """Tuples and lists are unpacked, mappings and what is nested are not."""
    model, two = Outputs(Output).eval(), encoder(1)
    seen = []

    def loss_fn(*arguments: Any) -> Tensor:
        seen.append([type(x) for x in arguments])
        output, pair, none, z = arguments
        return nt_xent(output.embeds, z) + pair[0].sum()

    inputs = [samples(), samples(seed=2)]
    loss = grad_cache([model, lambda x: ([two(x)], None, two(x))], inputs, loss_fn, chunk_size=5)
    output, z = model(inputs[0]), two(inputs[1])
    torch.testing.assert_close(loss, (nt_xent(output.embeds, z) + z.sum()).detach())
    assert seen == [[Output, list, type(None), Tensor]]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")
def test_data_parallel(tmp_path):
    run_processes(_check_data_parallel, 2, tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoders": "encode"}, TypeError, "encoders must be callable, got str"),
        ({"encoders": ()}, ValueError, "encoders and inputs must be as many, at least one, got 0 and 2"),
        ({"encoders": (len,) * 3}, ValueError, "encoders and inputs must be as many, at least one, got 3 and 2"),
        (
            {"encoders": (len,) * 2, "inputs": samples(2)},
            TypeError,
            "several encoders must be a tuple or list, got",
        ),
        ({"inputs": None}, TypeError, "inputs must be tensors, or tuples, lists or .*, got NoneType"),
        ({"inputs": "text"}, TypeError, "inputs must be tensors, or tuples, lists or .*, got str"),
        ({"inputs": (samples(), ["a", "b"])}, TypeError, "inputs must be .*of tensors, None and flags, got list"),
        ({"inputs": [None, 1.0]}, ValueError, r"inputs of an encoder must have one length in common, got shapes \[\]"),
        ({"inputs": {}}, ValueError, r"inputs of an encoder must have one length in common, got shapes \[\]"),
        ({"inputs": torch.tensor(1.0)}, ValueError, r"one length in common, got shapes \[\(\)\]"),
        ({"inputs": (samples(3), samples(2))}, ValueError, r"one length .*, got shapes \[\(3, 8\), \(2, 8\)\]"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer, got float"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be positive, got 0"),
        ({"encoders": lambda a, b: None}, TypeError, "encoders must return a tensor, or .*, got NoneType"),
        ({"encoders": lambda a, b: (a, [b, 1.0])}, TypeError, "encoders must return a tensor, or .*, got float"),
        ({"encoders": lambda a, b: {"z": None}}, TypeError, "encoders must return a tensor, or .*, got dict"),
        ({"encoders": lambda a, b: a.sum(0)}, ValueError, r"encoders must return a row for .* 4 samples, .*\(8,\)"),
        ({"loss_fn": lambda a: 1.0}, TypeError, "loss_fn must return a tensor, got float"),
        ({"loss_fn": lambda a: a}, ValueError, r"loss_fn must return a 0-d tensor, got shape \(12, 8\)"),
        ({"loss_fn": lambda a: a.detach().sum()}, RuntimeError, "does not require grad"),
    ],
)
def test_bad_arguments(change, error, message):
    model = encoder()
    arguments = {"encoders": lambda a, b: model(a), "inputs": (samples(12),) * 2, "loss_fn": torch.var, "chunk_size": 4}
    arguments |= change
    with pytest.raises(error, match=message):
        grad_cache(arguments.pop("encoders"), arguments.pop("inputs"), arguments.pop("loss_fn"), **arguments)


def test_empty_batch_is_a_single_pass():
    model = encoder()
    assert grad_cache(model, samples(0), torch.sum, chunk_size=4) == 0
    assert all(g.eq(0).all() for g in gradients(model))
