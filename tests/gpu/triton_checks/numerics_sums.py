"""The Triton kernels over two sets of rows against the float64 formulas: on the GPU, or in Triton's interpreter.

test_triton.py runs this file in processes of its own, as it does numerics.py.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import contrastive, sigmoid
from fastssl.kernels.common import accumulate
from fastssl.kernels.common.rows import pad
from fastssl.kernels.contrastive import sums as of_sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Everything on a GPU; in the interpreter, which is slow and knows no TF32, a selection unless a sweep is wanted.
THOROUGH = not INTERPRETED or os.environ.get("FASTSSL_TRITON_SWEEP") == "1"
PRECISIONS = list(DTYPES) if THOROUGH else ["float32", "bfloat16", "float16"]
OPERATIONS = ["similarity", "pair", "self", "softplus"]
SIZES = [(1, 1, 1), (1, 9, 8), (3, 129, 64), (127, 65, 130), (129, 127, 24), (2, 400, 40), (5, 3, 1100)]

if INTERPRETED:
    from tests.gpu.triton_checks import interpreter

    interpreter.patch()
    interpreter.hurry()


def rows(count: int, dim: int, dtype: torch.dtype = torch.float32, length: float = 1.0, seed: int = 0) -> Tensor:
    """Random rows of about this length."""
    generator = torch.Generator().manual_seed(seed + 1000 * count + dim)
    return (length * dim**-0.5 * torch.randn(count, dim, generator=generator)).to(DEVICE, dtype)


def some_excluded(m: int, n: int) -> Tensor:
    """For each row a column, or a number that is none."""
    own = (torch.arange(m) * 7) % (n + 3) - 1
    own[::11] += 2**32
    return own.to(DEVICE)


def random_gradient(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(DEVICE)


def kernel_of(operation: str, x: Tensor, y: Tensor, scale: float, bias: float, exclude: Tensor | None, precision: str):
    """What an operation's loss, gradients and shifts are by the launchers; what they leave unwritten is NaN.

    The loss is a log-sum-exp per row (and column), with random gradients, or the sigmoid loss.
    """
    s, b = (torch.tensor(float(value), device=DEVICE) for value in (scale, bias))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        if operation == "softplus":
            total, dx, dy, dscale, dbias = sigmoid.similarity_softplus(x, y, s, b, exclude, True, precision)
            again, none, nor, zero, _ = sigmoid.similarity_softplus(x, y, s, b, exclude, False, precision)
            assert none.shape == nor.shape == (0, x.shape[1]) and zero == 0
            torch.testing.assert_close(again, total, equal_nan=True)
            assert dx.dtype == dy.dtype == torch.float32
            return {"loss": total, "dx": dx, "dy": dy, "dscale": dscale, "dbias": dbias}
        if operation == "similarity":
            total, shift, weighted = contrastive.similarity_logsumexp(x, y, s, exclude, True, precision)
            again, same, none = contrastive.similarity_logsumexp(x, y, s, exclude, False, precision)
            assert none.shape == (0, x.shape[1]) and weighted.dtype == torch.float32
            torch.testing.assert_close(same, shift, equal_nan=True)
            torch.testing.assert_close(again, total, rtol=1e-5, atol=0, equal_nan=True)
            g = random_gradient(x.shape[0]) / total
            backward = contrastive.similarity_logsumexp_backward
            dx, dy, dscale = backward(g, x, y, s, exclude, shift, weighted, True, precision)
            same, none, share = backward(g, x, y, s, exclude, shift, weighted, False, precision)
            assert none.shape == (0, x.shape[1]) and none.dtype == y.dtype
            assert torch.equal(same.nan_to_num(), dx.nan_to_num())
            assert torch.equal(share.nan_to_num(), dscale.nan_to_num())
        elif operation == "pair":
            sums = contrastive.pair_logsumexp(x, y, s, exclude, precision)
            total, shift = torch.cat(sums[::2]), torch.cat(sums[1::2])
            g = random_gradient(total.shape[0]) / total
            dx, dy, dscale = contrastive.pair_logsumexp_backward(
                *g.split((x.shape[0], y.shape[0])), x, y, s, exclude, *sums[1::2], precision
            )
        else:
            total, shift = contrastive.self_logsumexp(x, s, precision)
            g = random_gradient(total.shape[0]) / total
            dx, dscale = contrastive.self_logsumexp_backward(g, x, s, shift, precision)
            dy = torch.zeros_like(y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert total.dtype == shift.dtype == dscale.dtype == torch.float32
    assert dx.dtype == x.dtype and dy.dtype == y.dtype and dx.is_contiguous() and dy.is_contiguous()
    return {"loss": total.double().log() + shift, "dx": dx, "dy": dy, "dscale": dscale, "shift": shift}


def eager(operation: str, x: Tensor, y: Tensor, scale: float, bias: float, exclude: Tensor | None, dtype: torch.dtype):
    """The same of the naive formula in `dtype`."""
    x, y = (t.detach().to(dtype).requires_grad_() for t in (x, y))
    wide = torch.promote_types(dtype, torch.float32)
    s, b = (torch.tensor(value, device=DEVICE, dtype=wide, requires_grad=True) for value in (scale, bias))
    S = (x @ (x if operation == "self" else y).T * s).to(dtype)
    if operation == "self":
        exclude = torch.arange(x.shape[0], device=DEVICE)
    if exclude is not None:
        S = S.masked_fill(torch.arange(S.shape[1], device=DEVICE) == exclude[:, None], float("-inf"))
    if operation == "softplus":
        loss = F.softplus(S + b, threshold=80).sum(dtype=wide)
        g, names, inputs, shift = None, ("dx", "dy", "dscale", "dbias"), (x, y, s, b), None
    else:
        loss, shift = S.logsumexp(1), S.amax(1)
        if operation == "pair":
            loss, shift = torch.cat([loss, S.logsumexp(0)]), torch.cat([shift, S.amax(0)])
        g, names, inputs = random_gradient(loss.shape[0]).to(loss.dtype), ("dx", "dy", "dscale"), (x, y, s)
    gradients = torch.autograd.grad(loss, inputs, g, allow_unused=True, materialize_grads=True)
    result = {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}
    return result if shift is None else result | {"shift": shift.detach()}


def compare(
    operation: str,
    x: Tensor,
    y: Tensor,
    scale: float = 2.0,
    bias: float = -1.0,
    exclude: Tensor | None = None,
    precision: str = "float32",
):
    """Errors against float64 are at most twice eager's in the dtype of the products, and rounding."""
    if operation == "self":
        y, exclude = x[:1], None
    inputs = operation, x, y, scale, bias, exclude
    ours = kernel_of(*inputs, precision)
    exact, theirs = eager(*inputs, torch.float64), eager(*inputs, DTYPES[precision])
    # Rounding of a similarity, and of the gradient's sums. TF32 rounds operands to 11 bits, where eager rounds to 24.
    eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(torch.float32).eps
    lengths = [t.double().norm(dim=1).max().item() for t in (x, y if operation != "self" else x)]
    similarity = abs(scale) * lengths[0] * lengths[1]
    size = {  # of the weights
        "softplus": exact.get("dbias", 0.0) + 1e-30,
        "self": random_gradient(x.shape[0]).norm().item(),
        "similarity": random_gradient(x.shape[0]).norm().item(),
        "pair": random_gradient(x.shape[0] + y.shape[0]).norm().item(),
    }[operation]
    floor = {
        "loss": 8 * eps * (1 + similarity + abs(bias)) * (exact["loss"].norm().item() if bias else 1),
        "dx": 4 * eps * (1 + similarity) * abs(scale) * lengths[1] * size,
        "dy": 4 * eps * (1 + similarity) * abs(scale) * lengths[0] * size,
        "dscale": 4 * eps * (1 + similarity) * lengths[0] * lengths[1] * size,
        "dbias": 4 * eps * (1 + similarity) * size,
        "shift": 8 * eps * similarity,
    }
    if operation != "softplus":
        floor["loss"] = 8 * eps * (1 + similarity)
    if precision in ("bfloat16", "float16"):  # the gradient's own rounding; eager may be lucky with a single number
        unit = torch.finfo(DTYPES[precision]).eps
        for name in ("dx", "dy"):
            floor[name] += unit * exact[name].norm().item()
        floor["dscale"] += unit * lengths[0] * lengths[1] * size / 4
    for name in ours:
        error = (ours[name].double() - exact[name]).norm().item()
        allowed = 2 * (theirs[name].double() - exact[name]).norm().item() + floor[name]
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def both(m: int, n: int, dim: int, precision: str = "float32", length: float = 1.0) -> tuple[Tensor, Tensor]:
    return rows(m, dim, DTYPES[precision], length), rows(n, dim, DTYPES[precision], length, seed=1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("m,n,dim", SIZES)
def test_sizes(m, n, dim, operation, precision):
    if operation == "self":
        m = max(m, 2)  # one row alone has no log-sum-exp: test_excludes_every_column
    x, y = both(m, n, dim, precision)
    excludes = [None]
    if n > 8:
        excludes = [None, some_excluded(m, n)] if THOROUGH else [some_excluded(m, n)]
    for exclude in excludes:
        if exclude is not None and operation == "pair" and m < 3:
            exclude = exclude.clamp_min(1)  # else a column would be left with no row
            exclude[-1] = -1
        compare(operation, x, y, exclude=exclude, precision=precision)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("scale", [3e9, -1e20, 1e35])
def test_huge_scales(scale, operation):
    """Shifts come back from the forward pass to the last bit: the largest exponential is 1, however large the scale."""
    x, y = both(70, 60, 24)
    inputs = operation, x, x[:1] if operation == "self" else y, scale, -1.0, None
    ours, exact = kernel_of(*inputs, "float32"), eager(*inputs, torch.float64)
    for name in ("loss", "dx", "dy", "dscale"):
        assert (ours[name].double() - exact[name]).norm() <= 1e-4 * exact[name].norm(), name


@pytest.mark.parametrize("operation", OPERATIONS if THOROUGH else ["similarity", "pair"])
@pytest.mark.parametrize("precision", ["tf32", "float16"] if THOROUGH else ["float16"])
def test_largest_tiles(precision, operation):
    compare(operation, *both(2060, 70, 16, precision), precision=precision)
    if operation != "self" and THOROUGH:
        compare(operation, *both(70, 2060, 16, precision), precision=precision)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dim,precision", [(24, "float32"), (130, "bfloat16"), (24, "float16")])
@pytest.mark.parametrize("scale,bias,length", [(100, -10, 1), (-1, 2, 1), (1, 0, 20), (0, 0, 1)])
def test_scales(scale, bias, length, dim, precision, operation):
    compare(operation, *both(33, 70, dim, precision, length), scale, bias, some_excluded(33, 70), precision)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dim,precision", [(24, "bfloat16"), (140, "float16")])
def test_float32_rows_with_short_products(dim, precision, operation):
    x, y = both(65, 33, dim)
    inputs = operation, x, y, 10.0, -10.0, None
    ours, exact = kernel_of(*inputs, precision), eager(*inputs, torch.float64)
    for name in ("dx", "dy", "loss"):
        assert (ours[name] - exact[name]).norm() <= 2e-2 * exact[name].norm()
    assert ours["dx"].dtype == torch.float32


@pytest.mark.parametrize("m,n", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("dim", [3, 300])
def test_empty(m, n, dim):
    for operation in OPERATIONS:
        x, y = both(m, n, dim)
        if operation == "self":
            x, y = x[:0], y[:0]
        result = kernel_of(operation, x, y, 2.0, -1.0, some_excluded(m, n) if n else None, "float32")
        assert result["dx"].shape == x.shape and result["dy"].shape == y.shape
        assert not result["dx"].nan_to_num().any() and not result["dy"].nan_to_num().any()
        if operation == "softplus":
            assert result["loss"] == result["dbias"] == 0


@pytest.mark.parametrize("dim", [24, 140])
def test_strides(dim):
    x, y = both(33, 65, dim)
    exclude = some_excluded(33, 65)
    wide = torch.full((130, 2 * dim + 1), float("nan"), device=DEVICE)
    strided = x.T.contiguous().T, wide[::2, 1 : 2 * dim : 2].copy_(y)
    every_third = exclude.repeat_interleave(3)[::3]
    for operation in OPERATIONS:
        expected = kernel_of(operation, x, y, 5.0, -1.0, exclude, "float32")
        for name, value in kernel_of(operation, *strided, 5.0, -1.0, every_third, "float32").items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_that_need_no_padding(operation):
    x, y = both(128, 256, 64, "bfloat16")
    assert pad(x, "bfloat16") is x and pad(x, "float16") is not x
    assert pad(x[1:], "bfloat16") is not x
    compare(operation, x, y, exclude=some_excluded(128, 256), precision="bfloat16")


@pytest.mark.parametrize("dim", [24, 140])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_reaches_what_it_touches(value, dim):
    x, y = both(70, 33, dim)
    x.abs_(), y.abs_()  # lest S be minus infinity, which is no NaN in a sum
    x[5] = 1.0
    x[5, 7] = value
    x[6:9] = 0
    result = kernel_of("similarity", x, y, 2.0, 0.0, None, "float32")
    assert result["loss"].isnan().nonzero().tolist() == [[5]]
    assert result["dy"].isnan().all() and result["dscale"].isnan()
    assert result["dx"].isnan().any(1).nonzero().tolist() == [[5]]
    result = kernel_of("pair", x, y, 2.0, 0.0, None, "float32")
    assert result["loss"].isnan().nonzero().flatten().tolist() == [5, *range(70, 103)]
    assert result["dx"].isnan().all() and result["dy"].isnan().all() and result["dscale"].isnan()
    result = kernel_of("self", x, y, 2.0, 0.0, None, "float32")
    assert result["loss"].isnan().all() and result["dx"].isnan().all() and result["dscale"].isnan()
    x[5, 7] = float("nan")
    result = kernel_of("softplus", x, y, 2.0, 0.0, None, "float32")
    assert all(result[name].isnan().all() for name in ("loss", "dscale", "dbias", "dy"))
    assert result["dx"].isnan().any(1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("dim", [24, 140])
def test_excludes_every_column(dim):
    x, y = both(33, 1, dim)
    exclude = torch.zeros(33, dtype=torch.int64, device=DEVICE)
    exclude[4] = 7
    s = torch.tensor(2.0, device=DEVICE)
    row, row_shift, column, column_shift = contrastive.pair_logsumexp(x, y, s, exclude, "float32")
    others = [contrastive.similarity_logsumexp(x, y, s, exclude, weigh, "float32") for weigh in (True, False)]
    only = 2 * (x[4] @ y[0])
    for total, shift in ((row, row_shift), *(sums[:2] for sums in others)):
        assert total.nonzero().tolist() == [[4]]
        assert total[4] - 1 < 1e-6 and (shift[4] - only).abs() < 1e-5 and shift.count_nonzero() == 1
    assert (column - 1).abs() < 1e-6 and (column_shift - only).abs() < 1e-5
    assert others[0][2].any(1).nonzero().tolist() == [[4]]
    # The total of such a row is constant: a gradient of any finite size leads nowhere.
    g = torch.ones(33, device=DEVICE)
    dx, dy, _ = contrastive.pair_logsumexp_backward(g, g[:1], x, y, s, exclude, row_shift, column_shift, "float32")
    assert dx.any(1).nonzero().tolist() == [[4]]
    torch.testing.assert_close(dy[0], 2 * 2 * x[4])
    total, shift = contrastive.self_logsumexp(x[:1], s, "float32")
    assert total == shift == 0
    dz, dscale = contrastive.self_logsumexp_backward(g[:1], x[:1], s, shift, "float32")
    assert not dz.any() and dscale == 0


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_of_any_size(precision):
    x, y = both(33, 40, 24)
    s = torch.tensor(2.0, device=DEVICE)
    sums = contrastive.pair_logsumexp(x, y, s, None, precision)
    g, h = random_gradient(33), random_gradient(40)
    expected = contrastive.pair_logsumexp_backward(g, h, x, y, s, None, sums[1], sums[3], precision)
    for size in (2.0**-60, 2.0**60, 0.0):
        scaled = contrastive.pair_logsumexp_backward(size * g, size * h, x, y, s, None, sums[1], sums[3], precision)
        for mine, other in zip(scaled, expected, strict=True):
            assert torch.equal(mine, size * other)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [24, 140])
def test_sigmoid_keeps_its_digits(dim, precision):
    """Where every similarity is far below 0 the weights are all tiny; where it is huge nothing overflows."""
    x, y = both(65, 33, dim)
    x, y = (t.to(DTYPES[precision]).float() for t in (x, y))
    for bias in (-20.0, -60.0):
        inputs = "softplus", x, y, 3.0, bias, None
        ours, exact = kernel_of(*inputs, precision), eager(*inputs, torch.float64)
        short = torch.finfo(DTYPES[precision]).eps
        for name, value in exact.items():
            allowed = 1e-5 if name in ("loss", "dbias") else max(short, 1e-5)
            assert (ours[name] - value).norm() <= allowed * value.norm(), name
    near = torch.tensor([[0.0], [1.0], [-1.0]], device=DEVICE)
    for bias in (0.0, 1000.0, -1000.0):
        inputs = "softplus", near, near, 1000.0, bias, None
        ours, exact = kernel_of(*inputs, precision), eager(*inputs, torch.float64)
        for name, value in exact.items():
            torch.testing.assert_close(ours[name].double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m,n", [(192, 300), (330, 200), (700, 40), (40, 700)] if THOROUGH else [(130, 300), (300, 65)])
def test_bands(m, n, monkeypatch):
    """Distances in several launches, the last one shorter, give what a single launch gives."""
    x, y = both(m, n, 32)
    inputs = x, y, torch.tensor(10.0, device=DEVICE)
    exclude = some_excluded(m, n)

    def sums() -> list[Tensor]:
        rows = contrastive.similarity_logsumexp(*inputs, exclude, False, "float32")[:2]
        square = contrastive.self_logsumexp(x, inputs[2], "float32")
        return [*contrastive.pair_logsumexp(*inputs, exclude, "float32"), *rows, *square]

    expected = sums()
    for band in (2, 3) if THOROUGH else (2,):
        monkeypatch.setattr(of_sums, "_BAND", band)
        for mine, other in zip(sums(), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dim", [32, 140])
def test_splits(dim, operation, monkeypatch):
    x, y = both(70, 300, dim)  # 3 units of columns in 2 splits, or in one
    for programs in (accumulate.PROGRAMS, 1):
        monkeypatch.setattr(accumulate, "PROGRAMS", programs)
        compare(operation, x, y, exclude=some_excluded(70, 300))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_every_time(operation, precision):
    inputs = operation, *both(70, 300, 32, precision), 5.0, -1.0, some_excluded(70, 300), precision
    first, second = (kernel_of(*inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


def test_offsets_beyond_32_bits():
    x, y = both(3, 5, 8, "float16")
    far = torch.empty(2 * 2**30 + 8, dtype=torch.float16, device=DEVICE).as_strided((3, 8), (2**30, 1))
    for operation in OPERATIONS:
        expected = kernel_of(operation, x, y, 2.0, -1.0, None, "float16")
        for name, value in kernel_of(operation, far.copy_(x), y, 2.0, -1.0, None, "float16").items():
            assert torch.equal(value, expected[name])
