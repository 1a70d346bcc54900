"""Any folder of images, with a subfolder for each class or without classes: decoded once, cached as one tensor.

pictures/cat/1.jpg          or, where the split is given,   pictures/train/cat/1.jpg
pictures/dog/indoors/2.png                                  pictures/test/dog/2.png     (or val)
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from fastssl.train.data.cache import cache_folder, mapped
from fastssl.train.data.packages import DataError
from fastssl.train.files import open_regular

SIZE = 32
_TASKS = 4096  # of threads, at a time
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read(folder: Path, size: int = SIZE) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Images and labels for training, and for testing; the labels are None if the folder has no classes.

    It has classes if every image is in a subfolder, and there are at least two of these. Where there are no folders
    train and test, or train and val, a fifth of each class is for testing. Hidden files and linked folders are skipped.

    They are decoded once, into a file of the user's cache, which may be larger than memory: of the images that are
    returned, the system reads what is used.

    Args:
        folder: of the images.
        size: of the images that are made of them.

    Returns:
        (N, 3, size, size) uint8 images, the middle of each, in an order that is as good as random; (N, size, size) if
        all are grey. (N,) int64 labels, the positions of their classes' names in sorted order.

    Raises:
        DataError: if a file cannot be read as an image, or there is nothing to train on or to test, of a class or at
            all.
    """
    tested = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if tested is not None and (folder / "train").is_dir():
        train, test = _images(folder / "train"), _images(tested)
    else:
        train, test, seen = [], [], Counter()
        for image, name in _images(folder):
            seen[name] += 1
            (test if seen[name] % 5 == 2 else train).append((image, name))
    if not train or not test:
        raise DataError(f"{folder} must have images to train on and to test, got {len(train)} and {len(test)}")
    classes = {name: place for place, name in enumerate(sorted({name for _, name in train}))}
    labels = [None, None]
    if len(classes) > 1 and "" not in classes:
        if unknown := sorted({name for _, name in test} - classes.keys()):
            raise DataError(f"{tested / unknown[0]} is no class that {folder / 'train'} has")
        labels = [torch.tensor([classes[name] for _, name in part]) for part in (train, test)]
    files = [image for image, _ in train + test]
    stats = [file.stat() for file in files]
    listing = [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in zip(files, stats, strict=True)]
    place = cache_folder("folders") / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()}-{size}"
    images, grey = mapped(place, repr(listing), (len(files), 3, size, size), lambda images: decode(files, images))
    images = images[:, 0] if grey else images
    return images[: len(train)], labels[0], images[len(train) :], labels[1]


def picture(file: Path | io.BytesIO, size: int = SIZE) -> Image.Image:
    """An image file as RGB, upright, on white where it is transparent; large JPEGs smaller, but not below 2 size.

    Raises:
        DataError: if it cannot be read as an image.
    """
    try:
        with open_regular(file) if isinstance(file, Path) else file as source, Image.open(source) as image:
            image.draft(None, (2 * size, 2 * size))
            if image.mode == "F":
                raise ValueError("nobody knows which of its floating-point numbers is white")
            if image.mode.startswith("I"):  # 16 bits, which convert would cut at 255
                image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:  # a damaged file can make a decoder raise almost anything
        raise DataError(f"{file} cannot be read as an image: {error}") from None
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _images(root: Path) -> list[tuple[Path, str]]:
    """Each image under `root`, with the first folder on its path, or "" without one; in the order of a checksum."""
    images = []
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                way = path.relative_to(root)
                images.append((zlib.crc32(os.fsencode(way)), path, way.parts[0] if len(way.parts) > 1 else ""))
    return [(path, name) for _, path, name in sorted(images)]


def decode(files: Sequence[Path], images: Tensor, resize: Callable[..., Image.Image] = ImageOps.fit) -> bool:
    """Fills images, and returns whether all of them are grey.

    Args:
        files: of images.
        images: (len(files), 3, size, size) uint8, to which threads write, each where it belongs.
        resize: (image, size, filter) -> image, by default its middle.

    Raises:
        DataError: if one cannot be read as an image.
    """
    size = images.shape[-1]

    def write(place: int) -> bool:
        image = to_tensor(resize(picture(files[place], size), (size, size), Image.Resampling.BICUBIC))
        images[place].copy_(image)
        return torch.equal(image, image[:1].expand_as(image))

    def written() -> Iterator[bool]:
        for start in range(0, len(files), _TASKS):  # there may be millions
            yield from pool.map(write, range(start, min(start + _TASKS, len(files))))

    with ThreadPoolExecutor() as pool:
        try:
            coloured = sum(not grey for grey in track(written(), "reading images", len(files), transient=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return coloured == 0
