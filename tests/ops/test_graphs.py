"""Losses in CUDA graphs: what was captured of both passes is right for the numbers of each replay.

A CPU captures nothing. Where FASTSSL_TEST_DEVICES stands it in for a GPU, the same work is done again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastssl.reference import OPS
from fastssl.reference.samples import TRACED
from tests.accuracy import (
    Results,
    cotangent_for,
    device_of,
    leaves_of,
    map_tensors,
    public,
    tensors_of,
)
from tests.devices import DEVICES, device_param


class Graph:
    """Calls of a function that takes nothing, and returns tensors, captured on the device."""

    def __init__(self, function: Callable[[], Results], device: torch.device) -> None:
        self.function, self.graph = function, None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()  # where kernels are compiled and chosen, which a capture does not allow
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = function()

    def replay(self) -> Results:
        if self.graph is None:
            return self.function()
        self.graph.replay()
        return self.results


@pytest.mark.parametrize(
    "spec, sample",
    [
        device_param(device, spec, sample, id=f"{name}-{sample.label.replace(' ', '_')}")
        for device in DEVICES
        if device != "cpu"
        for name, spec in OPS.items()
        if spec.autocast == "float32" and spec.check is None
        for sample in spec.samples(torch.float32, device)
        if TRACED in sample.tags and leaves_of(sample)
    ],
)
def test_a_captured_loss_follows_its_inputs(spec, sample):
    sample = map_tensors(sample, lambda x: x.detach().clone().requires_grad_(x.requires_grad))
    leaves = leaves_of(sample)
    cotangents = [cotangent_for(x) for x in tensors_of(public(spec)(*sample.args, **sample.kwargs)) if x.requires_grad]

    def both_passes() -> Results:
        outputs = [x for x in tensors_of(public(spec)(*sample.args, **sample.kwargs)) if x.requires_grad]
        return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)

    graph = Graph(both_passes, device_of(sample))
    for factor in (1.0, 0.75):
        with torch.no_grad():
            torch._foreach_mul_(leaves, factor)
        for result, expected in zip(graph.replay(), both_passes(), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
