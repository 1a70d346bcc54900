"""What mkdocs does to the Markdown of docs/, which is written to be read as it is on a forge, too.

- Under the heading API, a list item that is nothing but a link from a public name to its source becomes the
  documentation of that name, from its docstring.
- A block of mathematics becomes MathML, which browsers draw by themselves.
- The file that a block of code is quoted from becomes its title.
- CONTRIBUTING.md and CHANGELOG.md, which lie outside docs/, become pages. Links to other files out there become text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = "CONTRIBUTING.md", "CHANGELOG.md"
_NAME = re.compile(r"^- \[`(fastssl\.[\w.]+)`\]\((?:\.\./)+([\w/]+)\.py\)$", re.MULTILINE)
_MATHEMATICS = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_QUOTATION = re.compile(r"^```(\w+) +(\S+)$", re.MULTILINE)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(root / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    inside = page.file.src_uri not in OUTSIDE
    prose, heading, names = markdown.partition("\n## API\n")
    markdown = prose + heading + _NAME.sub(_documentation, names)
    markdown = _MATHEMATICS.sub(lambda match: f'<div class="math">{convert(match[1], display="block")}</div>', markdown)
    markdown = _QUOTATION.sub(r'```\1 title="\2"', markdown)
    return _LINK.sub(lambda match: _link(*match.groups(), folder if inside else None), markdown)


def _documentation(match: re.Match) -> str:
    """Of a public name, found where it is defined: a function may have the name of its module."""
    name, source = match.groups()
    place = source.removesuffix("/__init__").replace("/", ".")
    short = name.rpartition(".")[2]
    return f"::: {place}.{short}\n    options:\n      heading: {name}\n      toc_label: {short}"


def _link(text: str, target: str, folder: str | None) -> str:
    """Of a page in a folder of docs/, or of one beside docs/."""
    path, mark, anchor = target.partition("#")
    if not path:
        return f"[{text}]({target})"
    where = posixpath.normpath(posixpath.join("docs", folder, path) if folder is not None else path)
    if where.startswith("docs/"):
        where = where.removeprefix("docs/")
    elif where not in OUTSIDE:
        return text
    return f"[{text}]({posixpath.relpath(where, folder or '.')}{mark}{anchor})"
