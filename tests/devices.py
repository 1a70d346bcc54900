"""Where the tests run: on the CPU, and on a GPU where there is one.

FASTSSL_TEST_DEVICES names other devices; "cpu,cpu:0" tries the tests for GPUs on a machine without one.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICES = tuple(os.environ.get("FASTSSL_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(","))


def device_param(device: str, *values: Any, id: str = "", marks: Any = ()) -> Any:
    """A parameter of a test on that device, whose id does not name the CPU."""
    on_cpu = device == "cpu"
    name = "-".join(filter(None, [id, "" if on_cpu and id else device]))
    return pytest.param(*(values or (device,)), id=name, marks=[*marks, *([] if on_cpu else [pytest.mark.gpu])])


on_every_device = pytest.mark.parametrize("device", [device_param(device) for device in DEVICES])
