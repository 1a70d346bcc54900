"""What is shipped: the sdist, the wheel built from it, the editable install, and installs that lack something."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOT_SOURCES = (
    ".git",
    ".venv",
    "build",
    "dist",
    "results",
    "*.egg-info",
    "*.so",
    "_build.json",
    "__pycache__",
    ".*_cache",
)

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in the source tree"),
    pytest.mark.xdist_group("packaging"),  # which builds once
]
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Environment:
    """A virtual environment, which sees the packages of this one once they are shared."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory, with_pip=True, symlinks=True)
        self.directory, self.python = directory, directory / "bin" / "python"
        (self.site_packages,) = directory.glob("lib/python*/site-packages")

    def share(self) -> Environment:
        (self.site_packages / "host.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
        return self

    def install(self, *arguments: str | Path, **environment: str) -> None:
        environment = {"FASTSSL_BUILD": "", "CUDACXX": "none", **environment}
        command = (self.python, "-m", "pip", "install", "--no-deps", "--ignore-installed", *arguments)
        run(*command, env={**os.environ, **environment}, cwd=self.directory)

    def __call__(self, *arguments: str) -> str:
        return run(self.python, *arguments, cwd=self.directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of the source tree: what earlier builds left behind must not mend a manifest that is wrong."""
    copy = tmp_path_factory.mktemp("source") / "fastssl"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES)))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", directory, source)
    (path,) = directory.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", directory, sdist,
        env={**os.environ, "FASTSSL_BUILD": "require", "CUDACXX": "none"},  # nvcc takes minutes
    )  # fmt: skip
    (path,) = directory.iterdir()
    return path


def test_sdist_holds_the_sources_and_nothing_built(source, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = [p for top in ("csrc", "kernels", "fastssl") for p in (source / top).rglob("*") if p.is_file()]
    wanted += [source / name for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")]
    assert names >= {str(p.relative_to(source)) for p in wanted}
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_build.json"))]


@needs_compiler
def test_wheel_holds_one_package(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastssl", "fastssl_kernels"}
    for package, folder in (("fastssl", "fastssl"), ("fastssl/kernels", "kernels")):
        files = {f"{package}/{p.relative_to(source / folder)}" for p in (source / folder).rglob("*.py")}
        assert files and files <= names
    assert f"fastssl/_C-torch{'.'.join(torch.__version__.split('.')[:2])}.so" in names
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu"))]


@needs_compiler
def test_wheel_from_sdist_installs_and_runs(wheel, tmp_path):
    environment = Environment(tmp_path / "venv").share()
    environment.install(wheel)
    report = environment("-m", "fastssl")
    assert str(environment.site_packages) in report
    assert "loaded, built by" in report
    assert "CPU C++" in report
    environment("-c", "import fastssl.kernels as kernels; assert kernels.__file__.startswith(__import__('sys').prefix)")
    assert "No module named 'kernels'" in environment("-c", "try: import kernels\nexcept ImportError as e: print(e)")


def test_editable_install_without_a_compiler_says_why_and_works(source, tmp_path):
    environment = Environment(tmp_path / "venv").share()
    environment.install("--editable", source, CXX="/nonexistent/c++")
    report = environment("-m", "fastssl")
    assert str(source) in report
    assert "not loaded: cmake failed:" in report and "/nonexistent/c++" in report
    assert "apt install g++" in report
    code = """
import torch, fastssl, fastssl.kernels
from fastssl.functional import nt_xent
print(fastssl.kernels.__file__)
z1, z2 = torch.randn(2, 33, 16, requires_grad=True)
loss = nt_xent(z1, z2)
loss.backward()
with fastssl.use_backend("reference"):
    torch.testing.assert_close(loss, nt_xent(z1, z2))
"""
    assert environment("-c", code).strip() == str(source / "kernels" / "__init__.py")


def test_install_before_torch_says_why_or_fails_where_the_build_is_required(sdist, tmp_path):
    environment = Environment(tmp_path / "venv")
    with pytest.raises(AssertionError, match="BuildError: no torch to build against"):
        environment.install(sdist, FASTSSL_BUILD="require")
    environment.install(sdist)
    report = environment.share()("-m", "fastssl")
    assert "not loaded: no torch to build against when fastssl was installed" in report
    assert "CPU portable PyTorch" in report


@pytest.fixture
def setup(monkeypatch) -> dict[str, Any]:
    """What setup.py defines."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_a_wheel_requires_the_versions_of_torch_that_it_was_built_for(setup, tmp_path):
    def required(*versions: str) -> str:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            for version in versions:
                (package := Path(folder, version, "torch")).mkdir(parents=True)
                (package / "version.py").write_text(f"__all__ = []\n__version__ = '{version}'\ndebug = False\n")
            return setup["requirement"](f"{folder}/*/torch")

    assert required("2.13.0+cpu") == "torch>=2.13,<2.14"
    assert required("2.10.0", "2.11.0+cpu", "2.14.0a0+git1") == "torch>=2.10,<2.15"
    assert setup["requirement"]("") == "torch>=2.10"
    with pytest.raises(setup["BuildError"], match="torch must be 2.10 or newer, got 2.9.1"):
        required("2.9.1", "2.11.0")
    with pytest.raises(setup["BuildError"], match=r"FASTSSL_TORCH must match torch packages, got .*/\*/torch"):
        required()


def test_the_readme_of_an_index_links_to_the_source(setup):
    url = "https://forge.example/fastssl"
    text = setup["description"](f'[project.urls]\nSource = "{url}/"\n')
    links = re.findall(r"(!?)\[[^]]*\]\((.*?)\)", text)
    assert {image for image, _ in links} == {"", "!"}
    for image, link in links:
        folder, path = link.rsplit("/HEAD/", 1)
        assert folder == f"{url}/{'raw' if image else 'blob'}"
        assert (ROOT / path).is_file()
    assert setup["description"]("") == (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "wanted, architectures",
    [("", ""), ("9.0", "90-real"), ("8.0 9.0a+PTX", "80-real;90a"), ("8.6;12.0", "86-real;120-real")],
)
def test_cuda_architectures_are_those_that_torch_would_take(wanted, architectures, setup):
    assert setup["cuda_architectures"](wanted) == architectures
    with pytest.raises(setup["BuildError"], match="TORCH_CUDA_ARCH_LIST must have versions .*got Hopper"):
        setup["cuda_architectures"](f"{wanted} Hopper")
