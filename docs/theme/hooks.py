"""What mkdocs does to the Markdown of docs/, which is written to be read as it is on a forge, too.

- Under the heading API, a list item that is nothing but a link from a public name to its source becomes the
  documentation of that name, from its docstring.
- The name of something public, in code, becomes a link to that.
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
from mkdocs.utils import get_relative_url

OUTSIDE = "CONTRIBUTING.md", "CHANGELOG.md"
_NAME = re.compile(r"^- \[`(fastssl\.[\w.]+)`\]\((?:\.\./)+([\w/]+)\.py\)$", re.MULTILINE)
_MATHEMATICS = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_QUOTATION = re.compile(r"^```(\w+) +(\S+)$", re.MULTILINE)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:]+)\)")


# A name in code, with or without its module; and what has links of its own, or none.
_MENTION = re.compile(r"<code>((?:fastssl\.)?(?:(?:functional|nn|optim)\.)?(\w+))</code>")
_ELSEWHERE = re.compile(r"(<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>)", re.DOTALL)

_places: dict[str, tuple[str, str]] = {}  # of a public name, without its module: the page and the anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(root / name).read_text()))
    for file in files.documentation_pages():
        for match in _NAME.finditer(_names(file.content_string)):
            _places[match[1].rpartition(".")[2]] = file.src_uri, _identifier(match)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    inside = page.file.src_uri not in OUTSIDE
    names = _names(markdown)
    markdown = markdown.removesuffix(names) + _NAME.sub(_documentation, names)
    markdown = _MATHEMATICS.sub(lambda match: f'<div class="math">{convert(match[1], display="block")}</div>', markdown)
    markdown = _QUOTATION.sub(r'```\1 title="\2"', markdown)
    return _LINK.sub(lambda match: _link(*match.groups(), folder if inside else None), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def linked(match: re.Match) -> str:
        if match[2] not in _places:
            return match[0]
        source, anchor = _places[match[2]]
        url = files.get_file_from_path(source).page.url if source != page.file.src_uri else ""
        return f'<a href="{get_relative_url(url, page.url) if url else ""}#{anchor}">{match[0]}</a>'

    parts = _ELSEWHERE.split(html)
    return "".join(part if _ELSEWHERE.fullmatch(part) else _MENTION.sub(linked, part) for part in parts)


def _names(markdown: str) -> str:
    """What is under the heading API, which is a page's last."""
    return markdown.partition("\n## API\n")[2]


def _identifier(match: re.Match) -> str:
    """Of what is defined: a function may have the name of its module."""
    name, source = match.groups()
    return f"{source.removesuffix('/__init__').replace('/', '.')}.{name.rpartition('.')[2]}"


def _documentation(match: re.Match) -> str:
    short = match[1].rpartition(".")[2]
    return f"::: {_identifier(match)}\n    options:\n      heading: {match[1]}\n      toc_label: {short}"


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
