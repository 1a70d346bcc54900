"""The scripts of examples/, two steps of each on toy data, with and without the patch; and what compares them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastssl

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    """An example as a module, by its name."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def captions(tmp_path):
    rows = ["image,caption"]
    for i in range(10):
        Image.new("RGB", (32, 32), (25 * i, 0, 255 - 25 * i)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,picture {'abcdefghij'[i]}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path / "captions.csv"


@pytest.fixture
def verses(tmp_path):
    words = "the of and that to in he shall unto for i his a they be is him not them it".split()
    lines = [" ".join(words[(i * j) % 20] for j in range(1, 13)).capitalize() + "." for i in range(1, 40)]
    (tmp_path / "verses.txt").write_text("\n".join(lines))
    return tmp_path / "verses.txt"


def _agree(peer, train, rounding=1e-2, **options):
    options = argparse.Namespace(**{"batch_size": 8, "steps": 2, "seed": 0, "data": None, **options})
    theirs = list(train(options))
    with contextlib.ExitStack() as stack:
        for name in peer.split():
            stack.enter_context(fastssl.patch(name))
        ours = list(train(options))
    assert len(ours) == 2 and ours[0] != ours[1]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rounding, atol=0)


def test_open_clip(script, captions, open_clip_transformer):
    _agree("open_clip", script("open_clip_emoji").train, data=captions)


@pytest.mark.xdist_group("transformers")
def test_sentence_transformers(script, verses, sentence_transformers, transformers, tmp_path, monkeypatch):
    tokenizer = importlib.import_module("tokenizers").ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([verses.read_text()], vocab_size=300, special_tokens=["<pad>"], show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<pad>").save_pretrained(
        tmp_path
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    example = script("sentence_transformers_pairs")
    monkeypatch.setattr(example, "minilm", lambda: str(tmp_path))
    _agree("sentence_transformers", example.train, data=verses, mini_batch_size=3)
    with pytest.raises(SystemExit, match="batches must be of at most 38 pairs"):
        next(example.train(argparse.Namespace(batch_size=39, seed=0, data=verses)))


@pytest.mark.xdist_group("transformers")
def test_transformers(script, verses, transformers):
    _agree("transformers", script("transformers_gpt2").train, rounding=1e-5, data=verses)


@pytest.fixture
def pictures(tmp_path):
    for i in range(10):
        Image.effect_noise((32, 32), 10 * i + 5).save(tmp_path / f"{i}.png")
    return tmp_path


def test_lightly(script, pictures, lightly):
    pytest.importorskip("pytorch_lightning")
    _agree("lightly", script("lightly_simclr").train, data=pictures)


def test_timm(script, pictures, lightly, timm):
    _agree("lightly timm", script("timm_mae").train, data=pictures)


def test_the_comparison(script, monkeypatch, capsys):
    compare, runs = script("compare"), []

    def run(name, *options):
        runs.append((name, *options))
        batch = int(options[-1]) if options else 8
        if batch > 64:  # the data have no more
            return None
        gibibytes = batch / (32 if name == "ours" else 8)
        return {"losses": [2.0, 1.0 + 1e-3 * (name == "ours")], "seconds": 0.5, "gibibytes": gibibytes}

    monkeypatch.setattr(compare, "_run", run)
    for rounding, status in (1e-2, False), (1e-4, True):
        monkeypatch.setattr(sys, "argv", ["example.py", "--largest", "--batch-size", "8"])
        with pytest.raises(SystemExit) as end:
            compare.compare("lightly", None, rounding)
        assert end.value.code is status
    lines = capsys.readouterr().out.splitlines()
    assert "   2   1.00000   1.00100" in lines and any("at most 1.0e-03 apart" in line for line in lines)
    assert any(line.split()[-2:] == ["32", "64"] for line in lines if "largest" in line)


def test_one_of_the_two_in_this_process(script, monkeypatch, capsys):
    def train(options):
        for step in range(options.steps):
            yield options.batch_size + options.seed + step + 0.25

    monkeypatch.setattr(sys, "argv", ["example.py", "--only", "theirs", "--steps", "3", "--seed", "1"])
    script("compare").compare("lightly", train, 1e-2, batch_size=4)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["losses"] == [5.25, 6.25, 7.25] and result["seconds"] > 0 and result["gibibytes"] > 0.1
