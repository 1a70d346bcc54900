"""sentence-transformers' losses and ours: the same numbers, from the embeddings of a model that passes them on."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastssl

pytestmark = pytest.mark.xdist_group("transformers")  # one process imports it, which takes seconds

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = ("query_to_doc", "doc_to_query")
CHOICES = [(ALL[:1], "joint"), (SYMMETRIC, "per_direction"), (SYMMETRIC, "joint"), (ALL, "joint")]
HARDNESS = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]


class Passes(nn.Sequential):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["x"]}


@pytest.fixture(scope="module")
def classes(sentence_transformers):
    """(theirs, ours, whether it is cached)."""
    from fastssl.integrations import sentence_transformers as ours

    theirs = sentence_transformers.sentence_transformer.losses
    return [(getattr(theirs, name), getattr(ours, name), name.startswith("Cached")) for name in ours.__all__]


def _embeddings(hard: int, dtype: torch.dtype = torch.float64, batch: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(hard)
    rows = torch.randn(2 + hard, batch, 5, generator=generator, dtype=torch.float64).to(dtype)
    return [x.clone().requires_grad_() for x in rows]


def _step(loss: nn.Module, embeddings: list[Tensor]) -> list[Tensor]:
    value = loss([{"x": x, "attention_mask": torch.ones(len(x), 1)} for x in embeddings], None)
    (3 * value).backward()
    return [value.detach(), *(x.grad for x in embeddings)]


@pytest.fixture(params=[False, True], ids=["alone", "processes"])
def gather(request, monkeypatch, tmp_path):
    """gather_across_devices, where it is True in a group of processes, of one."""
    if request.param:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
        monkeypatch.setattr("fastssl.integrations.sentence_transformers.all_processes", lambda: dist.group.WORLD)
    yield request.param
    if request.param:
        dist.destroy_process_group()


@pytest.mark.parametrize("hard", [0, 2])
def test_same_loss_and_gradients(hard, classes, sentence_transformers, gather):
    """For every choice of pairs and penalties."""
    for (directions, mode), hardness, dot in itertools.product(CHOICES, HARDNESS, (False, True)):
        options = {"scale": 1.5 if dot else 20.0, "directions": directions, "partition_mode": mode}
        options |= {"hardness_mode": hardness, "hardness_strength": 3.0, "gather_across_devices": gather}
        if dot:
            options["similarity_fct"] = sentence_transformers.util.dot_score
        for theirs, ours, cached in classes:
            model, more = Passes(nn.Identity()), {"mini_batch_size": 3} if cached else {}
            expected, result = (_step(c(model, **options, **more), _embeddings(hard)) for c in (theirs, ours))
            for x, y in zip(result, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_low_precision(classes):
    """Embeddings of 16 bits are compared in 32, as in the original."""
    for theirs, ours, cached in classes:
        model, more = Passes(nn.Identity()), {"mini_batch_size": 3} if cached else {}
        expected, result = (_step(c(model, **more), _embeddings(1, torch.bfloat16)) for c in (theirs, ours))
        torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(result[1:], expected[1:], rtol=2e-2, atol=2e-2)  # rounded once, or several times


def test_other_similarities_are_the_originals(classes, sentence_transformers):
    def product(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x.shape)
        return x @ y.T

    for theirs, ours, cached in classes:
        model, more = Passes(nn.Identity()), {"mini_batch_size": 3} if cached else {}
        calls: list[torch.Size] = []
        options = {"similarity_fct": product, "scale": 1.0, **more}
        expected, result = (_step(c(model, **options), _embeddings(1)) for c in (theirs, ours))
        assert calls and all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
        with pytest.raises(ValueError, match="Expected at least 2"):
            ours(model, **more)([{"x": torch.ones(2, 3)}], None)


def test_patch(classes, sentence_transformers):
    losses = sentence_transformers.sentence_transformer.losses
    with fastssl.patch("sentence-transformers"):
        for theirs, ours, _ in classes:
            assert getattr(losses, theirs.__name__) is ours
            assert ours(Passes(nn.Identity())).get_config_dict() == theirs(Passes(nn.Identity())).get_config_dict()
    assert all(getattr(losses, theirs.__name__) is theirs for theirs, _, _ in classes)
