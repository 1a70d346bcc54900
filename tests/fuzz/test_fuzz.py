"""A sample of the bad and extreme inputs of `python -m tests.fuzz`, and the valid calls."""

from __future__ import annotations

import pytest

from fastssl import functional
from tests.fuzz.calls import CALLS
from tests.fuzz.verdict import Finding, cases, difference, judge, results_of

SAMPLE = [case for case in list(cases())[::37] if case.label != "2**31"]  # which asks for the machine's memory


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("call", [call for call in CALLS if not call.random], ids=lambda call: call.name)
def test_valid_calls_are_right_on_every_backend(call, backend):
    """Forward and backward, every argument given."""
    assert not difference(results_of(call, call.arguments(), "auto"), results_of(call, call.arguments(), backend))


def test_functions():
    """Bad arguments are named; nothing of PyTorch's internals, and nothing of a type that the argument has not."""
    found = []
    for case in SAMPLE:
        verdict = judge(case) if hasattr(functional, case.call.name) else ""
        if isinstance(verdict, Finding) and verdict.kind not in ("number", "reference"):
            found.append(f"{case}: {verdict.kind}, {verdict.text}")
    assert not found, "\n".join(found)


def test_tensors_whose_storage_was_freed():
    """As FSDP frees that of parameters: reading them would end the process."""
    freed = [case for case in cases() if case.label.endswith("tensor, without storage")]
    verdicts = {str(case): judge(case) for case in freed if hasattr(functional, case.call.name)}
    assert len(verdicts) > 50
    assert not {case: verdict for case, verdict in verdicts.items() if isinstance(verdict, Finding)}
