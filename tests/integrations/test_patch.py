"""Classes and functions in the place of a peer's: a made-up one here, real ones in the other files."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastssl

MODULES = {
    "__init__": "__version__ = '1.5.2'\nfrom madeup_peer.losses import Loss, ratio",
    "losses": """
class Base:
    def value(self):
        return "theirs"

class Loss(Base):
    def __init__(self, scale=2):
        super(Loss, self).__init__()
        self.scale = scale

    @staticmethod
    def kind():
        return "static"

def ratio(x):
    return x / 2

def twice_ratio(x):
    return 2 * ratio(x)
""",
    "late": "from madeup_peer.losses import Loss as Criterion, ratio",
}


class Loss:
    def value(self):
        return "ours"


def ratio(x):
    return x / 3


def kind():
    return "ours"


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A package that is not in fastssl.integrations' folder, with a table as those have."""
    (tmp_path / "madeup_peer").mkdir()
    for name, source in MODULES.items():
        (tmp_path / "madeup_peer" / f"{name}.py").write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    integration = ModuleType("fastssl.integrations.madeup_peer")
    integration.VERSIONS = "1.5", "1.7"
    integration.REPLACES = {
        "madeup_peer.losses.Loss": Loss,
        "madeup_peer.losses.ratio": ratio,
        "madeup_peer.losses.Base.value": lambda self: "patched",
    }
    monkeypatch.setitem(sys.modules, integration.__name__, integration)
    monkeypatch.setattr(sys.modules["fastssl.patch"], "PEERS", ("lightly", "madeup_peer"))
    yield importlib.import_module("madeup_peer")
    for name in [name for name in sys.modules if name.split(".")[0] == "madeup_peer"]:
        del sys.modules[name]
    assert not sys.modules["fastssl.patch"]._in_force


def _names(package: str) -> dict[str, dict]:
    return {
        name: vars(module).copy()
        for name, module in sys.modules.copy().items()
        if name.split(".")[0] == package and isinstance(module, ModuleType)
    }


def test_patch_replaces_everywhere_and_undoes_exactly(peer):
    before, base, init = _names("madeup_peer"), vars(peer.Loss.__base__).copy(), vars(peer.Loss).copy()
    Theirs, their_ratio = peer.Loss, peer.ratio
    replaced = fastssl.patch("madeup_peer")
    assert dict(replaced) == {
        "madeup_peer.losses.Loss": Theirs,
        "madeup_peer.losses.ratio": their_ratio,
        "madeup_peer.losses.Base.value": base["value"],
    }
    assert peer.Loss is peer.losses.Loss is Loss and peer.ratio is peer.losses.ratio is ratio
    assert peer.losses.twice_ratio(3) == 2  # the peer's own code takes ours
    late = importlib.import_module("madeup_peer.late")
    assert late.Criterion is Loss
    # Whoever holds the peer's class already has one that works: its __init__ names itself.
    assert Theirs(scale=3).scale == 3 and Theirs().value() == "patched"

    replaced.undo()
    assert _names("madeup_peer").keys() - before.keys() == {"madeup_peer.late"}
    assert late.Criterion is Theirs and late.ratio is their_ratio
    for name, names in before.items():
        assert vars(sys.modules[name]) == ({**names, "late": late} if name == "madeup_peer" else names)
    assert vars(Theirs.__base__) == base and vars(Theirs) == init
    replaced.undo()  # nothing more
    with pytest.raises(RuntimeError, match="has been undone"):
        replaced.__enter__()


def test_patch_is_a_context_manager(peer):
    Theirs = peer.Loss
    with pytest.raises(ZeroDivisionError), fastssl.patch("madeup-peer") as replaced:
        assert replaced["madeup_peer.losses.Loss"] is Theirs and peer.Loss is Loss
        raise ZeroDivisionError
    assert peer.Loss is Theirs


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_patched_until_the_last_is_undone(order, peer):
    Theirs = peer.Loss
    patches = [fastssl.patch("madeup_peer") for _ in range(2)]
    assert dict(patches[0]) == dict(patches[1]) and patches[0] != patches[1]
    patches[order[0]].undo()
    patches[order[0]].undo()  # twice: the other one is still in force
    assert peer.Loss is Loss
    patches[order[1]].undo()
    assert peer.Loss is Theirs


def test_what_was_set_by_hand_stays(peer):
    class Mine:
        pass

    with fastssl.patch("madeup_peer"):
        peer.Loss = Mine
    assert peer.Loss is Mine and peer.losses.Loss is not Loss


def test_patch_refuses(peer, monkeypatch):
    before = _names("madeup_peer")
    for version in ("1.4.9", "1.7.0", "1.7rc1", "2.0", "unknown"):
        monkeypatch.setattr(peer, "__version__", version)
        with pytest.raises(RuntimeError, match=f"madeup_peer must be of a version >=1.5, <1.7, got {version}"):
            fastssl.patch("madeup_peer")
    for version in ("1.5", "1.6.9+cpu", "1.6.0.dev1"):
        monkeypatch.setattr(peer, "__version__", version)
        fastssl.patch("madeup_peer").undo()
    with pytest.raises(ValueError, match="peer must be one of lightly, madeup_peer, got 'torch'"):
        fastssl.patch("torch")
    with pytest.raises(TypeError, match="peer must be a name, got module"):
        fastssl.patch(peer)
    monkeypatch.setattr(peer, "__version__", "1.5.2")
    monkeypatch.setitem(sys.modules["fastssl.integrations.madeup_peer"].REPLACES, "madeup_peer.losses.Gone", Loss)
    with pytest.raises(AttributeError, match="Gone"):
        fastssl.patch("madeup_peer")
    assert _names("madeup_peer") == before
    for name in before:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="madeup_peer must be installed to be patched, and is not"):
        fastssl.patch("madeup_peer")


def test_lightly(lightly):
    """Every name of the table, in a real package, and back."""
    before = _names("lightly")
    Theirs = lightly.BarlowTwinsLoss
    with fastssl.patch("lightly") as replaced:
        integration = importlib.import_module("fastssl.integrations.lightly")
        assert list(replaced) == list(integration.REPLACES)
        for name, replacement in integration.REPLACES.items():
            module, _, attribute = name.rpartition(".")
            assert getattr(sys.modules[module], attribute) is replacement
            if module.startswith("lightly.loss."):
                assert getattr(lightly, attribute) is replacement
        assert Theirs().lambda_param == 5e-3  # super(BarlowTwinsLoss, self)
    assert _names("lightly").items() >= before.items()


def test_every_table_has_its_name_in_the_list_and_in_the_documentation():
    folder = Path(importlib.import_module("fastssl.integrations").__file__).parent
    tables = {path.stem for path in folder.glob("*.py") if "\nREPLACES" in path.read_text()}
    peers = sys.modules["fastssl.patch"].PEERS
    assert set(peers) == tables and list(peers) == sorted(peers)
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    rows = re.findall(r"^\| (\S+)(?: \(`(\w+)`\))? \|", page, re.MULTILINE)
    assert set(peers) <= {(package or name).replace("-", "_") for name, package in rows}
