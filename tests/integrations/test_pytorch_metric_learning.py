"""pytorch-metric-learning's losses, against its own."""

from __future__ import annotations

import pytest
import torch

import fastssl

theirs = pytest.importorskip("pytorch_metric_learning.losses")
distances = pytest.importorskip("pytorch_metric_learning.distances")
reducers = pytest.importorskip("pytorch_metric_learning.reducers")
ours = pytest.importorskip("fastssl.integrations.pytorch_metric_learning")


def _shuffled(values, seed=0):
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


VIEWS = _shuffled(torch.arange(24).repeat(2))
CLASSES = _shuffled(torch.cat([torch.arange(8).repeat_interleave(torch.arange(2, 10)), torch.tensor([50, 51, 52, 53])]))
CASES = {
    "two views": ("NTXentLoss", VIEWS, None),
    "two views, labels that are no integers": ("NTXentLoss", VIEWS / 2, None),
    "queries and keys": ("NTXentLoss", torch.arange(48), _shuffled(torch.arange(48))),
    "supervised two views": ("SupConLoss", VIEWS, None),
    "classes, some of one row": ("SupConLoss", CLASSES, None),
    "classes, some not among the keys": ("SupConLoss", CLASSES, _shuffled(CLASSES, 1)[:30]),
}


def _rows(n, seed):
    return torch.randn(n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("reducer", [None, "MeanReducer", "SumReducer"])
@pytest.mark.parametrize("distance", [None, "unnormalised"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses(case, distance, reducer):
    name, labels, ref_labels = case
    results = []
    for module in (ours, theirs):
        embeddings = _rows(len(labels), 1)
        others = {} if ref_labels is None else {"ref_emb": _rows(len(ref_labels), 2), "ref_labels": ref_labels}
        loss = getattr(module, name)(
            temperature=0.2 if distance is None else 5.0,
            distance=distance and distances.DotProductSimilarity(normalize_embeddings=False),
            reducer=reducer and getattr(reducers, reducer)(),
        )(embeddings, labels, **others)
        leaves = [embeddings, *(x for x in others.values() if x.requires_grad)]
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert results[1][0] > 0
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_patched(name, symmetric):
    """As the library's wrapper for two views calls them."""
    views = _rows(32, 1), _rows(32, 2)
    expected = theirs.SelfSupervisedLoss(getattr(theirs, name)(), symmetric=symmetric)(*views)
    with fastssl.patch("pytorch-metric-learning"):
        criterion = getattr(theirs, name)()
        assert type(criterion) is getattr(ours, name)
        torch.testing.assert_close(theirs.SelfSupervisedLoss(criterion, symmetric=symmetric)(*views), expected)


@pytest.mark.parametrize("labels", [[], [0], [0, 0, 0], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_without_pairs_the_loss_is_zero(name, labels):
    embeddings = _rows(len(labels), 1)
    loss = getattr(ours, name)()(embeddings, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and not embeddings.grad.any()


def test_what_is_not_covered_is_refused():
    embeddings, pairs = _rows(6, 1), tuple(torch.tensor([i]) for i in range(4))
    twos, classes = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="labels must each occur twice in embeddings for fastssl's NTXentLoss"):
        ours.NTXentLoss()(embeddings, classes)
    with pytest.raises(ValueError, match="once in embeddings and once in ref_emb"):
        ours.NTXentLoss()(embeddings, twos, ref_emb=_rows(6, 2), ref_labels=twos)
    for name in ("NTXentLoss", "SupConLoss"):
        with pytest.raises(ValueError, match=f"indices_tuple must be None, and labels given, for fastssl's {name}"):
            getattr(ours, name)()(embeddings, twos, pairs)
        for distance in (distances.LpDistance(), distances.DotProductSimilarity(power=2)):
            with pytest.raises(ValueError, match=f"distance must be CosineSimilarity or .* for fastssl's {name}, got"):
                getattr(ours, name)(distance=distance)(embeddings, twos)
