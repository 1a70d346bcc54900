"""Where the tests run: on the CPU, and on a GPU where there is one.

FASTSSL_TEST_DEVICES names other devices; "cpu,cpu:0" tries the tests for GPUs on a machine without one.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

DEVICES = tuple(os.environ.get("FASTSSL_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(","))


def device_param(device: str, *values: Any, id: str = "", marks: Any = ()) -> Any:
    """A parameter of a test on that device, whose id does not name the CPU."""
    on_cpu = device == "cpu"
    name = "-".join(filter(None, [id, "" if on_cpu and id else device]))
    return pytest.param(*(values or (device,)), id=name, marks=[*marks, *([] if on_cpu else [pytest.mark.gpu])])


class MadeOn(TorchFunctionMode):
    """Tensors are made on that device by default, those that are drawn with a generator after they were drawn on its
    own: the same numbers everywhere."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __enter__(self) -> MadeOn:
        self.device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.device.__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = function in (torch.rand, torch.randint, torch.randn, torch.randperm)
        if not drawn or kwargs.get("generator") is None or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        return function(*args, **kwargs, device=kwargs["generator"].device).to(self.device)


on_every_device = pytest.mark.parametrize("device", [device_param(device) for device in DEVICES])
