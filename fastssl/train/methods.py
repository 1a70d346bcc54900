"""Every method, by the name of its file, which is also that of its command."""

from __future__ import annotations

import inspect
from typing import Any

from fastssl.train.barlow_twins import BarlowTwins
from fastssl.train.method import Method
from fastssl.train.simclr import SimCLR
from fastssl.train.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "barlow_twins": BarlowTwins,
    "simclr": SimCLR,
    "vicreg": VICReg,
}


def create(name: str, total_steps: int, **options: Any) -> Method:
    """The method of that name for a run of `total_steps`, which it is told if its constructor asks for them."""
    method = METHODS[name]
    if "total_steps" in inspect.signature(method).parameters:
        options["total_steps"] = total_steps
    return method(**options)
