"""Exponentials that a forward pass keeps for its backward pass (csrc/cpu/common/kept_tiles.h)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastssl
from fastssl import functional
from fastssl.ops import contrastive, sigmoid

if not torch._C._dispatch_has_kernel_for_dispatch_key("fastssl::pair_logsumexp", "CPU"):
    pytest.skip("the C++ library is not built", allow_module_level=True)

from fastssl import _C

HEADER = 64  # bytes before the tiles
PRECISIONS = "float32", "bfloat16"
VIEWS = "nt_xent", "dcl"
FAMILY = *VIEWS, "clip_loss", "info_nce", "sup_con"
ONE_SIDE = "sup_con", "self_logsumexp"
OPERATIONS = *FAMILY, "pair_logsumexp", "self_logsumexp", "similarity_logsumexp"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def whole(precision: str, inputs: tuple[Tensor, ...], *shape: int) -> int:
    """`bytes_to_keep` of inputs that require gradients."""
    return contrastive.bytes_to_keep(precision, [x.clone().requires_grad_() for x in inputs], *shape)


class Pass:
    """Both passes of an operation, and what goes from one to the other."""

    def __init__(self, name: str, precision: str, count: int = 150, dim: int = 96, scale: float = 10.0) -> None:
        self.backward = getattr(torch.ops.fastssl, f"{name}_backward").default
        x, y, s = rows(count, dim), rows(count, dim, 1), torch.tensor(scale)
        g, w = torch.randn(2, 2 * count, generator=torch.Generator().manual_seed(2))
        own, e = torch.arange(count), torch.tensor(0.1, dtype=torch.float64)
        forward = getattr(torch.ops.fastssl, name).default
        shape = (2 * count,) if name in VIEWS else (count,) if name in ONE_SIDE else (count, count)
        inputs = (x, s) if name in ONE_SIDE else (x, y, s)
        self.keep = whole(precision, inputs, *shape)
        self.call = {
            "nt_xent": lambda keep: forward(x, y, s, True, keep, precision),
            "dcl": lambda keep: forward(x, y, w, s, True, keep, precision),
            "clip_loss": lambda keep: forward(x, y, s, e, "none", True, keep, precision),
            "info_nce": lambda keep: forward(x, y, s, e, "none", True, True, keep, precision),
            "sup_con": lambda keep: forward(x, own % 7, s, True, keep, precision),
            "pair_logsumexp": lambda keep: forward(x, y, s, own, keep, precision),
            "self_logsumexp": lambda keep: forward(x, s, keep, precision),
            "similarity_logsumexp": lambda keep: forward(x, y, s, own, True, keep, precision),
        }[name]
        g1, g2 = g.split(count)
        self.arguments = {
            "nt_xent": lambda o, kept: (g, x, y, s, *o, kept, True, precision),
            "dcl": lambda o, kept: (g, x, y, w, s, *o, kept, True, precision),
            "clip_loss": lambda o, kept: (g1, x, y, s, *o, kept, e, "none", True, precision),
            "info_nce": lambda o, kept: (g1, x, y, s, *o, kept, e, "none", True, True, precision),
            "sup_con": lambda o, kept: (g1, x, own % 7, s, *o, kept, True, precision),
            "pair_logsumexp": lambda o, kept: (g1, g2, x, y, s, own, o[1], o[3], kept, precision),
            "self_logsumexp": lambda o, kept: (g1, x, s, o[1], kept, precision),
            "similarity_logsumexp": lambda o, kept: (g1, x, y, s, own, o[1], o[2], kept, True, precision),
        }[name]
        self.first = int(name in FAMILY)  # of the outputs that backward takes

    def gradients(self, keep: int | None = None, kept: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        *outputs, found = self.call(self.keep if keep is None else keep)
        kept = found if kept is None else kept
        return list(self.backward(*self.arguments(outputs[self.first :], kept))), found


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("count", [1, 31, 150, 330])
def test_gradients_are_those_of_tiles_computed_again(name, precision, count):
    run = Pass(name, precision, count)
    expected, empty = run.gradients(keep=0)
    assert empty.numel() == 0
    for keep in (run.keep, run.keep // 2, 200, 1):
        found, kept = run.gradients(keep)
        assert kept.dtype == torch.uint8 and kept.shape == (keep,)
        if precision == "float32":
            assert all(map(torch.equal, found, expected))
        else:
            assert error(found[:-1], expected[:-1]) < 4e-3 or count == 1


@pytest.mark.parametrize("name", ["pair_logsumexp", "self_logsumexp", "similarity_logsumexp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_backward_pass_does_not_multiply_for_what_was_kept(name, precision):
    """With all exponentials doubled, gradients are twice what they were: none of them was computed again."""
    run = Pass(name, precision)
    gradients, kept = run.gradients()
    narrow = precision == "bfloat16" and _C.current_isa() in ("avx512_bf16", "amx")
    doubled = kept.clone()
    doubled[HEADER:].view(torch.bfloat16 if narrow else torch.float32)[: -64 if narrow else -32].mul_(2)
    found, _ = run.gradients(kept=doubled)
    for i, (mine, other) in enumerate(zip(found, gradients, strict=True)):
        if name != "similarity_logsumexp" or i == 1:  # x's gradient is a multiple of what the forward pass has summed
            assert torch.equal(mine, 2 * other)


@pytest.mark.parametrize("name", OPERATIONS)
def test_another_number_of_threads_or_instruction_set_in_between(name):
    if len(_C.available_isas()) < 2:
        pytest.skip("one instruction set")
    run, isa = Pass(name, "bfloat16", 256, 128), _C.current_isa()
    with threads(1):
        expected, kept = run.gradients()
    with threads(4):
        assert error(run.gradients(kept=kept)[0], expected) < 5e-3
    try:
        _C.set_current_isa(_C.available_isas()[0])
        assert error(run.gradients(kept=kept)[0], expected) < 5e-3
    finally:
        _C.set_current_isa(isa)


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_with_origins_of_their_own_keep_nothing(name):
    run = Pass(name, "float32", scale=60.0)
    gradients, kept = run.gradients()
    assert kept.numel() and not kept.any()
    assert all(map(torch.equal, gradients, run.gradients(keep=0)[0]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_kept_about_a_shared_origin_fits_no_other_scale(name):
    *_, kept = Pass(name, "float32").call(1 << 20)
    with pytest.raises(ValueError, match="kept must be what a forward pass with the same inputs has kept"):
        Pass(name, "float32", scale=60.0).gradients(kept=kept)


@pytest.mark.parametrize("kept", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.uint8)])
def test_kept_is_checked(kept):
    with pytest.raises(ValueError, match="kept must be uint8 of one dimension"):
        Pass("pair_logsumexp", "float32").gradients(kept=kept)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count,dim", [(32, 128), (256, 512), (1024, 128), (4096, 128), (1 << 17, 128)])
def test_the_bound(count, dim, precision, symmetric):
    """All tiles are kept while that takes at most four times the bytes of the inputs, then as many as these hold."""
    x = torch.empty(1, 1).expand(count, dim).requires_grad_()
    inputs = [x] if symmetric else [x, x]
    keep = contrastive.bytes_to_keep(precision, inputs, *([count] if symmetric else [count, count]))
    bound, narrow = 4 * len(inputs) * count * dim * 4, precision == "bfloat16"
    assert keep <= bound
    plan = _C.contrastive_tile_plan(count, dim, 2, symmetric, keep, narrow)
    bytes_of_tile = plan["block"] ** 2 * (2 if narrow else 4)
    if count * count * (2 if narrow else 4) + 4 * count + 128 <= bound:
        assert plan["kept"] == plan["tiles"]
    else:
        most = min(bound // bytes_of_tile, plan["tiles"])
        assert most - plan["blocks"] <= plan["kept"] <= most


def test_nothing_is_kept_without_need():
    x = rows(64, 32)
    assert whole("float32", (x,), 64) > 0
    leaf = x.clone().requires_grad_()
    assert contrastive.bytes_to_keep("float32", [x], 64) == 0
    assert contrastive.bytes_to_keep("float64", [leaf.double()], 64) == 0
    with torch.no_grad():
        assert contrastive.bytes_to_keep("float32", [leaf], 64) == 0
    with fastssl.use_backend("portable"):
        assert contrastive.bytes_to_keep("float32", [leaf], 64) == 0


def test_second_derivatives():
    x, y = (rows(40, 16, seed).double().requires_grad_() for seed in (0, 1))

    def hessian_along(x: Tensor, y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(functional.clip_loss(x, y, 10.0), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    found = hessian_along(*(z.detach().float().requires_grad_() for z in (x, y)))
    torch.testing.assert_close(found.double(), hessian_along(x, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name,most", [("clip_loss", 8), ("nt_xent", 8), ("siglip_loss", 8)])
def test_scratch_stays_from_call_to_call(name, most):
    """A call allocates what it returns, and little else."""
    x, y, s = rows(64, 128), rows(64, 128, 1), torch.tensor(10.0)
    e = torch.tensor(0.1, dtype=torch.float64)
    op = getattr(torch.ops.fastssl, name).default
    calls = {
        "clip_loss": lambda: op(x, y, s, e, "none", False, 0, "float32"),
        "nt_xent": lambda: op(x, y, s, True, 0, "float32"),
        "siglip_loss": lambda: op(x, y, s, s, True, "float32"),
    }
    for _ in range(2):
        calls[name]()
    with torch.profiler.profile(profile_memory=True) as profile:
        calls[name]()
    allocated = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert 0 < len(allocated) <= most


def test_rows_that_are_used_as_they_lie():
    """Packing measures their norms; where nothing is packed, the backward pass has them from the forward pass."""
    x, y = (F.normalize(torch.randn(64, 64), dim=1).mul(norm).requires_grad_() for norm in (1.5, 0.5))
    S, own = 10 * x @ y.T, torch.arange(64)
    expected = torch.autograd.grad((F.cross_entropy(S, own) + F.cross_entropy(S.T, own)) / 2, (x, y))
    torch.testing.assert_close(torch.autograd.grad(functional.clip_loss(x, y, 10.0), (x, y)), expected)


@pytest.mark.parametrize("shape", [(300, 1300), (1300, 300), (70, 0), (0, 70)])
def test_sides_of_unlike_numbers_of_blocks(shape):
    """Each block is finished once it has met all blocks of the other side, of which there may be none."""
    x, y = (rows(count, 8, seed).requires_grad_() for seed, count in enumerate(shape))
    s, g, h = torch.tensor(3.0), *(torch.rand(count) for count in shape)
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    with threads(2):
        row_total, row_shift, column_total, column_shift, _ = contrastive.pair_logsumexp(x, y, s, None, 0, "float32")
        sums = (g * row_total * row_shift.exp()).sum() + (h * column_total * column_shift.exp()).sum()
        softplus, *_ = sigmoid.similarity_softplus(x, y, s, s.new_zeros(()), None, True, "float32")
        gradients = torch.autograd.grad(sums, (x, y)), torch.autograd.grad(softplus, (x, y))
    S = 3 * x.double() @ y.double().T
    of_sums = ((g[:, None] + h) * S.exp()).sum()
    for mine, loss in zip(gradients, (of_sums, F.softplus(S).sum()), strict=True):
        torch.testing.assert_close(mine, torch.autograd.grad(loss, (x, y), retain_graph=True), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, -2.0, 2e3])
def test_gradients_of_extreme_scales(scale):
    x, y, s = rows(40, 24), rows(40, 24, 1), torch.tensor(scale)
    leaves = [z.requires_grad_() for z in (x, y, s)]
    found = torch.autograd.grad(functional.clip_loss(*leaves), leaves)
    wide = [z.detach().double().requires_grad_() for z in leaves]
    expected = torch.autograd.grad(functional.clip_loss(*wide), wide)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-6 * abs(scale))


@pytest.mark.parametrize("name", ["clip_loss", "info_nce"])
def test_positives_are_not_rounded(name):
    x, y, s = rows(40, 24), rows(40, 24, 1), torch.tensor(10.0)
    flags = (False, True) if name == "info_nce" else (False,)
    positive = getattr(contrastive, name)(x, y, s, 0.0, "none", *flags, 0, "bfloat16")[1]
    torch.testing.assert_close(positive, 10 * (x * y).sum(1), rtol=1e-5, atol=1e-5)


def test_tiny_losses_keep_their_digits():
    x = 6 * torch.eye(8)
    expected = torch.tensor(7 * math.exp(-36))
    torch.testing.assert_close(functional.clip_loss(x, x, 1.0), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(functional.info_nce(x, x, temperature=1.0, normalize=False), expected, rtol=1e-5, atol=0)


def test_origins_that_move_from_one_block_of_keys_to_the_next():
    q, k = (rows(200, 300, seed).requires_grad_() for seed in (0, 1))
    with torch.no_grad():
        k[128:] *= 3  # the largest entries of all rows are in the second block
    found = torch.autograd.grad(functional.info_nce(q, k, temperature=0.02, normalize=False), (q, k))
    expected = torch.autograd.grad(F.cross_entropy(50 * q @ k.T, torch.arange(200)), (q, k))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
