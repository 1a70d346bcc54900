"""The package's folders use one another in one direction."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastssl

ROOT = Path(fastssl.__file__).parent
KERNELS = Path(find_spec("fastssl.kernels").submodule_search_locations[0])  # a folder elsewhere in a working tree
ROOMS = [  # each uses those before it
    {"_reductions"},
    {"reference", "_norms", "_label_smoothing"},
    {"ops", "kernels"},
    {"_C", "_native", "_arithmetic", "_meter"},
    {"distributed"},
    {"_checks", "_exponential_sums"},
    {"_random"},
    {"functional"},
    {"nn", "grad_cache", "patch", "_smoke"},
    {"optim", "integrations"},
    {"train"},
]


def _room(path: Path) -> str:
    return "kernels" if path.is_relative_to(KERNELS) else path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, str]]:
    """(room, name) of what a file imports from the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastssl":
            _, *parts = node.module.split(".")
            found += [(parts[0] if parts else alias.name, alias.name) for alias in node.names]
    return found


FILES = [path for path in sorted({*ROOT.rglob("*.py"), *KERNELS.rglob("*.py")}) if not _room(path).startswith("__")]


def test_every_folder_has_its_place():
    assert {_room(path) for path in FILES} <= set().union(*ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{_room(path)}/{path.name}")
def test_imports_point_one_way(path):
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    for room, name in _imports(path):
        if room != _room(path) and room in level:
            assert level[room] < level[_room(path)], f"{name} of {room}"
        if _room(path) == "nn" and room == "functional":
            assert not name.startswith("_"), name
