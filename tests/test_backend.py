"""`use_backend`: whose choice it is, and what it reaches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastssl
from fastssl.functional import nt_xent
from fastssl.ops import current_backend
from tests.recorder import Recorder


def _pair() -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(4, 8, requires_grad=True) for _ in range(2))


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match="'eager'"), fastssl.use_backend("eager"):
        pass


def test_threads_choose_for_themselves():
    """A enters, B enters, A leaves, B leaves; a thread that chooses nothing has what is there by default."""
    entered, left = threading.Event(), threading.Event()

    def first() -> str:
        with fastssl.use_backend("portable"):
            assert entered.wait(10)
        left.set()
        return current_backend()

    def second() -> tuple[str, str, str]:
        before = current_backend()
        with fastssl.use_backend("reference"):
            entered.set()
            assert left.wait(10)
            inside = current_backend()
        return before, inside, current_backend()

    with ThreadPoolExecutor(2) as pool, fastssl.use_backend("portable"):
        results = pool.submit(first), pool.submit(second)
        assert [r.result() for r in results] == ["auto", ("auto", "reference", "auto")]
    assert current_backend() == "auto"


def test_tasks_choose_for_themselves():
    async def main() -> list[str]:
        entered, left = asyncio.Event(), asyncio.Event()

        async def first() -> str:
            with fastssl.use_backend("portable"):
                await entered.wait()
            left.set()
            return current_backend()

        async def second() -> str:
            with fastssl.use_backend("reference"):
                entered.set()
                await left.wait()
                return current_backend()

        return [*await asyncio.gather(first(), second()), current_backend()]

    assert asyncio.run(main()) == ["auto", "reference", "auto"]


def test_blocks_may_be_left_in_any_order():
    """As those of two generators are, which run in turns."""
    first, second = fastssl.use_backend("portable"), fastssl.use_backend("portable")
    with fastssl.use_backend("reference"):
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert current_backend() == "portable"
        second.__exit__(None, None, None)
        assert current_backend() == "reference"
    assert current_backend() == "auto"


class _Reentrant(torch.autograd.Function):
    """So many backward passes within each other: from the 61st on they run on a thread of autograd's own."""

    @staticmethod
    def forward(ctx, x: Tensor, depth: int, seen: list) -> Tensor:
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        if ctx.depth == 0:
            ctx.seen.append((current_backend(), threading.get_ident()))
        else:
            with torch.enable_grad():
                x = torch.zeros((), requires_grad=True)
                _Reentrant.apply(x, ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


@pytest.mark.parametrize("chosen", ["auto", "portable", "reference"])
@pytest.mark.parametrize("depth", [0, 61])
def test_threads_of_autograd_follow_the_caller(chosen, depth):
    if depth and torch.__version__ < "2.12":
        pytest.skip("this PyTorch does not tell its threads who called")
    seen = []
    with fastssl.use_backend(chosen):
        _Reentrant.apply(torch.zeros((), requires_grad=True), depth, seen).backward()
    ((backend, thread),) = seen
    assert backend == chosen
    assert (thread == threading.get_ident()) == (depth == 0)


def test_the_context_that_a_backward_pass_leaves():
    """PyTorch 2.12 leaves None where a thread of autograd finds the context of its caller."""
    torch._C._stash_obj_in_tls("context", None)
    assert current_backend() == "auto"
    _Reentrant.apply(torch.zeros((), requires_grad=True), 0, []).backward()
    assert current_backend() == "auto"


@pytest.mark.parametrize("elsewhere", ["reference", "portable", "auto"])
@pytest.mark.parametrize("chosen, name", [("auto", "nt_xent_backward"), ("portable", "nt_xent_backward_portable")])
def test_what_ran_forward_runs_backward(chosen, name, elsewhere):
    """Also the pass that a second derivative goes through, and in another thread."""
    z = _pair()
    with fastssl.use_backend(chosen):
        loss = nt_xent(*z)

    def backward() -> set[str]:
        with fastssl.use_backend(elsewhere), Recorder() as names:
            gradients = torch.autograd.grad(loss, z, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in gradients), z, retain_graph=True)
        return names

    assert backward() == {name}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(backward).result() == {name}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "chosen, names", [("portable", {"nt_xent_portable", "nt_xent_backward_portable"}), ("reference", set())]
)
def test_checkpointing(chosen, names, use_reentrant):
    """Its forward pass in the backward pass: in the block that calls it, or in that of `context_fn`."""
    z = _pair()
    expected = torch.autograd.grad(nt_xent(*z), z)

    def run(**options: Callable[..., object]) -> Tensor:
        return checkpoint(lambda *z: nt_xent(*z) * 2, *z, use_reentrant=use_reentrant, **options) / 2

    with Recorder() as ran, fastssl.use_backend(chosen):
        run().backward()
    assert ran == names
    for x, gradient in zip(z, expected, strict=True):
        torch.testing.assert_close(x.grad, gradient)
    if not use_reentrant:
        with Recorder() as ran:
            with fastssl.use_backend(chosen):
                loss = run(context_fn=lambda: (fastssl.use_backend(chosen), fastssl.use_backend(chosen)))
            gradients = torch.autograd.grad(loss, z)
        assert ran == names
        torch.testing.assert_close(gradients, expected)


def _operations(graph: torch.fx.GraphModule) -> set[str]:
    return {node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "fastssl"}


OPERATIONS = {"auto": {"nt_xent"}, "portable": {"nt_xent_portable"}, "reference": set()}


def test_compile_recompiles_when_the_choice_changes():
    compiled_operations, ran = [], []

    def compiler(graph: torch.fx.GraphModule, _: list) -> Callable[..., object]:
        operations = _operations(graph)
        compiled_operations.append(operations)

        def run(*args: object) -> object:
            ran.append(operations)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    compiled, z = torch.compile(nt_xent, fullgraph=True, backend=compiler), _pair()
    for chosen in ("auto", "portable", "reference", "portable", "auto"):
        with fastssl.use_backend(chosen):
            compiled(*z)
        assert ran.pop() == OPERATIONS[chosen]
    with fastssl.use_backend("portable"), ThreadPoolExecutor(1) as pool:
        pool.submit(compiled, *z).result()
    assert ran.pop() == OPERATIONS["auto"]
    assert compiled_operations == list(OPERATIONS.values())


@pytest.mark.parametrize("chosen", OPERATIONS)
def test_blocks_within_what_is_compiled(chosen):
    compiled_operations = []

    def compiler(graph: torch.fx.GraphModule, _: list) -> Callable[..., object]:
        compiled_operations.append(_operations(graph))
        return graph.forward

    def function(*z: Tensor) -> Tensor:
        with fastssl.use_backend("reference"), fastssl.use_backend(chosen):
            loss = nt_xent(*z)
        return loss * 2

    torch._dynamo.reset()
    z = _pair()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend=compiler)(*z), function(*z))
    assert compiled_operations == [OPERATIONS[chosen]]
    assert current_backend() == "auto"
