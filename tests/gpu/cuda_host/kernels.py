"""The operations of csrc/cuda, compared with the portable ones.

Run by tests/gpu/test_cuda.py in a process of its own, where FASTSSL_CUDA_HOST names the library that was compiled for
the CPU (cuda_runtime.h beside this says how): the sanitizers must be there from the start. Every test runs three times,
with the threads of a block in another order. Without that variable it runs once, on the GPU. Memory that nobody has
written is NaN.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import signal

import pytest
import torch
from torch import Tensor

from fastssl.reference import OPS
from tests.accuracy import with_tensors
from tests.gpu.cuda_host.compile import OPERATIONS
from tests.recorder import recorded_calls

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


def _assert_as_accurate(name: str, *args) -> None:
    """At most twice the error of the portable operation in the same dtype, against it in float64, and rounding."""
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    eager_op = getattr(portable, f"{name}_portable")
    outputs = getattr(cuda, name)(*args), eager_op(*exact), eager_op(*args)
    outputs = [(x,) if isinstance(x, Tensor) else x for x in outputs]
    for result, truth, eager in zip(*outputs, strict=True):
        assert result.shape == truth.shape and result.dtype == eager.dtype and result.is_contiguous()
        if not result.numel():
            continue
        error, allowed = ((x.double() - truth).abs().max().item() for x in (result, eager))
        rounding = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps * max(1, truth.abs().max().item())
        assert error <= 2 * allowed + 4 * rounding  # not so if the error is NaN


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
            args = grad, ids, [batch, keep, dim], positions
            _assert_as_accurate("restore_tokens_backward", *args)
        if length > 1:  # a token that several places show, and one that none does
            ids[:, 0] = ids[:, 1]
            args = grad, ids, [batch, keep, dim], True
            _assert_as_accurate("restore_tokens_backward", *args)


def test_gradients_of_many_samples_are_summed_in_parts():
    for batch in (32, 33, 97):
        grad, ids = torch.randn(batch, 9, 12), _permutations(batch, 9)
        for positions in (False, True):
            args = grad, ids, [batch, 4, 12], positions
            _assert_as_accurate("restore_tokens_backward", *args)


@pytest.mark.skipif(not LIBRARY, reason="leaves a GPU unusable")
@pytest.mark.parametrize(
    "call",
    [
        lambda: cuda.gather_tokens(X, IDS + 4),
        lambda: cuda.gather_tokens(X, IDS - 1),
        lambda: cuda.scatter_tokens(X, IDS + 5, 5, X[0, 0]),
        lambda: cuda.scatter_tokens(X, IDS - 1, 5, X[0, 0]),
        lambda: cuda.restore_tokens(X, IDS - 1, X[0, 0], None),
        lambda: cuda.restore_tokens_backward(X, IDS - 1, [2, 3, 3], True),
        lambda: cuda.gather_patches(torch.ones(2, 3, 8, 8), IDS + 4, [4, 4]),
        lambda: cuda.scatter_patches(torch.ones(2, 4, 48), IDS - 1, [2, 3, 8, 8], [4, 4]),
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
        (lambda: cuda.restore_tokens_backward(X, IDS, [2, -1, 3], True), "from 0 to 2.30 tokens, got -1"),
        (lambda: cuda.restore_tokens_backward(X, IDS, [2, 3], True), r"size_x_visible must be \[2, K, 3\], got"),
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


@pytest.mark.parametrize("momentum", [0.0, 1e-9, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_moving_averages_of_infinities_and_huge_numbers(target, momentum):
    """As in the portable code, bit for bit where both are equal, and at the ends of momentum; NaN is NaN."""
    for source in DTYPES:
        values = []
        for dtype in (target, source):
            narrow = dtype if dtype != torch.float64 else torch.promote_types(target, torch.float32)
            positive = torch.tensor([0.0, 1.0, torch.finfo(narrow).max, math.inf, math.nan], dtype=torch.float64)
            values.append(torch.cat([positive, -positive]).to(dtype))
        targets, sources = values[0].repeat(10), values[1].repeat_interleave(10)
        equal, expected = targets.double() == sources.double(), targets.clone()
        portable.ema_update_portable_([expected], [sources], torch.tensor(momentum, dtype=torch.float64))
        before = targets.clone()
        cuda.ema_update_([targets], [sources], torch.tensor(momentum, dtype=torch.float64))
        torch.testing.assert_close(targets, expected, equal_nan=True)
        exact = before if momentum else sources.to(target)
        kept = torch.ones_like(equal) if momentum in (0, 1) else equal & (before.signbit() == sources.signbit())
        assert torch.equal(targets[kept].nan_to_num(7), exact[kept].nan_to_num(7))
        numbers = kept & ~exact.isnan()
        assert torch.equal(targets[numbers].signbit(), exact[numbers].signbit())


def test_moving_averages_of_very_many_pairs():
    for count in (120, 121, 900, 901):
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


LR, MOMENTUM = torch.tensor(0.02, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
ADAMW = with_tensors((LR, 0.9, 0.99, 1e-8, 0.1, MOMENTUM))


def _parameters(dtype: torch.dtype, ema: torch.dtype) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs, ema_params, steps."""
    lists = [[target for target, _ in _pairs(of, of)] for of in (dtype, dtype, dtype, dtype, ema)]
    lists[1][10] = lists[1][10].contiguous()  # of other strides than its parameter
    lists[3] = [x.square_() for x in lists[3]]
    return [*lists, [torch.tensor(float(i % 3), device="cpu") for i in range(len(lists[0]))]]


@pytest.mark.parametrize("ema", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_and_moving_averages(dtype, ema):
    states = _parameters(dtype, ema)
    exact, eager = ([[x.to(d or x.dtype, copy=True) for x in xs] for xs in states[:-1]] for d in (torch.float64, None))
    for lists in (exact, eager):
        portable.adamw_ema_step_portable_(*lists, [x.clone() for x in states[-1]], *ADAMW)
    cuda.adamw_ema_step_(*states, *ADAMW)
    assert [int(x) for x in states[-1]] == [i % 3 + 1 for i in range(len(states[-1]))]
    for results, others, truths in zip(states[:-1], eager, exact, strict=True):
        for result, other, truth in zip(results, others, truths, strict=True):
            if result.numel():
                error, allowed = ((x.double() - truth).abs().max().item() for x in (result, other))
                assert error <= 2 * allowed + 2e-7 * truth.abs().max().item()


def test_adamw_of_very_many_parameters_and_of_some_without_a_teacher():
    for count in (53, 54, 400, 401):
        states = [list(x.unbind()) for x in torch.rand(5, count, 3)]
        states[4][::2] = [x.detach() for x in states[0][::2]]
        expected = [[x.clone() for x in xs] for xs in states]
        expected[4][::2] = expected[0][::2]
        for op, lists in ((cuda.adamw_ema_step_, states), (portable.adamw_ema_step_portable_, expected)):
            op(*lists, [torch.tensor(0.0, device="cpu") for _ in range(count)], *ADAMW)
        torch.testing.assert_close(states, expected)


def test_adamw_writes_what_it_should_only():
    memory = torch.full((5, 40, 50), math.nan)
    lists = [[x[3:30:2, 5:45:3].fill_(1)] for x in memory]
    cuda.adamw_ema_step_(*lists, [torch.tensor(0.0, device="cpu")], *ADAMW)
    assert memory.isnan().sum() == memory.numel() - 5 * 14 * 14 and (lists[1][0] == 1).all()
    assert not any((x == 1).any() for x in (lists[0][0], lists[4][0]))


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


@pytest.mark.parametrize(
    "place, tensor, match",
    [
        (1, ZEROS[1:], r"params\[0\] and grads\[0\] .*shape, got \[4\] and \[3\]"),
        (1, ZEROS.double(), r"params\[0\] and grads\[0\] must have the same dtype, got Float and Double"),
        (
            2,
            LOW,
            r"ema_params and steps must not share memory, got (exp_avgs|params)\[0\] and (exp_avgs|params)\[0\]",
        ),
        (0, LOW.half(), r"params\[0\] must be float32 or float64, got Half"),
        (5, LOW[0], r"and steps must not share memory, got (steps|params)\[0\] and (steps|params)\[0\]"),
        (5, torch.zeros(1), r"steps\[0\] must be a 0-d tensor, float32, on the CPU, got Float on cpu of shape \[1\]"),
        (6, torch.zeros(2), r"lr must be one number, got shape \[2\]"),
    ],
)
def test_bad_parameters(place, tensor, match):
    args = [[LOW], *([x.clone()] for x in 4 * [ZEROS]), [torch.zeros((), device="cpu")], *ADAMW]
    args[place] = tensor if place == 6 else [tensor]
    with pytest.raises(ValueError, match=match):
        cuda.adamw_ema_step_(*args)
    assert (LOW == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["masked_patch_loss", "masked_feature_loss"])
def test_losses_of_masked_patches(name, dtype):
    """Every fourth sample, in each dtype other ones; the other side's dtype differs in every second of them."""
    index = DTYPES.index(dtype)
    samples = list(OPS[name].samples(dtype, str(torch.get_default_device())))[index::4]
    for i, sample in enumerate(samples):
        ((_, args),) = recorded_calls(OPS[name], sample)
        pred, other, mask, *settings = (x.detach() if isinstance(x, Tensor) else x for x in args)
        other = other.to(DTYPES[index - i % 2])
        args = pred, other, mask, *settings
        _assert_as_accurate(name, *args)
        wide = torch.promote_types(torch.promote_types(dtype, other.dtype), torch.float32)
        _assert_as_accurate(f"{name}_backward", torch.randn(mask.shape).to(wide), *args)


@pytest.mark.parametrize(
    "size, patch",
    [((2, 3, 8, 12), [4, 4]), ((3, 1, 6, 6), [3, 2]), ((2, 2, 4, 6, 8), [2, 3, 4]), ((1, 5, 9, 35), [9, 7]),
     ((2, 3, 64, 32), [16, 16]), ((0, 3, 4, 4), [2, 2])],
)  # fmt: skip
def test_gather_and_scatter_of_patches(size, patch):
    length = math.prod(n // p for n, p in zip(size[2:], patch, strict=True))
    for i, dtype in enumerate(DTYPES):
        for layout, images in enumerate(
            (*_layouts(*size, dtype=dtype), torch.randn(*size).to(dtype).flip(1).movedim(1, -1))
        ):
            if layout == 4:
                images = images.contiguous().movedim(-1, 1)  # channels last
            ids = torch.randint(length, (size[0], length + 1)).to((torch.int64, torch.int32)[(i + layout) % 2])
            patches = cuda.gather_patches(images, ids, patch)
            assert torch.equal(patches, portable.gather_patches_portable(images, ids, patch))
            args = patches, ids, size, patch
            _assert_as_accurate("scatter_patches", *args)
            once = patches[:, : length // 2], _permutations(size[0], length)[:, : length // 2], size, patch
            assert torch.equal(cuda.scatter_patches(*once), portable.scatter_patches_portable(*once))


IMAGES, PRED, MASK = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 48), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, match",
    [
        (
            lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK, [4, 3], "patch"),
            r"multiples of \[4, 3\].*got \[2, 3, 8, 8\]",
        ),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK, [4], "patch"), r"images must have shape \(B, C, H, W\)"),
        (
            lambda: cuda.masked_patch_loss(PRED[:, 1:], IMAGES, MASK[:, 1:], [4, 4], "patch"),
            r"\[2, 4, 48\].*\[2, 3, 48\]",
        ),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK, [4, 4], "pixel"), "norm must be .*got 'pixel'"),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES.long(), MASK, [4, 4], "none"), "images must be floating.*Long"),
        (lambda: cuda.masked_patch_loss(PRED, IMAGES, MASK.float(), [4, 4], "none"), "mask must be boolean.*Float"),
        (
            lambda: cuda.masked_patch_loss_backward(PRED[0], PRED, IMAGES, MASK, [4, 4], "none"),
            "grad_losses must have mask's shape",
        ),
        (lambda: cuda.masked_feature_loss(PRED, PRED[..., 1:], MASK, "mse", *with_tensors((0.0,))), "the same shape"),
        (lambda: cuda.masked_feature_loss(PRED, PRED, MASK, "l1", *with_tensors((0.0,))), "loss must be .*got 'l1'"),
        (lambda: cuda.gather_patches(IMAGES, MASK.long()[:1], [4, 4]), r"ids must have shape \(2, K\).*got \[1, 4\]"),
        (lambda: cuda.gather_patches(IMAGES, MASK, [4, 4]), "ids must be int64 or int32, got Bool"),
        (lambda: cuda.scatter_patches(PRED, MASK.long(), [2, 3, 8, -8], [4, 4]), "size must not be negative"),
        (
            lambda: cuda.scatter_patches(PRED, MASK.long(), [2, 3, 8, 12], [4, 6]),
            r"patches must have shape \[2, 4, 72\]",
        ),
    ],
)
def test_bad_patches(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    "size, count, dim, start", [(7, 3, 5, 5), (7, 7, 33, 0), (5, 12, 64, 3), (3, 0, 4, 1), (1, 1, 1, 0)]
)
def test_enqueue(size, count, dim, start):
    for target, (source, layout) in itertools.product(DTYPES, zip(DTYPES, range(4), strict=True)):
        memory = torch.full((size + 2, dim + 1), math.nan, dtype=target)
        new_keys = _layouts(count, dim, dtype=source)[layout]
        for normalize in (False, True):
            keys, position = memory[1:-1, 1:], torch.tensor(start)
            keys.copy_(torch.randn(size, dim))
            expected = []
            for dtype in (torch.float64, target):
                expected.append(keys.to(dtype, copy=True))
                given = new_keys.to(torch.promote_types(dtype, source))
                portable.enqueue_portable_(expected[-1], position.clone(), given, normalize)
            cuda.enqueue_(keys, position, new_keys, normalize)
            assert position == (start + count) % size
            error, allowed = ((x.double() - expected[0]).abs().max().item() for x in (keys, expected[1]))
            assert error <= 2 * allowed + 1e-6
            assert memory[0].isnan().all() and memory[-1].isnan().all() and memory[:, 0].isnan().all()


def test_enqueue_zeros_and_keys_of_the_queue_itself():
    keys, position = torch.arange(1.0, 9).view(4, 2), torch.tensor(3)
    cuda.enqueue_(keys, position, keys[2:], False)
    assert keys.tolist() == [[7, 8], [3, 4], [5, 6], [5, 6]] and position == 1
    cuda.enqueue_(keys, position, torch.zeros(1, 2), True)
    assert keys[1].tolist() == [0, 0] and position == 2


@pytest.mark.parametrize(
    "keys, position, new_keys, match",
    [
        ((4, 3), 0, (2, 4), r"new_keys must have shape \(B, D\).*got \[2, 4\] and \[4, 3\]"),
        ((4, 3), 0.0, (2, 3), "position must be one int64, got Float"),
        ((0, 3), 0, (2, 3), "keys must have at least one row"),
    ],
)
def test_bad_queue(keys, position, new_keys, match):
    with pytest.raises(ValueError, match=match):
        cuda.enqueue_(torch.ones(keys), torch.tensor(position), torch.ones(new_keys), True)
