"""Pipes, sockets and devices where files are expected: errors that name them, at once."""

import os
import signal
import socket

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from PIL import Image

from fastssl.train import DataError
from fastssl.train.data import cache, images, openclipart, packages, pairs, python_doc, text
from fastssl.train.files import check_writable, open_regular


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    """Whoever waits for the other end of a pipe is killed after a minute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(params=["pipe", "device", "socket"])
def special(request, tmp_path, monkeypatch):
    """Puts one of them at a path."""

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        else:
            monkeypatch.chdir(path.parent)  # the name of a socket is short
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        return path

    return put


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_in_a_folder_of_images(special, tmp_path):
    for i in range(8):
        picture(tmp_path / "folder" / f"{i}.png")
    special(tmp_path / "folder" / "special.png")
    with pytest.raises(DataError, match="special.png cannot be read as an image: "):
        images.load(tmp_path / "folder")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_among_the_files_of_a_data_set(name, special, tmp_path):
    special(tmp_path / "folder" / name)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.* is damaged or partial: "):
        images.load(tmp_path / "folder")


def test_as_an_image_of_a_table_or_as_the_table(special, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("image,caption\na.png,a\nb.png,b\n")
    picture(tmp_path / "a.png")
    special(tmp_path / "b.png")
    with pytest.raises(DataError, match="b.png cannot be read as an image: "):
        pairs.load(table)
    special(table)
    with pytest.raises(DataError, match="table.csv cannot be read as a table: "):
        pairs.load(table)


def test_as_emoji_or_text(special, tmp_path):
    special(tmp_path / "emoji" / "32.png")
    with pytest.raises(DataError, match="32.png is damaged or partial: "):
        pairs.load(tmp_path / "emoji")
    special(tmp_path / "novel.txt")
    with pytest.raises(DataError, match="novel.txt cannot be read as a text: "):
        text.load(tmp_path / "novel.txt")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_among_the_files_of_a_package(kind, special, tmp_path, monkeypatch):
    monkeypatch.setattr(openclipart, "SYSTEM_DIRECTORY", tmp_path / "clip art")
    picture(tmp_path / "clip art" / "png" / "a.png")
    (tmp_path / "clip art" / "svg").mkdir()
    (tmp_path / "clip art" / "svg" / "a.svg").write_text("<svg/>")
    special(tmp_path / "clip art" / kind / f"a.{kind}")
    with pytest.raises(OSError, match=rf"a.{kind} must be a regular file|No such device or address.*a.{kind}"):
        pairs.load("openclipart")
    monkeypatch.setattr(python_doc, "SYSTEM_DIRECTORY", tmp_path / "doc")
    special(tmp_path / "doc" / "python3.11" / "html" / "library" / "page.html")
    with pytest.raises(OSError, match=r"page.html must be a regular file|No such device or address.*page.html"):
        text.load("python")


def test_in_the_cache(special, tmp_path):
    place = special(tmp_path / "cache" / "numbers")
    for _ in range(2):
        assert torch.equal(cache.cached(place, "", lambda: torch.arange(3)), torch.arange(3))
    assert place.is_file()


def test_as_what_is_written(special, tmp_path):
    path = special(tmp_path / "figure.png")
    if path.is_symlink():  # a device takes what is written to it
        check_writable(path)
        return
    with pytest.raises(OSError, match="figure.png"):
        check_writable(path)


def test_files_are_opened_as_before(tmp_path):
    (tmp_path / "file").write_bytes(b"bytes")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"bytes"
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


def test_the_check_leaves_no_file_and_spoils_none(tmp_path):
    """Of a run that ends early nothing is to be seen."""
    folder, link = tmp_path / "new", tmp_path / "new" / "link"
    check_writable(folder / "file")
    assert not any(folder.iterdir())
    link.symlink_to(tmp_path / "elsewhere")
    check_writable(link)
    assert link.is_symlink() and not link.exists()
    link.write_bytes(b"bytes")
    check_writable(link)
    assert (tmp_path / "elsewhere").read_bytes() == b"bytes"


def test_few_bytes_that_claim_to_be_many(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(packages, "LARGEST", 1000)
    (tmp_path / "many.gz").write_bytes(gzip.compress(bytes(100_000_000)))
    digested = []
    monkeypatch.setattr(packages, "check_sha256", lambda contents, *_: digested.append(len(contents)))
    packages.read_verified(tmp_path / "many.gz", "")
    assert digested == [1001]
