"""Every operation once, against its reference in float64: `python -m fastssl check`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastssl import functional
from fastssl.reference import OPS
from fastssl.reference.accuracy import assert_as_accurate_as_eager, evaluate, returning


def smoke(device: str = "cpu", operations: list[str] | None = None) -> Iterator[tuple[str, int, str]]:
    """Compares the values and gradients of operations with those of their references in float64, on their float32
    samples. New memory is filled with NaN, so that what a kernel does not write is noticed.

    Args:
        device: that of the inputs.
        operations: their names; None: all.

    Yields:
        Of each operation the name, the number of samples that were right, and what is wrong with the next; "" where
        nothing is.
    """
    for name in OPS if operations is None else operations:
        spec, passed, wrong = OPS[name], 0, ""
        function = returning(spec, getattr(functional, name))
        for sample in spec.samples(torch.float32, device):
            try:
                with _poisoned_memory(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert_as_accurate_as_eager(spec, sample, evaluate(function, sample))
            except Exception as error:
                wrong = f"{sample.label}: {type(error).__name__}: {' '.join(str(error).split())}"
                break
            passed += 1
        yield name, passed, wrong


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
