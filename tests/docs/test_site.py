"""The documentation as a site: it has every page and every public name, and needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fastssl
from fastssl import functional, nn, optim

for package in ("latex2mathml", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason=f'the site needs {package}: pip install ".[docs]"')

ROOT = Path(__file__).parents[2]
PUBLIC = {
    *(f"fastssl.functional.{name}" for name in functional.__all__),
    *(f"fastssl.nn.{name}" for name in nn.__all__),
    *(f"fastssl.{name}" for name in fastssl.__all__ if callable(getattr(fastssl, name))),
    f"fastssl.optim.{optim.AdamW.__name__}",
}
# What a browser fetches when it shows a page.
FETCHED = r'<(?:script|img|iframe)\b[^>]*\bsrc="(\w+:[^"]*)|<link\b[^>]*\bhref="(\w+:[^"]*)|url\(["\']?(https?:[^)]*)'


def test_every_page_is_in_the_navigation():
    from mkdocs.config import load_config

    def pages(item):
        if isinstance(item, str):
            return [item]
        return [page for part in (item.values() if isinstance(item, dict) else item) for page in pages(part)]

    listed = pages(load_config(str(ROOT / "mkdocs.yml")).nav)
    written = [page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")]
    assert sorted(listed) == sorted([*written, "CONTRIBUTING.md", "CHANGELOG.md"])


def test_every_public_name_is_documented_once():
    listed = []
    for page in ROOT.glob("docs/**/*.md"):
        names = page.read_text().partition("\n## API\n")[2]
        for name, source in re.findall(r"^- \[`(fastssl\.[\w.]+)`\]\(([^)]+)\)$", names, re.MULTILINE):
            defined = rf"^(?:def|class) {name.rpartition('.')[2]}\b"
            assert re.search(defined, (page.parent / source).read_text(), re.MULTILINE), f"{page}: {source}"
            listed.append(name)
    assert sorted(name for name, times in Counter(listed).items() if times > 1) == []
    assert sorted(PUBLIC - set(listed)) == []


def test_the_site_is_built_and_fetches_nothing(tmp_path):
    """Links, anchors and docstrings are mkdocs's to check: a warning is an error."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0 and not built.stdout, built.stdout
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        assert re.findall(FETCHED, text) == [], page
        for target in re.findall(r'<a\b[^>]*\bhref="([^":]+)"', text):
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists() and (not anchor or anchor in anchors[other]), f"{page.name}: {target}"
        # `<a, b>` in a docstring is no code there, and no element either.
        assert set(re.findall(r"<([a-z]\w*),", text)) == set(), page
