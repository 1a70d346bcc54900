"""The operations of csrc/cuda, compared with the portable ones.

Run by tests/test_cuda.py in a process of its own, where FASTSSL_CUDA_HOST names the library that was compiled for the
CPU (cuda_runtime.h beside this says how): the sanitizers must be there from the start. Every test runs three times,
with the threads of a block in another order. Without that variable it runs once, on the GPU. Memory that nobody has
written is NaN.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal

import pytest
import torch
from cuda_host.compile import OPERATIONS
from torch import Tensor

import fastssl  # noqa: F401  (defines the operations)

LIBRARY = os.environ.get("FASTSSL_CUDA_HOST")
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2} if LIBRARY else {"on the GPU": 0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

portable = cuda = torch.ops.fastssl
if LIBRARY:
    _library = torch.library.Library("fastssl_cuda_host", "DEF")
    for _name in OPERATIONS:
        _library.define(str(getattr(portable, _name).default._schema).removeprefix("fastssl::"))
    torch.ops.load_library(LIBRARY)
    cuda = torch.ops.fastssl_cuda_host


@pytest.fixture(params=ORDERS.values(), ids=ORDERS, autouse=True)
def _order_of_threads(request):
    if LIBRARY:
        ctypes.CDLL(LIBRARY).cuda_host_order(request.param)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what it allocates with NaN
    with torch.device("cpu" if LIBRARY else "cuda"):
        yield


def _layouts(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """The same numbers contiguous, misaligned, with gaps, and transposed."""
    x = torch.randn(*shape).to(dtype)
    shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(shape).copy_(x)
    gaps = torch.full((*shape[:-2], 2 * shape[-2], shape[-1] + 3), math.nan, dtype=dtype)[..., ::2, 1:-2].copy_(x)
    return [x, shifted, gaps, x.mT.contiguous().mT]


def _permutations(batch: int, length: int) -> Tensor:
    return torch.rand(batch, length).argsort(1)


def _combinations(shape: tuple[int, ...]) -> list[tuple[torch.dtype, int]]:
    """Each dtype with one of `_layouts`, another one for each shape."""
    return [(dtype, (SHAPES.index(shape) + i) % 4) for i, dtype in enumerate(DTYPES)]


def _assert_as_accurate(results: tuple[Tensor, ...], name: str, *args) -> None:
    """At most twice the error of the portable operation in the same dtype, against it in float64."""
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    for result, truth, eager in zip(
        results, getattr(portable, name)(*exact), getattr(portable, name)(*args), strict=True
    ):
        assert result.shape == truth.shape and result.dtype == eager.dtype and result.is_contiguous()
        if not result.numel():
            continue
        error, allowed = ((x.double() - truth).abs().max().item() for x in (result, eager))
        assert error <= 2 * allowed + 1e-7 * truth.abs().max().item()  # not so if the error is NaN


@pytest.mark.parametrize(
    "batch, length, keep",
    [(4, 1, 0), (3, 2, 1), (7, 64, 16), (2, 65, 65), (2, 257, 3), (1, 600, 150), (0, 5, 2), (5, 0, 0)],
)
def test_masking_ids(batch, length, keep):
    for seed in (torch.tensor(0), torch.tensor(2**62 - 1), torch.tensor(-12345)):
        results = [op(seed, batch, length, keep) for op in (cuda.masking_ids, portable.masking_ids_portable)]
        assert all(map(torch.equal, *results))


SHAPES = ((3, 7, 5), (1, 1, 1), (2, 130, 16), (2, 3, 300), (1, 70, 129), (40, 3, 8), (0, 4, 3), (2, 0, 3), (2, 3, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_and_scatter(shape):
    batch, length, dim = shape
    count = length + 2 if length else 0
    for dtype, layout in _combinations(shape):
        ids = torch.randint(max(length, 1), (batch, count)).to((torch.int64, torch.int32)[layout % 2])
        x, tokens = (_layouts(*size, dim, dtype=dtype)[layout] for size in ((batch, length), (batch, count)))
        assert torch.equal(cuda.gather_tokens(x, ids), x.gather(1, ids.long()[:, :, None].expand(-1, -1, dim)))
        fill = torch.randn(dim)
        results = [op(tokens, ids, length, fill) for op in (cuda.scatter_tokens, portable.scatter_tokens_portable)]
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        args = tokens[:, : length // 2], _permutations(batch, length + 1)[:, : length // 2], length + 1, fill
        assert torch.equal(cuda.scatter_tokens(*args), portable.scatter_tokens_portable(*args))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_restore(shape):
    batch, length, dim = shape
    for dtype, layout in _combinations(shape):
        keep = (length + 1) // 2
        ids = _permutations(batch, length).to((torch.int64, torch.int32)[layout % 2])
        x, grad = (_layouts(batch, n, dim, dtype=dtype)[layout] for n in (keep, length))
        mask_token, pos_embed = torch.randn(dim), torch.randn(length, dim).to(dtype)
        for positions in (None, pos_embed):
            args = x, ids, mask_token, positions
            assert torch.equal(cuda.restore_tokens(*args), portable.restore_tokens_portable(*args))
        for positions in (False, True):
            args = grad, ids, keep, positions
            _assert_as_accurate(cuda.restore_tokens_backward(*args), "restore_tokens_backward_portable", *args)
        if length > 1:  # a token that several places show, and one that none does
            ids[:, 0] = ids[:, 1]
            args = grad, ids, keep, True
            _assert_as_accurate(cuda.restore_tokens_backward(*args), "restore_tokens_backward_portable", *args)


def test_gradients_of_many_samples_are_summed_in_parts():
    for batch in (32, 33, 97):
        grad, ids = torch.randn(batch, 9, 12), _permutations(batch, 9)
        for positions in (False, True):
            args = grad, ids, 4, positions
            _assert_as_accurate(cuda.restore_tokens_backward(*args), "restore_tokens_backward_portable", *args)


@pytest.mark.skipif(not LIBRARY, reason="leaves a GPU unusable")
@pytest.mark.parametrize(
    "call",
    [
        lambda: cuda.gather_tokens(X, IDS + 4),
        lambda: cuda.gather_tokens(X, IDS - 1),
        lambda: cuda.scatter_tokens(X, IDS + 5, 5, X[0, 0]),
        lambda: cuda.scatter_tokens(X, IDS - 1, 5, X[0, 0]),
        lambda: cuda.restore_tokens(X, IDS - 1, X[0, 0], None),
        lambda: cuda.restore_tokens_backward(X, IDS - 1, 3, True),
    ],
)
def test_ids_out_of_range_are_asserted(call):
    child = os.fork()
    if not child:
        call()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGABRT


X, IDS = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: cuda.masking_ids(torch.tensor(0.5), 1, 2, 1), "seed must be one int64, got Float"),
        (lambda: cuda.masking_ids(torch.tensor(5), 1, 2, 3), "keep must be from 0 to length, got 3 of 2"),
        (lambda: cuda.gather_tokens(X[0], IDS), r"ids must have shape \(B, K\).*got \[2, 4\] and \[4, 3\]"),
        (lambda: cuda.gather_tokens(X, IDS.float()), "ids must be int64 or int32, got Float"),
        (lambda: cuda.scatter_tokens(X[:, :2], IDS, 5, X[0, 0]), "as many columns as there are tokens"),
        (lambda: cuda.scatter_tokens(X, IDS, -1, X[0, 0]), "length must be from 0 to 2.30, got -1"),
        (lambda: cuda.scatter_tokens(X, IDS, 5, X[0]), r"fill must have one element.*got shape \[4, 3\]"),
        (lambda: cuda.scatter_tokens(X.long(), IDS, 5, X[0, 0]), "tokens must be of 16, 32 or 64 bits.*got Long"),
        (lambda: cuda.restore_tokens(X, IDS, X[0], None), "mask_token must have one element"),
        (lambda: cuda.restore_tokens(X, IDS, X[0, 0], X), r"pos_embed must have one row.*\[2, 4, 3\]"),
        (lambda: cuda.restore_tokens_backward(X, IDS, -1, True), "keep must be from 0 to 2.30, got -1"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def _pairs(target: torch.dtype, source: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """About the size of a vector and of a chunk; 0-d, transposed, with gaps, misaligned."""

    def rows(dtype: torch.dtype) -> list[Tensor]:
        def x(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype)

        flat = [x(n) for n in (0, 1, 3, 4, 4095, 4096, 4097, 9000)]
        return [*flat, x(), x(3, 5), x(30, 40).T, x(9, 30)[:, ::2], x(9, 7)[1:, 2:], x(50)[1:]]

    return list(zip(rows(target), rows(source), strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_moving_averages(target, momentum):
    pairs = [pair for source in DTYPES for pair in _pairs(target, source)]
    targets, sources = map(list, zip(*pairs, strict=True))
    sources[10] = sources[10].contiguous()  # of other strides than its target
    expected, eager = ([t.to(d, copy=True) for t in targets] for d in (torch.float64, target))
    for results, of in ((expected, [s.double() for s in sources]), (eager, sources)):
        portable.ema_update_portable_(results, of, torch.tensor(momentum, dtype=torch.float64))
    cuda.ema_update_(targets, sources, torch.tensor(momentum, dtype=torch.float64))
    for result, other, truth in zip(targets, eager, expected, strict=True):
        if result.numel():
            error, allowed = ((x.double() - truth).abs().max().item() for x in (result, other))
            assert error <= 2 * allowed + 1e-7 * truth.abs().max().item()


def test_moving_averages_of_very_many_pairs():
    for count in (128, 129, 1024, 1025):
        targets, sources = (list(torch.randn(count, 3).unbind()) for _ in range(2))
        expected = torch.stack(targets).lerp(torch.stack(sources), 0.25)
        cuda.ema_update_(targets, sources, torch.tensor(0.75, dtype=torch.float64))
        torch.testing.assert_close(torch.stack(targets), expected)


def test_moving_averages_write_targets_only():
    memory = torch.full((40, 50), math.nan)
    target = memory[3:30:2, 5:45:3]
    target.zero_()
    cuda.ema_update_([target, memory[0, 1:4].zero_()], [torch.ones(target.shape), torch.ones(3)], torch.tensor(0.5))
    assert (target == 0.5).all() and memory.isnan().sum() == memory.numel() - target.numel() - 3


LOW, ZEROS = torch.ones(4), torch.zeros(4)


@pytest.mark.parametrize(
    "targets, sources, momentum, match",
    [
        ([LOW], [], 0.5, "targets and sources must have the same length, got 1 and 0"),
        ([LOW], [ZEROS[1:]], 0.5, r"targets\[0\] and sources\[0\] .*shape, got \[4\] and \[3\]"),
        ([LOW], [ZEROS.long()], 0.5, r"sources\[0\] must be of 16, 32 or 64 bits, floating-point, got Long"),
        ([LOW.bool()], [ZEROS], 0.5, r"targets\[0\] must be of 16, 32 or 64 bits, floating-point, got Bool"),
        ([LOW, LOW], [ZEROS, ZEROS], 0.5, r"targets must not share memory, got targets\[\d\] and targets\[\d\]"),
        ([LOW[:3]], [LOW[1:]], 0.5, r"targets must not share memory, got sources\[0\] and targets\[0\]"),
        ([LOW[:1].expand(4)], [ZEROS], 0.5, r"targets\[0\] must have no two elements in one place, got strides \[0\]"),
        ([LOW], [ZEROS], [0.5, 0.5], r"momentum must be one number, got shape \[2\]"),
    ],
)
def test_bad_pairs(targets, sources, momentum, match):
    with pytest.raises(ValueError, match=match):
        cuda.ema_update_(targets, sources, torch.tensor(momentum))
    assert (LOW == 1).all()
