"""What README and docs/ show: every block of code runs, is quoted from the source, or is a command that parses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fastssl

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benchmarks.gpu import __main__ as gpu
from benchmarks.ops import __main__ as ops
from benchmarks.ops import figures
from benchmarks.twins import __main__ as twins
from fastssl.train import __main__ as trainer

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
OTHERS = ("git", "pip", "pytest", "python -m fastssl", "python -m pytest", "python -m venv", "source")  # not parsed
TARGETS = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


class Block(NamedTuple):
    """Fenced code. `info` is what follows its language."""

    place: str
    language: str
    info: str
    text: str


def _blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*) *(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(f"{page.relative_to(ROOT)}:{line}", *match.groups()))
        assert text.count("```") == 2 * sum(b.place.startswith(f"{page.relative_to(ROOT)}:") for b in found), page
    return found


BLOCKS = _blocks()


def _of(language: str, quoted: bool = False) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and bool(block.info) == quoted]


def _params(blocks: list[Block]):
    return pytest.mark.parametrize("block", blocks, ids=[block.place for block in blocks])


def test_every_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"python", "cpp", "bash", "text", "math"}
    assert len(_of("python")) >= 8 and len(_of("bash")) >= 5


@_params(_of("python"))
def test_python_runs(block, request):
    if "from lightly" in block.text:
        request.getfixturevalue("lightly")
    try:
        exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
    finally:  # a block may leave a library patched, and other tests compare with it
        for replaced in list(fastssl.patch.__globals__["_in_force"].values()):
            for patch in list(replaced.patches):
                patch.undo()


@_params(_of("python", quoted=True) + _of("cpp", quoted=True))
def test_a_quotation_is_what_the_file_says(block):
    """`...` alone on a line leaves something out."""
    source, position = (ROOT / block.info).read_text(), 0
    for part in re.split(r"^ *(?:# |// )?\.\.\.\n", block.text, flags=re.MULTILINE):
        position = source.find(part, position)
        assert position >= 0, f"{block.place}: not in {block.info}:\n{part}"
        position += len(part)


def _inline() -> list[Block]:
    """Commands within sentences."""
    pattern = r"`((?:\w+=\S+ )?python -m (?:fastssl\.train|benchmarks\.[\w.]+) [^`]*)`"
    return [
        Block(f"{page.relative_to(ROOT)}: {command}", "bash", "", command)
        for page in PAGES
        for command in re.findall(pattern, re.sub(r"\s+", " ", re.sub(r"```[\s\S]*?```", "", page.read_text())))
    ]


def _check_commands(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in filter(None, map(str.strip, block.text.replace("\\\n", "").splitlines())):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["torchrun"]:
            words = ["python", *words[words.index("-m") :]]
        program, arguments = " ".join(words[:3]), words[3:]
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        if words[:1] == ["make"]:
            assert words[1] in TARGETS, line
        elif program == "python -m fastssl.train":
            trainer._parser().parse_args(arguments)
        elif program == "python -m benchmarks.gpu":
            gpu._arguments(arguments)
        elif program == "python -m benchmarks.ops":
            ops._arguments(arguments)
        elif program == "python -m benchmarks.ops.figures":
            figures._arguments(arguments)
        elif program == "python -m benchmarks.twins":
            twins._arguments()
        else:
            assert " ".join(words).startswith(OTHERS), f"{block.place}: the test does not know {line!r}"


@_params(_of("bash") + _inline())
def test_commands_parse(block, monkeypatch):
    _check_commands(block, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "benchmarks.gpu mugs",
        "benchmarks.ops dino",
        "benchmarks.twins mugs",
        "fastssl.train mugs",
        "fastssl.train simclr --batches 3",
    ],
)
def test_a_wrong_command_is_noticed(command, monkeypatch):
    with pytest.raises(SystemExit):
        _check_commands(Block("here", "bash", "", f"python -m {command}\n"), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", other.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_function_and_module_is_listed():
    from fastssl import functional, nn

    page = (ROOT / "docs" / "replaces.md").read_text()
    assert [name for name in (*functional.__all__, *nn.__all__) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("picture", list(ROOT.glob("docs/*.svg")), ids=lambda path: path.name)
def test_a_picture_is_drawn(picture, tmp_path):
    subprocess.run([sys.executable, picture.with_suffix(".py"), tmp_path / "picture.svg"], check=True)
    assert "</svg>" in (tmp_path / "picture.svg").read_text()


def test_every_family_has_its_picture(tmp_path):
    subprocess.run([sys.executable, ROOT / "docs" / "pictures" / "draw.py", tmp_path], check=True)
    drawn = {path.stem for path in tmp_path.glob("*.svg") if "</svg>" in path.read_text()}
    assert drawn == {path.stem for path in ROOT.glob("docs/pictures/*.svg")}
    assert drawn == {page.stem for page in ROOT.glob("docs/families/*.md") if f"/{page.stem}.svg)" in page.read_text()}
