"""BERT, GPT, T5, ELECTRA: subwords of a text, what is to be predicted, what that is worth."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl.train import Method, Run, checkpoint, create, fit
from fastssl.train.data import subwords
from fastssl.train.data.draw import Draw
from fastssl.train.data.packages import DataError
from fastssl.train.data.subwords import LENGTH, Subwords
from fastssl.train.language import write
from fastssl.train.networks.transformer import Decoder
from tests.train.runs import QUIET

WORDS = 30


@pytest.fixture
def text(monkeypatch) -> Subwords:
    """Subwords that count up from a random one."""
    monkeypatch.setattr(Subwords, "facts", {"vocabulary": WORDS})
    monkeypatch.setattr(Subwords, "decode", lambda self, sequence: " ".join(map(str, sequence.tolist())))
    first = torch.randint(1, WORDS, (60, 1), generator=torch.Generator().manual_seed(0))
    sequences = 1 + (first + torch.arange(LENGTH)) % (WORDS - 1)
    return Subwords("counting", sequences[:48], sequences[48:], "")


def new(name: str, text: Subwords, **options) -> Method:
    torch.manual_seed(0)
    return create(name, 4, text, features=32, depth=1, **options)


@pytest.mark.parametrize("name", ["bert", "electra", "gpt", "t5"])
def test_a_share_of_a_batch_is_seen_as_in_the_whole(name, text):
    method, rows = new(name, text), torch.tensor([1, 2, 6])
    whole, share = (
        method.views(text.train[part], Draw(torch.Generator().manual_seed(0), 8, part))
        for part in (torch.arange(8), rows)
    )
    assert all(torch.equal(x[rows], y) for x, y in zip(whole, share, strict=True))


def test_bert_predicts_what_was_hidden(text):
    method = new("bert", text, probability=0.4)
    corrupted, labels = method.views(text.train[:8], torch.Generator().manual_seed(0))
    assert torch.equal(torch.where(labels >= 0, labels, corrupted), text.train[:8])
    assert 0.3 < (labels >= 0).float().mean() < 0.5 and (corrupted[labels >= 0] == 0).float().mean() > 0.6
    features, labels = method(corrupted, labels)
    logits = F.linear(features, method.encoder.words.weight, method.bias)
    torch.testing.assert_close(method.loss(features, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    changed = corrupted.clone()
    changed[:, -1] = 7
    assert not torch.allclose(method.encoder(changed)[:, 0], features[:, 0])  # it sees both sides


def test_gpt_predicts_what_follows_and_does_not_see_it(text):
    method = new("gpt", text)
    features, labels = method(*method.views(text.train[:8], torch.Generator()))
    logits = F.linear(features, method.encoder.words.weight, method.bias)
    expected = F.cross_entropy(logits.flatten(0, 1), text.train[:8, 1:].flatten())
    torch.testing.assert_close(method.loss(features, labels), expected)
    changed = text.train[:8].clone()
    changed[:, 20:] = 7
    torch.testing.assert_close(method(changed)[0][:, :20], features[:, :20])
    assert not torch.allclose(method(changed)[0][:, 20], features[:, 20])


def test_bert_tells_halves_that_belong_together(text):
    method = new("bert", text, next_sentence=True)
    corrupted, labels, own = method.views(text.train[:32], torch.Generator().manual_seed(0))
    seen, half = torch.where(labels >= 0, labels, corrupted), LENGTH // 2
    assert torch.equal(seen[:, :half], text.train[:32, :half]) and 8 < own.sum() < 24
    second = torch.where(own[:, None], text.train[:32, half:], text.train[:32].roll(1, 0)[:, half:])
    assert torch.equal(seen[:, half:], second)
    features, labels, logits, own = method(corrupted, labels, own)
    expected = F.cross_entropy(method.logits(features).flatten(0, 1), labels.flatten())
    expected = expected + F.binary_cross_entropy_with_logits(method.follows(features.mean(1))[:, 0], own.float())
    torch.testing.assert_close(method.loss(features, labels, logits, own), expected)
    fit({"m": method}, text.train, Run(batch_size=16, steps=2), console=QUIET)
    features = torch.zeros(12, LENGTH, 32)
    for sign in (1, -1):
        method.forward = lambda seen, labels, own, sign=sign: (features, labels, sign * (own.float() - 0.5), own)
        assert list(method.evaluate(text).values())[-1] == (sign == 1)


def test_t5_writes_what_was_cut_out_and_does_not_see_what_follows(text):
    method = new("t5", text, noise_density=0.3)
    inputs, labels = method.views(text.train[:8], torch.Generator().manual_seed(0))
    for row, (seen, cut) in enumerate(zip(inputs, labels, strict=True)):
        spans, rest = method.pieces(cut), method.pieces(seen)
        assert spans.keys() == rest.keys() and len(spans) == 7 and not len(spans[-1])
        whole = torch.cat([piece for sign in spans for piece in (spans[sign], rest[sign])])
        assert torch.equal(whole, text.train[row])
    features, labels = method(inputs, labels)
    expected = F.cross_entropy(method.logits(features).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(method.loss(features, labels), expected)
    torch.testing.assert_close(method.decode(F.pad(labels, (1, 0))[:, :-1], method.encoder(inputs)), features)
    changed = labels.clone()
    changed[:, 10] = 7
    torch.testing.assert_close(method(inputs, changed)[0][:, :11], features[:, :11])
    assert not torch.allclose(method(inputs, changed)[0][:, 11], features[:, 11])
    changed = inputs.clone()
    changed[:, -1] = 7
    assert not torch.allclose(method(changed, labels)[0][:, 0], features[:, 0])  # it reads all of the text


def test_t5_fills_spans(text):
    method = new("t5", text)
    texts = method.samples(text, 2)
    inputs, labels = method.views(text.test[[0, 6]], torch.Generator().manual_seed(0))
    for row, filled in enumerate(texts):
        pieces = re.split(r"\[(.*?) \| (.*?)\]", filled)
        assert [x for x in pieces[2::3] if x] == [text.decode(x) for x in method.pieces(labels[row]).values() if len(x)]
        assert pieces[::3] == [text.decode(piece) for piece in method.pieces(inputs[row]).values()]


def test_electra_tells_what_its_generator_has_replaced(text):
    method = new("electra", text, probability=0.25)
    tokens, places = method.views(text.train[:8], torch.Generator().manual_seed(0))
    assert torch.equal(tokens, text.train[:8]) and places.shape == (8, LENGTH // 4)
    assert all(len(set(row)) == LENGTH // 4 for row in places.tolist())
    seen, encode = [], method.encoder.forward
    method.encoder.forward = lambda x: seen.append(x) or encode(x)
    found, labels, features, replaced = method(tokens, places)
    assert torch.equal(labels, tokens.gather(1, places)) and torch.equal(replaced, seen[0] != tokens)
    torch.testing.assert_close(method.head.bias.sigmoid(), torch.tensor([0.25]))
    kept = torch.ones_like(replaced).scatter(1, places, False)
    assert not (replaced & kept).any() and 0.8 < replaced.sum() / places.numel() < 1
    hidden = method.generator(method.encoder.embed(tokens.scatter(1, places, 0))).take_along_dim(places[:, :, None], 1)
    torch.testing.assert_close(found, hidden)
    expected = F.cross_entropy(method.logits(hidden).flatten(0, 1), labels.flatten())
    scores = method.head(features)[:, :, 0]
    expected = expected + 50 * F.binary_cross_entropy_with_logits(scores, replaced.float())
    torch.testing.assert_close(method.loss(found, labels, features, replaced), expected)
    method.loss(found, labels, features, replaced).backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    method.temperature = 1e-9  # then it draws what its features say
    method(tokens, places)
    assert torch.equal(seen[1].gather(1, places), method.logits(hidden).argmax(2))


def test_electra_ranks_replaced_subwords(text):
    """The precision of a discriminator that knows them, and of one that has them last."""
    method = new("electra", text, probability=0.25)
    method.head, forward = torch.nn.Identity(), method.forward
    for sign, expected in ((1, 1.0), (-1, 0.15)):

        def known(tokens, places, sign=sign):
            found, labels, _, replaced = forward(tokens, places)
            return found, labels, sign * replaced.float()[:, :, None], replaced

        method.forward = known
        state = torch.get_rng_state()
        *_, precision = method.evaluate(text).values()
        assert precision == pytest.approx(expected, abs=0.1)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"noise_density": 1.0}, {"mean_span_length": 0.5}], ids=str)
def test_t5_knows_its_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create("t5", 1, **options)


def test_a_probe_tells_where_a_sequence_is_from(text):
    """Each part has words of its own, or all have the same ones."""
    part = torch.arange(80) // 8
    told = text._replace(test=(1 + 2 * part[:, None] + torch.arange(LENGTH) % 2))
    same = text._replace(test=text.test.repeat(7, 1)[torch.randperm(84, generator=torch.Generator().manual_seed(0))])
    method = new("gpt", text)
    assert next(iter(method.probe(told).values())) == 1 and method.training
    assert next(iter(method.probe(same).values())) < 0.4
    assert method.probe(text) == {}


@pytest.mark.parametrize("name", ["bert", "gpt", "t5"])
def test_marks_are_those_of_the_model_and_of_frequencies(name, text):
    """With the logits of the frequencies, with which it begins, the perplexities are the same; a trained model's is
    lower."""
    method = new(name, text)
    with torch.no_grad():
        method.encoder.words.weight.zero_()
        method.bias[WORDS:] = float("-inf")
    right, ratio, *_ = method.evaluate(text).values()
    assert ratio == pytest.approx(1, abs=1e-4) and right == pytest.approx(1 / (WORDS - 1), abs=0.03)
    method = new(name, text)
    before = method.evaluate(text)
    history = fit({"m": method}, text.train, Run(batch_size=16, steps=90, learning_rate=1e-2), console=QUIET)["m"]
    assert history[-1].loss < 0.9 * history[0].loss
    right, ratio, *_ = method.evaluate(text).values()
    assert right > list(before.values())[0] and ratio < 0.9 and method.training


def test_simcse_begins_with_berts_encoder_and_sees_no_padding(text, tmp_path):
    bert = new("bert", text)
    fit({"m": bert}, text.train, Run(batch_size=16, steps=2, checkpoint=tmp_path / "bert.pt"), console=QUIET)
    torch.manual_seed(1)
    method = create("simcse_bert", 4, text, features=32, depth=1, dropout=0.2)
    checkpoint.load_encoder(method.encoder, tmp_path / "bert.pt")
    tokens = text.train[:8].clone()
    assert not torch.allclose(*method(tokens))  # dropout
    torch.testing.assert_close(*method.eval()(tokens))
    torch.testing.assert_close(method.embed(tokens), bert.encoder(tokens).mean(1))
    tokens[:, 20:] = 0
    expected = bert.encoder(tokens[:, :20]).mean(1)
    torch.testing.assert_close(method.embed(tokens), expected)
    assert method.embed(torch.zeros_like(tokens)).isfinite().all()
    changed = tokens.clone()
    changed[:, 19] = 7
    assert not torch.allclose(method.encoder(changed, changed != 0)[:, 0], method.encoder(tokens, tokens != 0)[:, 0])


def test_a_decoder_reads_everything_and_sees_nothing_that_follows():
    torch.manual_seed(0)
    x, read = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 7, 16, requires_grad=True)
    of_x, of_read = torch.autograd.grad(Decoder(16, 2)(x, read)[:, 2, 0].sum(), (x, read))
    assert of_x[:, :3].abs().amin(2).gt(0).all() and not of_x[:, 3:].any() and of_read.abs().amin(2).gt(0).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_what_is_written_is_what_is_likely(temperature):
    def logits(tokens):  # the next number, and with half as much the one after it
        return F.one_hot((tokens[:, -1] + 1) % 9, 9) + 0.5 * F.one_hot((tokens[:, -1] + 2) % 9, 9)

    written = write(logits, torch.tensor([[5], [0]]), 6, temperature, torch.Generator().manual_seed(0))
    assert written.tolist() == [[5, 6, 7, 8, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_gpt_goes_on_with_a_text(text):
    method = new("gpt", text)
    torch.manual_seed(0)
    first, second = method.samples(text, 2), method.samples(text, 2)
    assert first == second and len(set(first)) == 2
    beginning, rest = first[0].split(" ... ")
    assert beginning == " ".join(map(str, text.test[0, :8].tolist())) and len(rest.split()) == LENGTH - 8


def test_subwords_of_a_text(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sentences = [f"The {i}th sheep jumped over the fence, and naïve people counted {i * i} of them." for i in range(99)]
    (tmp_path / "story.txt").write_text("\n\n".join(sentences))
    data = subwords.load(tmp_path / "story.txt")
    assert data.name == "story.txt" and data.train.shape[1] == data.test.shape[1] == LENGTH
    assert data.train.max() < data.facts["vocabulary"] <= subwords.VOCABULARY
    whole = data.decode(data.train.flatten())
    assert "\n".join(sentences).startswith(whole.rstrip("\ufffd")) and "naïve" in whole
    assert data.decode(data.test[0]).startswith(sentences[75])
    again = subwords.load(tmp_path / "story.txt")
    assert again.tokenizer == data.tokenizer and torch.equal(again.test, data.test)
    by_sentence = subwords.load_sentences(tmp_path / "story.txt")
    assert len(by_sentence.train) == 75 and len(by_sentence.test) == 24 and by_sentence.facts == data.facts
    assert [data.decode(row[row > 0]) for row in by_sentence.test] == sentences[75:]
    (tmp_path / "short.txt").write_text("\n\n".join(sentences[:8]))
    with pytest.raises(DataError, match="short.txt must have 64 subwords to train on and as many to test"):
        subwords.load(tmp_path / "short.txt")


def test_without_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "story.txt").write_text("\n\n".join(["A sentence of five words."] * 9))
    with pytest.raises(DataError, match="subwords need the tokenizers library: pip install tokenizers"):
        subwords.load(tmp_path / "story.txt")
