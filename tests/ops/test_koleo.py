"""What holds for KoLeo in particular."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastssl.functional import koleo_loss
from fastssl.ops import _portable, koleo
from tests.accuracy import with_gradients
from tests.inputs import normal

pytestmark = pytest.mark.usefixtures("device")


def _by_pairs(x: torch.Tensor, eps: float, topk: int) -> torch.Tensor:
    """Row by row, from sorted distances."""
    z = F.normalize(x, dim=1)
    total = []
    for i in range(len(z)):
        distances = torch.stack([(z[i] - z[j] + eps).norm() for j in range(len(z)) if j != i])
        total.append((distances.sort().values[:topk] + eps).log())
    return -torch.cat(total).mean()


@pytest.mark.parametrize("topk", [1, 3, 10])
def test_koleo_by_pairs(topk, backend):
    x = normal(11, 5, dtype=torch.float64)
    results = with_gradients(lambda x: koleo_loss(x, topk=topk), x)
    expected = with_gradients(lambda x: _by_pairs(x, 1e-8, topk), x)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)


@pytest.mark.parametrize("size, topk", [(2, 1), (7, 3), (21, 20)])
def test_koleo_of_groups_is_the_mean_of_theirs(size, topk, backend):
    x = normal(42, 8)
    results = with_gradients(lambda x: koleo_loss(x, topk=topk, group_size=size), x)
    expected = with_gradients(lambda x: torch.stack([koleo_loss(g, topk=topk) for g in x.split(size)]).mean(), x)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)


def _nearest(x: torch.Tensor, topk: int, size: int) -> torch.Tensor:
    return koleo.koleo_loss(x, 0, x.shape[0], topk, size, 1e-8)[1]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("elements", [1, 300, 1 << 22])
def test_nearest_of_every_precision(precision, elements, kernels, monkeypatch):
    """Neighbours whose similarities bfloat16, or TF32, takes for equal."""
    monkeypatch.setattr(_portable, "_BLOCK_ELEMENTS", elements)
    torch.set_float32_matmul_precision(precision)
    z = F.normalize(normal(1, 24) + 1e-2 * normal(40, 24, seed=1), dim=1)
    for size, topk in ((40, 1), (40, 39), (40, 5), (8, 7), (2, 1)):
        nearest = _nearest(z, topk, size)
        assert (nearest // size == torch.arange(40)[:, None] // size).all()
        assert (nearest != torch.arange(40)[:, None]).all()
        assert (nearest.sort(1).values.diff(dim=1) > 0).all()  # none twice
        S = z.double() @ z.double().T
        S.masked_fill_(torch.arange(40)[:, None] // size != torch.arange(40) // size, -2).fill_diagonal_(-2)
        torch.testing.assert_close(S.gather(1, nearest), S.topk(topk).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "first, rows, size, topk",
    [(0, 700, 700, 1), (0, 700, 700, 5), (130, 300, 700, 2), (65, 200, 350, 3), (0, 700, 7, 6), (699, 1, 70, 1)],
)
def test_nearest_across_tiles(first, rows, size, topk, kernels):
    """Of some rows, in groups that tiles cut, whose similarities are often nearer than bfloat16 tells apart."""
    torch.set_num_threads(2)
    i, j = torch.arange(first, first + rows)[:, None], torch.arange(700)
    around = normal(3, 40, seed=2)[torch.arange(700) % 3]
    for x in (normal(1, 40) + 0.3 * normal(700, 40, seed=1), around + 0.01 * normal(700, 40, seed=1)):
        nearest = koleo.koleo_loss(x, first, rows, topk, size, 1e-8)[1]
        z = F.normalize(x.double(), dim=1)
        S = z[first : first + rows] @ z.T
        S.masked_fill_((i // size != j // size) | (i == j), -2)
        torch.testing.assert_close(S.gather(1, nearest), S.topk(topk).values, rtol=0, atol=1e-6)
        assert (nearest.sort(1).values.diff(dim=1) > 0).all()


def test_nearest_on_a_circle(kernels):
    """With two features, bfloat16 rounds a similarity by nearly as much as it can: by 2^-7 of both lengths."""
    x = normal(300, 2)
    z = F.normalize(x.double(), dim=1)
    S = (z @ z.T).fill_diagonal_(-2)
    torch.testing.assert_close(S.gather(1, _nearest(x, 1, 300)), S.amax(1, keepdim=True), rtol=0, atol=1e-6)


def test_koleo_of_duplicates_is_finite(backend):
    for x in (normal(1, 16).expand(9, 16), normal(5, 16)[[0, 1, 0, 2, 3, 4, 4, 4]], torch.zeros(4, 16)):
        for topk in (1, 3):
            value, gradient = with_gradients(lambda x, topk=topk: koleo_loss(x, topk=topk), x)
            assert value.isfinite() and gradient.isfinite().all()


def test_koleo_of_two_equal_rows_pulls_neither(kernels):
    """To each of which the other's difference is added: what is left would be divided by their length of 0."""
    for x in (torch.zeros(4, 16), normal(1, 16).expand(4, 16)):
        assert not with_gradients(lambda x: koleo_loss(x, group_size=2), x)[1].any()
    value, gradient = with_gradients(lambda x: koleo_loss(x, eps=0.0), normal(1, 16).expand(4, 16))
    assert value == float("inf") and not gradient.any()  # without eps, their distance is 0


def test_koleo_takes_the_first_of_equally_near_rows(kernels):
    """As an argmax does, whatever the blocks."""
    z = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    assert _nearest(z, 1, 6).flatten().tolist() == [1, 3, 5, 1, 1, 2]


def _copies(x: torch.Tensor, times: int) -> torch.Tensor:
    """Rows, each of which stands at so many places, among others."""
    places = torch.randperm(len(x) * times, generator=torch.Generator().manual_seed(3))
    return torch.cat([x.repeat(times, 1)[places], normal(len(x), x.shape[1], seed=4)])


@pytest.mark.parametrize("first, rows, size", [(0, 416, 416), (30, 300, 416), (100, 200, 104)])
@pytest.mark.parametrize("topk", [1, 3, 7])
def test_koleo_of_many_equal_rows(first, rows, size, topk, kernels):
    """None is nearer to one than the others, of which the first are taken; to zeros all are as near; to a row shorter
    than eps its equals are not the nearest."""
    x = F.normalize(_copies(normal(16, 24), 25), dim=1)
    x[::9], x[5::40] = 0, 1e-9 * torch.eye(24)[0]
    nearest = koleo.koleo_loss(x, first, rows, topk, size, 1e-8)[1]
    for i in range(first, first + rows, 3):
        group = x[i // size * size :][:size]
        others = (torch.arange(len(group)) + i // size * size)[torch.arange(len(group)) != i % size]
        similarity = x[i].double() @ x[others].double().T
        equal = (x[others] == x[i]).all(1) & (x[i].norm() > 0.5)
        order = torch.where(equal, 2, similarity).sort(descending=True, stable=True).indices[:topk]
        expected = others[order]
        if not kernels.startswith(("portable", "auto")) and (equal.sum() >= topk or not x[i].any()):
            assert nearest[i - first].tolist() == expected.tolist(), i
        else:
            products = (x[i].double() @ x[j].double().T for j in (nearest[i - first], expected))
            torch.testing.assert_close(*products, rtol=0, atol=1e-6 * x[i].norm().item())


def test_koleo_of_equal_rows_and_one_that_is_not_finite(kernels):
    """Which is the nearest of all."""
    for value in (float("nan"), float("inf")):
        x = normal(1, 24).repeat(40, 1)
        x[7, 3] = value
        assert _nearest(x, 1, 40)[:7].eq(7).all() and _nearest(x, 1, 40)[8:].eq(7).all()


def test_koleo_of_no_rows_is_nan(backend):
    for group_size in (None, 4):
        value, gradient = with_gradients(lambda x, size=group_size: koleo_loss(x, group_size=size), normal(0, 8))
        assert value.isnan() and gradient.shape == (0, 8)


def test_koleo_of_a_hub_has_the_same_gradient_in_every_run():
    """A row that is the nearest of all others, to whose gradient they all add."""
    torch.set_num_threads(2)
    hub = normal(1, 64)
    x = torch.cat([hub, hub + 3 * normal(2000, 64, seed=1)])
    first, *others = (with_gradients(koleo_loss, x)[1] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_the_rows_of_a_neighbour_are_the_same_sum_on_a_gpu(monkeypatch):
    """In several blocks, to each of which it adds what others have added."""
    monkeypatch.setattr(_portable, "_BLOCK_ELEMENTS", 200)
    x = normal(40, 8)
    _, nearest = koleo.koleo_loss(x, 0, 40, 3, 40, 1e-8)
    adding = _portable.add_rows_, koleo._add_on_gpu_
    expected, mine = (koleo._backward(add, torch.tensor(1.0), x, nearest, 0, 1e-8) for add in adding)
    torch.testing.assert_close(mine, expected)
