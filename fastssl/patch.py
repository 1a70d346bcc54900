"""Puts this package's classes and functions in the place of another library's, in a running process."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType, TracebackType
from typing import Any, NamedTuple

# Those whose file in integrations/ has a table of replacements.
PEERS = (
    "dinov2",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "sentence_transformers",
    "timm",
    "transformers",
)


def patch(peer: str) -> Patch:
    """Put our classes and functions in the place of another library's, in this process, until it is undone:

        fastssl.patch("lightly")                  # from here on
        with fastssl.patch("lightly"):            # or in a block
            ...

    What replaces what is in `fastssl.integrations.<peer>`: its table `REPLACES`, and the versions of the peer that it
    was tested with. The names are replaced where the peer defines them, and in all of its modules that hold the same
    object, such as `lightly.loss` and what was imported before. Not reached: a name that your own module has already
    imported (`from lightly.loss import NTXentLoss` above the call keeps the peer's class, which goes on working),
    objects and subclasses that exist, and other processes. So patch first, then import.

    A peer may be patched while it is patched: it stays so until every one of them is undone, in any order. What has
    been set by hand in between stays.

    Args:
        peer: the name by which it is imported; one of those that docs/integrations.md lists.

    Returns:
        A mapping of dotted names to the objects that were replaced, with a method `undo()`; a context manager too.

    Raises:
        TypeError, ValueError: if there is no such peer.
        ModuleNotFoundError: if the peer is not installed.
        RuntimeError: if its version is not one of those that were tested; nothing is changed.
    """
    if not isinstance(peer, str):
        raise TypeError(f"peer must be a name, got {type(peer).__name__}")
    package = peer.replace("-", "_")
    if package not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
    with _lock:
        _import(package)
        integration = importlib.import_module(f"fastssl.integrations.{package}")
        _check_version(package, *integration.VERSIONS)
        if package not in _in_force:
            _in_force[package] = _Replaced(package, integration.REPLACES)
        return Patch(_in_force[package])


class Patch(Mapping[str, Any]):
    """The originals of what `patch` has replaced, by their dotted names."""

    def __init__(self, replaced: _Replaced) -> None:
        self._replaced = replaced
        replaced.patches.append(self)

    def undo(self) -> None:
        """Put the originals back, unless another patch of this peer is in force. Once undone, it does nothing."""
        with _lock:
            patches = self._replaced.patches
            if self in patches:
                patches.remove(self)
                if not patches:
                    del _in_force[self._replaced.package]
                    self._replaced.put_back()

    def __enter__(self) -> Patch:
        if self not in self._replaced.patches:
            raise RuntimeError("this patch has been undone, fastssl.patch makes another one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __getitem__(self, name: str) -> Any:
        return self._replaced.originals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._replaced.originals)

    def __len__(self) -> int:
        return len(self._replaced.originals)

    def __eq__(self, other: object) -> bool:  # not as mappings are: each is undone by itself
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<patch of {self._replaced.package}: {', '.join(self)}>"


class _Place(NamedTuple):
    owner: Any
    name: str
    original: Any
    replacement: Any


class _Replaced:
    """What is replaced in a package, and where.

    Attributes:
        patches: those that are in force.
        originals: by their dotted names.
    """

    def __init__(self, package: str, table: Mapping[str, Any]) -> None:
        self.package, self.patches = package, list[Patch]()
        self.originals, self._places = dict[str, Any](), list[_Place]()
        pairs = []
        for dotted, replacement in table.items():
            path, _, name = dotted.rpartition(".")
            owner = pkgutil.resolve_name(path)
            if isinstance(owner, type):  # as it lies there: a staticmethod, too
                self.originals[dotted] = original = vars(owner)[name]
                self._places.append(_Place(owner, name, original, replacement))
            else:
                self.originals[dotted] = original = getattr(owner, name)
                pairs.append((original, replacement))
                self._places += _own_name_kept(original)
        self._places += _held(package, pairs)
        for owner, name, _, replacement in self._places:
            setattr(owner, name, replacement)

    def put_back(self) -> None:
        for owner, name, original, replacement in self._places:
            if vars(owner).get(name) is replacement:
                setattr(owner, name, original)
        # Modules that were imported since have the replacements.
        back = [(replacement, original) for _, _, original, replacement in self._places]
        for owner, name, _, original in _held(self.package, back):
            setattr(owner, name, original)


_lock = threading.RLock()
_in_force: dict[str, _Replaced] = {}


def _held(package: str, pairs: list[tuple[Any, Any]]) -> list[_Place]:
    """Where the package's modules hold the first of a pair."""
    known = {id(pair[0]): pair for pair in reversed(pairs)}
    inside = f"{package}."
    modules = [module for name, module in sys.modules.copy().items() if f"{name}.".startswith(inside)]
    return [
        _Place(module, name, *known[id(value)])
        for module in modules
        if isinstance(module, ModuleType)
        for name, value in vars(module).copy().items()
        if id(value) in known
    ]


def _own_name_kept(original: Any) -> Iterator[_Place]:
    """Methods that name their class, as in super(BarlowTwinsLoss, self), would find the replacement: those of a class
    that somebody holds already get a copy that finds the class itself."""
    if isinstance(original, type):
        name = original.__name__
        for method_name, method in vars(original).items():
            if isinstance(method, FunctionType) and name in method.__code__.co_names:
                names = {**method.__globals__, name: original}
                copy = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
                copy.__kwdefaults__, copy.__doc__ = method.__kwdefaults__, method.__doc__
                copy.__dict__.update(method.__dict__)
                yield _Place(original, method_name, method, copy)


def _import(package: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"{package} must be installed to be patched, and is not", name=package) from None


def _check_version(package: str, first: str, after: str) -> None:
    """Versions from the first one, and before the other one, were tested."""
    version = sys.modules[package].__version__
    if not _numbers(first) <= _numbers(version) < _numbers(after):
        raise RuntimeError(f"{package} must be of a version >={first}, <{after}, got {version}")


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release[0].split(".")) if release else ()
