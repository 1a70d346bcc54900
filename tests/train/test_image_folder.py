"""Folders of images: their layouts, what is read out of files, the cache, and methods that train on them."""

import errno
import io
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import numpy as np
from PIL import Image
from rich.console import Console
from torch.utils.data import TensorDataset

import fastssl.train.__main__ as command_line
from fastssl.train import METHODS, DataError, Method, Run, cli, create, fit
from fastssl.train.data import augment, cache, image_folder
from fastssl.train.data import images as data
from fastssl.train.data.cache import cached, is_mapped, mapped
from fastssl.train.data.image_folder import SIZE, picture
from fastssl.train.data.loader import Loader

IMAGE_METHODS = [name for name, method in METHODS.items() if method.load is Method.load]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTSSL_DATA", raising=False)


def write(path, colour, size=(40, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def colours_of(images):
    return {tuple(image[..., 0, 0].tolist()) for image in images}


@pytest.fixture
def animals(tmp_path):
    """Ten red cats, some of them in folders of their own, seven blue dogs, and what does not count."""
    root = tmp_path / "animals"
    for i in range(10):
        write(root / "cat" / ("" if i < 7 else "deeper/still") / f"{i}.PNG", (200 + i, 0, 0))
    for i in range(7):
        write(root / "dog" / f"{i}.jpg", (0, 0, 180 + 8 * i), size=(50, 80))
    write(root / "dog" / ".hidden.png", "green")
    write(root / ".thumbnails" / "0.png", "green")
    (root / "dog" / "notes.txt").write_text("nothing")
    return root


def test_a_folder_for_each_class(animals):
    images = data.load(animals)
    assert images.name == "animals, 2 classes"
    assert images.train.shape == (13, 3, SIZE, SIZE) and images.test.shape == (4, 3, SIZE, SIZE)
    assert images.train.dtype == torch.uint8 and images.train_labels.dtype == torch.int64
    assert images.test_labels.bincount().tolist() == [2, 2]  # a fifth of each
    for pictures, labels in ((images.train, images.train_labels), (images.test, images.test_labels)):
        assert torch.equal(pictures[:, 2, 0, 0] > pictures[:, 0, 0, 0], labels == 1)
    assert len(colours_of(images.train) | colours_of(images.test)) == 17
    assert images.train_labels.diff().ne(0).sum() > 2  # classes are mixed
    assert images.facts == {"size": SIZE, "colours": 3, "classes": 2}
    again = data.load(animals)
    assert all(torch.equal(x, y) for x, y in zip(images[1:], again[1:], strict=True))


@pytest.mark.parametrize("tested", ["test", "val"])
def test_a_given_split_is_kept(tmp_path, tested):
    for part, count in (("train", 3), (tested, 2)):
        for i in range(count):
            write(tmp_path / "my" / part / "b" / f"{i}.png", 10 * i, mode="L")
            write(tmp_path / "my" / part / "a" / f"{i}.png", 100 + 10 * i, mode="L")
    images = data.load(tmp_path / "my")
    assert images.train.shape == (6, SIZE, SIZE) and images.test.shape == (4, SIZE, SIZE)  # all are grey
    assert sorted(images.train[:, 0, 0].tolist()) == [0, 10, 20, 100, 110, 120]
    assert sorted(images.test[:, 0, 0].tolist()) == [0, 10, 100, 110]
    assert torch.equal(images.train_labels, (images.train[:, 0, 0] < 100).long())
    assert images.facts == {"size": SIZE, "colours": 1, "classes": 2}
    write(tmp_path / "my" / tested / "c" / "0.png", 1, mode="L")
    with pytest.raises(DataError, match=rf"{tested}/c is no class that .*my/train has"):
        data.load(tmp_path / "my")


@pytest.mark.parametrize("layout", ["flat", "mixed", "one"])
def test_without_classes(tmp_path, layout):
    for i in range(12):
        name = {"flat": f"{i}.png", "mixed": f"{i}.png" if i == 11 else f"{i % 2}/{i}.png", "one": f"only/{i}.png"}
        write(tmp_path / "my" / name[layout], (i, 0, 0))
    images = data.load(tmp_path / "my")
    assert images.train_labels is None and images.test_labels is None and images.name == "my, no classes, so no kNN"
    assert len(images.train) + len(images.test) == 12 and 2 <= len(images.test) <= 4
    for name in ("sup_con", "supervised"):
        with pytest.raises(DataError, match="my, no classes, so no kNN: the method needs labels"):
            METHODS[name].training_data(images)
    torch.manual_seed(0)
    (shown,) = create("simclr", 1, images).evaluate(images).items()
    assert shown[0] == "effective rank, of 256 dimensions" and 1 / 256 <= shown[1] <= 3 / 256


def test_bad_folders(tmp_path, animals):
    with pytest.raises(DataError, match="nowhere does not exist"):
        data.load(tmp_path / "nowhere")
    write(tmp_path / "one" / "1.png", "red")
    with pytest.raises(DataError, match="one must have images to train on and to test, got 1 and 0"):
        data.load(tmp_path / "one")
    broken = animals / "cat" / "3.PNG"
    content = broken.read_bytes()
    for damaged in (b"", b"text", content[:-30], content[:20]):
        broken.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cat/3.PNG cannot be read as an image"):
            data.load(animals)


def test_the_middle_of_a_picture_is_taken(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :29], pixels[:, 99:], pixels[:, 29:99] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    for i in range(3):
        Image.fromarray(pixels if i else pixels.transpose(1, 0, 2)).save(tmp_path / f"{i}.png")
    train, _, test, _ = image_folder.read(tmp_path)
    assert colours_of(torch.cat([train, test])) == {(0, 255, 0)}


def test_pictures_of_all_kinds(tmp_path):
    grey16 = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    grey16.save(tmp_path / "16.png")
    (tmp_path / "16.pgm").write_bytes(b"P5 16 16 65535\n" + np.asarray(grey16).astype(">u2").tobytes())
    for name in ("16.png", "16.pgm"):
        assert np.array_equal(np.asarray(picture(tmp_path / name))[..., 0].ravel(), np.arange(256))
    Image.new("F", (9, 9), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="float.tif cannot be read as an image: nobody knows which of its floating-"):
        picture(tmp_path / "float.tif")
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert picture(tmp_path / "cmyk.tif").getpixel((4, 4)) == (255, 0, 0)
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "nothing.png")
    assert picture(tmp_path / "nothing.png").getpixel((4, 4)) == (255, 255, 255)
    Image.new("P", (9, 9)).save(tmp_path / "palette.gif")
    Image.new("1", (9, 9), 1).save(tmp_path / "bit.bmp")
    assert picture(tmp_path / "bit.bmp").getpixel((4, 4)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert picture(tmp_path / "turned.jpg").size == (10, 20)
    Image.new("L", (4000, 3000), 77).save(tmp_path / "large.jpg")
    large = picture(tmp_path / "large.jpg")
    assert 2 * SIZE <= min(large.size) < 1000 and large.getpixel((5, 5)) == (77, 77, 77)
    file = io.BytesIO()
    Image.new("RGB", (5, 5), "red").save(file, "PNG")
    assert picture(file).size == (5, 5)


def test_images_are_decoded_once(animals, monkeypatch, tmp_path):
    decoded = []
    decode = image_folder.decode
    monkeypatch.setattr(image_folder, "decode", lambda files, *args: decoded.append(len(files)) or decode(files, *args))
    first = data.load(animals)
    data.load(animals)
    assert decoded == [17]
    write(animals / "cat" / "0.PNG", (1, 2, 3), size=(41, 40))
    assert (1, 2, 3) in colours_of(torch.cat([*(data.load(animals)[place] for place in (1, 3))]))
    write(animals / "cat" / "new.png", (3, 2, 1))
    assert len(data.load(animals).train) + len(data.load(animals).test) == 18 and decoded == [17, 17, 18]
    (place,) = (tmp_path / "home" / "fastssl" / "folders").iterdir()  # one file, nothing left beside it
    os.utime(animals / "cat" / "new.png", ns=(1, 1))
    data.load(animals)
    assert len(decoded) == 4 and first.train.shape[1:] == (3, SIZE, SIZE)
    content = place.read_bytes()
    for damaged in (b"", content[:100], content[:-1], content[:300] + b"\x00" + content[301:]):
        place.write_bytes(damaged)
        data.load(animals)
        assert place.read_bytes() == content
    assert len(decoded) == 8


def test_images_of_another_size_are_read_from_a_file(animals):
    """As many as are used, and the next batch while a step is taken."""
    small, large = data.load(animals), data.load(animals, 100)
    assert large.facts == {**small.facts, "size": 100}
    assert large.train.shape == (13, 3, 100, 100) and is_mapped(large.train) and is_mapped(large.test)
    assert torch.equal(large.train_labels, small.train_labels)
    middle = large.train[:, :, 40:60, 40:60].float().mean((2, 3))
    torch.testing.assert_close(middle, small.train[:, :, 12:20, 12:20].float().mean((2, 3)), atol=3, rtol=0)


def test_a_file_that_may_only_be_read_is_read(animals, monkeypatch):
    written, from_file = data.load(animals, 40).train.clone(), torch.from_file

    def refuse(*args, shared=False, **kwargs):
        if shared:
            raise RuntimeError("unable to open file in read-write mode: Permission denied")
        return from_file(*args, **kwargs)

    monkeypatch.setattr(torch, "from_file", refuse)
    monkeypatch.setattr(image_folder, "decode", None)
    assert torch.equal(data.load(animals, 40).train, written)


def test_images_without_a_file_are_in_memory_if_it_has_room(animals, monkeypatch, tmp_path):
    in_file = data.load(animals, 40).train.clone()
    folder = tmp_path / "home" / "fastssl" / "folders"
    next(folder.iterdir()).unlink()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    in_memory = data.load(animals, 40).train
    assert torch.equal(in_memory, in_file) and not is_mapped(in_memory) and list(folder.iterdir()) == []
    monkeypatch.setattr(cache, "available_memory", lambda: 1 << 16)
    with pytest.raises(OSError, match="-40 needs 0 MiB, which must fit .* or into memory, got .*No space left"):
        data.load(animals, 40)


def test_what_killed_processes_left_is_cleared_away_and_no_more(tmp_path):
    """A file of another size, of a living process, and one that only looks like it, stay."""
    path = tmp_path / "images-32"
    killed = (
        "import os, pathlib, sys; from fastssl.train.data.cache import mapped;"
        "mapped(pathlib.Path(sys.argv[1]), 'key', (8,), lambda numbers: os.kill(os.getpid(), 9))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", killed, str(path)], env=environment).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    others = [tmp_path / "images-32.others", tmp_path / "images-322.0.partial"]
    for other in others:
        other.touch()
    living = []

    def fill(numbers):
        living.extend(set(tmp_path.iterdir()) - {*others})
        if len(living) == 1:  # another process, at the same time
            assert mapped(path, "key", (8,), fill)[1] == 3 and living[0].exists()
        numbers.fill_(len(living))
        return len(living)

    numbers, value = mapped(path, "key", (8,), fill)
    assert numbers.tolist() == [value] * 8 and len(living) == 3 and {*tmp_path.iterdir()} == {path, *others}


@pytest.mark.parametrize("labelled", [False, True])
def test_what_is_read_ahead_is_the_same(labelled, animals, monkeypatch):
    images, names = data.load(animals, 40).train, set()
    examples = TensorDataset(images, torch.arange(13)) if labelled else images
    kind = type(examples)
    getitem = kind.__getitem__

    def named(self, positions):
        names.add(threading.current_thread().name.split("_")[0])
        time.sleep(0.01)
        return getitem(self, positions)

    positions = [torch.tensor(ids) for ids in ([3, 1], [0, 12], [5, 5])]
    expected = [examples[ids] for ids in positions]
    if labelled:
        monkeypatch.setattr(kind, "__getitem__", named)
    loader = Loader(examples, iter(positions))
    for found, wanted in zip(loader, expected, strict=True):
        assert all(map(torch.equal, found, wanted))
    assert not labelled or (names == {"loader"} and loader.seconds > 0.009)
    assert list(Loader(images.clone(), [])) == [] and not is_mapped(images.clone())


def test_whoever_waits_for_data_is_told(animals, monkeypatch):
    console = Console(file=io.StringIO(), width=80)
    method = create("simclr", 2, data.load(animals, 40))
    monkeypatch.setattr("fastssl.train.loop._MUCH", -1.0)
    fit({"m": method}, data.load(animals, 40).train, Run(batch_size=4, steps=2), console=console)
    assert " % of the time went by waiting for data" in console.file.getvalue().replace("%", " %")


def test_fashion_mnist_has_a_size_of_its_own(monkeypatch):
    monkeypatch.delenv("FASTSSL_DATA", raising=False)
    with pytest.raises(DataError, match="a size of images, 64, needs a folder of images"):
        data.load(None, 64)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    assert cached(tmp_path / "file" / "cache", "key", lambda: [1]) == [1]


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_methods_train_on_colours(name, animals):
    images = data.load(animals)
    torch.manual_seed(0)
    method = create(name, 2, images)
    examples = method.training_data(images)
    inputs = method.views(examples[torch.arange(8)], torch.Generator().manual_seed(0))
    assert inputs[0].shape == (8, 3, SIZE, SIZE) and 0 <= inputs[0].min() and inputs[0].max() < 1.00001
    history = fit({name: method}, examples, Run(batch_size=8, steps=2), console=Console(quiet=True))[name]
    assert all(torch.tensor(step.loss).isfinite() for step in history)
    assert {"kNN accuracy", "linear probe"} <= method.evaluate(images).keys()


def test_mae_paints_colours_where_they_belong(animals, tmp_path, monkeypatch):
    """A decoder that paints the truth, in the order of the loss, has no loss, and its pictures are the true ones."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    images = data.load(animals)
    pictures = torch.rand(2, 3, SIZE, SIZE)
    images = images._replace(test=(pictures * 255).to(torch.uint8))
    truth = augment.to_float(images.test)
    patches = truth.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 64, 48)  # MAE's (p, q, c)
    method = create("mae", 1, images, norm_pix_loss=False)
    monkeypatch.setattr(method, "forward", lambda pixels, ids_keep, ids_restore, mask: (patches, pixels, mask))
    assert method.loss(*method(truth, *method.mask(2, torch.Generator().manual_seed(0)))) < 1e-12
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **_: shown.append(torch.as_tensor(image)))
    method.pictures(images, tmp_path / "mae.png")
    assert len(shown) == 6
    for place, image in enumerate(truth):
        torch.testing.assert_close(shown[2 + place], image.permute(1, 2, 0))
        torch.testing.assert_close(shown[4 + place], image.permute(1, 2, 0))


def test_the_command_trains_on_a_folder(animals, monkeypatch, capsys, tmp_path):
    def command(*arguments):
        options = ["--steps", "2", "--batch-size", "8"]
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments), *options])
        with pytest.raises(SystemExit) as caught:
            cli.run(command_line.main)
        return caught.value.code, capsys.readouterr().out

    code, output = command("supervised", "--vit", "--data", animals)
    assert code == 0 and "animals, 2 classes: 13 training examples" in output and "kNN accuracy" in output
    for i in range(10):
        write(tmp_path / "flat [bold]" / f"{i}.png", (i, 0, 0))
    monkeypatch.chdir(tmp_path / "flat [bold]")
    code, output = command("simclr", "--data", ".")
    assert code == 0 and "flat [bold], no classes, so no kNN: 8 training examples" in output
    assert "effective rank, of 256 dimensions" in output
    assert command("sup_con", "--data", ".")[0].startswith("error: flat [bold], no classes, so no kNN: the method")
