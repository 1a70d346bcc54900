"""OpenClipart: how it is fetched, what of its metadata becomes a caption, what is left out. Files here are tiny."""

import os

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image

from fastssl.train import DataError
from fastssl.train.data import openclipart, packages, pairs

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>no</dc:description>
<dc:subject><rdf:Bag>{keywords}<rdf:li/><rdf:li></rdf:li></rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Publisher</dc:title></cc:Agent></dc:publisher>
<dc:creator><cc:Agent>
<dc:title>{artist}</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata><title>Not this</title></svg>"""


def draw(root, path, number, title="", keywords=(), artist=""):
    for kind in ("svg", "png"):
        (root / kind / path).parent.mkdir(parents=True, exist_ok=True)
    keywords = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    (root / "svg" / f"{path}.svg").write_text(SVG.format(title=title, keywords=keywords, artist=artist))
    Image.new("RGBA", (40, 20), (number % 256, number // 256, 100)).save(root / "png" / f"{path}.png")


def fill(root):
    draw(root, "animals/dogs/a_01", 0, "Good &amp; old dog 2", ["mammal", "Dog", "hash"], "Anna Good")
    draw(root, "food/tea_ann_01", 1, "Tea", ["un_sorted", "drink"])
    draw(root, "unsorted/thing", 2, "A thing", ["unsorted"])
    for i in range(5):  # a collection's title
        draw(root, f"computer/icons/mail_{'abcde'[i] * 3}", 10 + i, "My icons", ["icon", "theme"])
    for i in range(12):
        draw(root, f"shapes/stars/star_{i}pt", 20 + i, "gramastar", ["stars"])
    draw(root, "shapes/42", 50)
    draw(root, "shapes/drawn", 51, "No PNG")
    (root / "png" / "shapes" / "drawn.png").unlink()


def debian(log, contents=fill):
    """Stand-ins for apt-get and dpkg-deb: each package unpacks its own half."""

    def run(*command, cwd):
        log.append(command[0])
        if command[0] == "apt-get":
            (cwd / f"{command[2]}_1%3a0.18_all.deb").touch()
            return
        whole = cwd / "whole"
        contents(whole)
        kind = os.path.basename(command[2]).split("_")[0].removeprefix("openclipart-")
        target = cwd / openclipart.SYSTEM_DIRECTORY.relative_to("/") / kind
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(whole / kind, target)

    return run


@pytest.fixture(autouse=True)
def log(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    commands = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(openclipart, "SYSTEM_DIRECTORY", tmp_path / "system")
    monkeypatch.setattr(packages, "run", debian(commands))
    return commands


def test_captions_are_words_of_titles_and_keywords_without_noise():
    rows = {row[1]: row for row in openclipart.read()}
    for i in range(5):
        assert rows.pop(f"mail {'abcde'[i] * 3} icon")[2:] == (f"mail {'abcde'[i] * 3}", False, "computer")
    assert {caption: row[2:] for caption, row in rows.items() if not caption.startswith("star")} == {
        "old dog mammal": ("old dog", False, "animals"),  # the artist is Good
        "tea un sorted drink": ("tea", False, "food"),
        "thing": ("thing", False, ""),
    }


def test_of_drawings_with_one_caption_some_stay_and_one_is_for_testing():
    rows = [row for row in openclipart.read() if row[1] == "star pt stars"]
    assert len(rows) == openclipart._ALIKE == 8
    assert [variant for *_, variant, _ in rows] == [False] + [True] * 7


def test_drawings_are_squares_on_white_and_belong_to_their_captions():
    for image, caption, *_ in openclipart.read():
        assert image.shape == (3, 32, 32) and image[:, 0].eq(255).all() and image[2, 16].eq(100).all()
        expected = {"old dog mammal": 0, "tea un sorted drink": 1, "thing": 2, "mail aaa icon": 10, "mail eee icon": 14}
        assert image[0, 16, 16] == expected.get(caption, image[0, 16, 16])


def test_packages_are_fetched_once_and_used_where_they_are_installed(log, tmp_path):
    loaded = pairs.load("openclipart")
    assert log == ["apt-get", "dpkg-deb"] * 2
    assert loaded.name == "OpenClipart" and loaded.classes == ("animals", "computer", "food", "shapes")
    again = pairs.load("openclipart")
    assert len(log) == 4
    assert torch.equal(loaded.train.tensors[0], again.train.tensors[0])
    assert torch.equal(loaded.test.tensors[1], again.test.tensors[1])
    for part in (tmp_path / "home" / "fastssl" / "openclipart").iterdir():
        part.unlink()
    fill(openclipart.SYSTEM_DIRECTORY)
    assert torch.equal(pairs.load("openclipart").train.tensors[0], loaded.train.tensors[0])
    assert len(log) == 4


def test_packages_that_cannot_be_had_or_have_nothing(monkeypatch, tmp_path):
    def run(*command, cwd):
        raise DataError(f"{command[0]} is not installed")

    monkeypatch.setattr(packages, "run", run)
    expected = "OpenClipart is in Debian's openclipart-svg and openclipart-png, but apt-get is not installed"
    with pytest.raises(DataError, match=expected):
        pairs.load("openclipart")
    monkeypatch.setattr(packages, "run", debian([], lambda root: draw(root, "shapes/nothing", 1)))
    monkeypatch.setattr(openclipart, "_LARGEST", 0)
    with pytest.raises(DataError, match="must have drawings in both svg and png"):
        pairs.load("openclipart")
    assert not (tmp_path / "home" / "fastssl" / "openclipart").exists()


def test_a_drawing_that_is_too_large_is_left_out(monkeypatch):
    assert "tea un sorted drink" in {row[1] for row in openclipart.read()}
    monkeypatch.setattr(openclipart, "_LARGEST", 799)
    with pytest.raises(DataError, match="must have drawings"):
        openclipart._make()
    monkeypatch.setattr(openclipart, "_LARGEST", 800)
    assert len(openclipart._make()["rows"]) == 16
