"""Images and what they are called, without a data hub: emoji, clip art, or any table of image files and captions.

The pictures are Google's (Apache-2.0), in the npm package emoji-datasource-google (MIT); names and keywords are those
of emojibase-data (MIT).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from fastssl.train.data import openclipart, packages
from fastssl.train.data.image_folder import SIZE, decode, picture, to_tensor
from fastssl.train.data.packages import DataError
from fastssl.train.data.text import tokenize
from fastssl.train.files import open_text

_PICTURES = packages.Package(
    "emoji-datasource-google@16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
)
_NAMES = packages.Package("emojibase-data@16.0.3", "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689")
EMOJI = {
    "32.png": packages.File(
        _PICTURES,
        "package/img/google/sheets/32.png",
        "b417e9f6cd4bbc10656bbfd5e13b6e9a2545b55e6a4cf7312d75be1faaa34952",
    ),
    "emoji.json": packages.File(
        _PICTURES, "package/emoji.json", "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f"
    ),
    "data.json": packages.File(
        _NAMES, "package/en/data.json", "8cbf636f6b28476065e847360691ca8a6767ed328d3223f9eead4e5c09e61f04"
    ),
}


class Pair(NamedTuple):
    """An image and its caption.

    Attributes:
        concept: what it has in common with its variants, which must not be trained on if it is tested.
        variant: whether another of the concept is to be tested, not this one.
        label: its class's name, "" if it has none.
    """

    image: Tensor
    caption: str
    concept: str
    variant: bool = False
    label: str = ""


class Pairs(NamedTuple):
    """Pairs to train on and pairs of other concepts to test: (N, 3, SIZE, SIZE) uint8 images, (N, LENGTH) tokens.

    If they have classes, `test_labels` are those of the test images, (N,) int64 places in `classes`, -1 without one.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    test_labels: Tensor

    @property
    def facts(self) -> dict[str, int]:
        """What a constructor may have to know."""
        return {"size": SIZE, "colours": 3}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """As captions were."""
        return tokenize(texts)


def load(source: str | os.PathLike[str] | None = None) -> Pairs:
    """The images of `read`, and the words of their captions."""
    name, train, test, classes = read(source)
    return Pairs(name, tensors(train, tokenize), tensors(test, tokenize), classes, labels(test, classes))


def read(source: str | os.PathLike[str] | None = None) -> tuple[str, list[Pair], list[Pair], tuple[str, ...]]:
    """3,786 emoji with names and keywords, clip art, or the images of a table: what they are, those to train on, those
    of a fifth of the concepts, which are for testing, and the names of all classes.

    Images that are the same as one to be tested, pixel by pixel, are not trained on.

    Args:
        source: CSV file with columns image, a path relative to the file, and caption, and label if there are classes;
            "openclipart", see `fastssl.train.data.openclipart`; or folder that has the emoji (32.png and emoji.json of
            the package emoji-datasource-google, data.json of emojibase-data); default: the user's cache, filled by npm.

    Raises:
        DataError: if emoji or clip art cannot be had, or the table or an image cannot be read, or it has only one
            caption or image.
    """
    if source == "openclipart":
        name, pairs = "OpenClipart", [Pair(*row) for row in openclipart.read()]
    elif source is not None and not Path(source).is_dir():
        name, pairs = Path(source).name, list(_table(Path(source)))
    else:
        name, pairs = "emoji", list(_emoji(packages.read("emoji", EMOJI, source)))
    concepts = sorted({pair.concept for pair in pairs}, key=lambda concept: zlib.crc32(concept.encode()))
    if len(concepts) < 2:
        raise DataError(f"{name} must have at least 2 different captions, got {len(concepts)}")
    tested = set(concepts[: max(1, len(concepts) // 5)])
    test = [pair for pair in pairs if pair.concept in tested and not pair.variant]
    seen = {_pixels(pair) for pair in test}
    train = [pair for pair in pairs if pair.concept not in tested and _pixels(pair) not in seen]
    if not train:
        raise DataError(f"{name} must have images to train on that are not those to be tested")
    return name, train, test, tuple(sorted({pair.label for pair in pairs} - {""}))


def tensors(pairs: Sequence[Pair], tokenize: Callable[[list[str]], Tensor]) -> TensorDataset:
    """Images (N, 3, SIZE, SIZE) uint8, and what `tokenize` makes of their captions."""
    return TensorDataset(torch.stack([pair.image for pair in pairs]), tokenize([pair.caption for pair in pairs]))


def labels(pairs: Sequence[Pair], classes: Sequence[str]) -> Tensor:
    """(N,) int64 places of the pairs' classes, -1 without one."""
    return torch.tensor([classes.index(pair.label) if pair.label else -1 for pair in pairs])


def _emoji(files: dict[str, bytes]) -> Iterator[Pair]:
    sheet, cells = picture(io.BytesIO(files["32.png"])), {}
    for emoji in json.loads(files["emoji.json"]):
        for tone in (emoji, *emoji.get("skin_variations", {}).values()):
            cells[_code(tone["unified"])] = tone["sheet_x"], tone["sheet_y"], emoji["subcategory"]
    for emoji in json.loads(files["data.json"]):
        for tone in (emoji, *emoji.get("skins", [])):
            if (cell := cells.get(_code(tone["hexcode"]))) is not None:
                *place, group = cell
                left, top = (1 + (SIZE + 2) * number for number in place)  # cells have a margin of one pixel
                image = to_tensor(sheet.crop((left, top, left + SIZE, top + SIZE)))
                caption = " ".join((tone["label"], *emoji.get("tags", [])))
                yield Pair(image, caption, _concept(emoji["hexcode"]), variant=tone is not emoji, label=group)


def _code(code: str) -> str:
    """Without the character that asks for a picture."""
    return code.replace("-FE0F", "")


def _concept(code: str) -> str:
    """Without skin tone, direction, sex and age: all people become adults, and a mere man or woman the same person."""
    code = re.sub(r"-1F3F[B-F]|-200D-(2640|2642|27A1)", "", _code(code))
    return re.sub(r"1F46[6789]|1F9D[12]", "1F9D1", code)


def _table(path: Path) -> Iterator[Pair]:
    try:
        with open_text(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from None
    for row in rows:
        if not row.get("image") or not row.get("caption"):
            raise DataError(f"{path} must have columns image and caption in every row, got {row}")
    images = torch.empty(len(rows), 3, SIZE, SIZE, dtype=torch.uint8)
    decode([path.parent / row["image"] for row in rows], images, Image.Image.resize)
    for row, image in zip(rows, images, strict=True):
        yield Pair(image, row["caption"], row["caption"].lower(), label=row.get("label") or "")


def _pixels(pair: Pair) -> bytes:
    return pair.image.numpy().tobytes()
