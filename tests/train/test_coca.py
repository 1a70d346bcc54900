"""CoCa: captions as subwords, what each half of the decoder sees, what it writes."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from fastssl.nn import CoCaLoss
from fastssl.train import DataError, Method, Run, create, fit, twins
from fastssl.train.data import captions, pairs
from fastssl.train.data.captions import END, LENGTH, PADDING, Captions
from fastssl.train.data.pairs import Pair
from tests.train.runs import QUIET

WORDS = 20


@pytest.fixture
def pictures(monkeypatch) -> Captions:
    """Squares whose brightness, of four, says which of four captions they have; subwords are numbers."""
    monkeypatch.setattr(Captions, "facts", {"size": 8, "colours": 3, "vocabulary": WORDS})
    monkeypatch.setattr(Captions, "encode", lambda self, texts: torch.full((len(texts), 6), 2))
    monkeypatch.setattr(Captions, "decode", lambda self, text: " ".join(map(str, text.tolist())))
    kind = torch.arange(64) % 4
    noise = torch.randint(9, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (60 * kind.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    texts = torch.tensor([[1, 2, 7, 1, 0, 0], [1, 3, 8, 9, 1, 0], [1, 4, 4, 5, 6, 1], [1, 5, 1, 0, 0, 0]])[kind]
    train, test = (TensorDataset(images[part], texts[part]) for part in (slice(48), slice(48, 64)))
    return Captions("squares", train, test, (), torch.full((16,), -1), "")


def new(pictures: Captions, steps: int = 4) -> Method:
    torch.manual_seed(0)
    return create("coca", steps, pictures, depth=2)


def test_it_is_open_clips_loss_of_the_logits(pictures):
    method = new(pictures)
    images, tokens = method.views(pictures.train[torch.arange(16)], torch.Generator().manual_seed(0))
    assert torch.equal(tokens, pictures.train.tensors[1][:16])
    image, text, features, labels = method(images, tokens)
    assert torch.equal(labels, tokens[:, 1:]) and features.shape[:2] == labels.shape
    parts = CoCaLoss(2.0, 1.0, PADDING)(image, text, method.logits(features), labels, method.logit_scale.exp())
    torch.testing.assert_close(method.loss(image, text, features, labels), sum(parts))
    method.caption_weight = 0.0
    torch.testing.assert_close(method.loss(image, text, features, labels), parts[0])


def test_what_each_half_sees(pictures):
    method = new(pictures).eval()
    images, tokens = method.views(pictures.train[torch.arange(8)], torch.Generator().manual_seed(0))
    image, text, features, _ = method(images, tokens)
    words = method.text_encoder(tokens)
    ends = torch.stack([row[last] for row, last in zip(words, [3, 4, 5, 2] * 2, strict=True)])
    torch.testing.assert_close(text, F.normalize(method.text_projection(ends), dim=1))
    other = method(1 - images, tokens)
    torch.testing.assert_close(other[1], text)  # the first half reads no image
    assert not torch.allclose(other[0], image) and not torch.allclose(other[2][:, 0], features[:, 0])
    changed = tokens.clone()
    changed[:, 2] = 11
    seen = method(images, changed)
    torch.testing.assert_close(seen[2][:, :2], features[:, :2])  # nor does either see what follows
    assert not torch.allclose(seen[2][:, 2], features[:, 2]) and not torch.allclose(seen[1], text)
    longer = F.pad(tokens, (0, 3), value=PADDING)
    torch.testing.assert_close(method.text(longer), text)


def test_it_learns_to_write_captions(pictures):
    method = new(pictures)
    before = method.evaluate(pictures)
    losses = [s.loss for s in fit({"m": method}, pictures.train, Run(batch_size=16, steps=60), console=QUIET)["m"]]
    after = method.evaluate(pictures)
    right, ratio = list(after)[-2:]
    assert losses[-1] < 0.7 * losses[0] and after[right] > 0.9 > before[right] and after[ratio] < 0.5 < before[ratio]
    for line, true in zip(method.samples(pictures, 4), pictures.test.tensors[1][::4], strict=True):
        text = pictures.decode(true).split(" 1 ")[0]
        assert line.startswith(text) and line.endswith(f"[{pictures.decode(true)}]")
    assert method.training


def test_twins_agree(pictures):
    both = twins(new(pictures))
    history = fit(both, pictures.train, Run(batch_size=16, steps=4), console=QUIET)
    losses = [torch.tensor([step.loss for step in steps]) for steps in history.values()]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=3e-6, atol=1e-6)


def test_captions_are_subwords_between_two_ends(monkeypatch):
    pytest.importorskip("tokenizers")
    colours = ("red", "green", "blue", "naïve")
    train = [Pair(torch.zeros(3, 32, 32, dtype=torch.uint8), f"a {c} square", c, label=c) for c in colours]
    test = [train[0]._replace(caption="a blue " + 40 * "square ", label="")]
    monkeypatch.setattr(pairs, "read", lambda source: ("squares", train, test, colours))
    data = captions.load()
    tokens = data.train.tensors[1]
    assert tokens.shape == (4, LENGTH) and data.facts == {"size": 32, "colours": 3, "vocabulary": tokens.max() + 1}
    assert all(row[0] == END and row[row != PADDING][-1] == END and (row == END).sum() == 2 for row in tokens)
    assert [data.decode(row) for row in tokens] == [pair.caption for pair in train]
    assert torch.equal(data.encode([pair.caption for pair in train]), tokens) and data.test_labels.tolist() == [-1]
    (cut,) = data.test.tensors[1]
    assert (cut != PADDING).all() and cut[-1] == END and data.decode(cut).startswith("a blue square square")
    monkeypatch.setattr(pairs, "read", lambda source: pytest.fail("fetched"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        captions.load()
