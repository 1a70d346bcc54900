"""That the tests for a GPU make their tensors there."""

from __future__ import annotations

import pytest
import torch

from tests.devices import MadeOn, device_param
from tests.inputs import normal, seeded


def test_tensors_are_made_on_the_device_from_the_cpus_numbers():
    expected = normal(3, 4)
    with MadeOn("meta"):
        assert torch.zeros(2).is_meta and torch.nn.Linear(2, 3).weight.is_meta
        assert normal(3, 4).is_meta and torch.randperm(3, generator=seeded()).is_meta
        assert not torch.zeros(2, device="cpu").is_meta
    with MadeOn("cpu:0"):
        assert torch.equal(normal(3, 4), expected)
    assert not torch.zeros(2).is_meta


@pytest.mark.parametrize("device, id, marks", [("cpu", "x", []), ("cuda", "x-cuda", ["gpu"])])
def test_parameters_of_a_gpu_say_so(device, id, marks):
    param = device_param(device, 1, 2, id="x")
    assert param.id == id and param.values == (1, 2) and [mark.name for mark in param.marks] == marks
