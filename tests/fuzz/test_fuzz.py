"""A sample of the bad and extreme inputs of `python -m tests.fuzz`, and the valid calls."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastssl import functional, nn
from tests.fuzz.__main__ import main
from tests.fuzz.calls import CALLS
from tests.fuzz.verdict import Finding, cases, difference, judge, results_of

SAMPLE = [case for case in list(cases())[::37] if case.label != "2**31"]  # which asks for the machine's memory


def test_everything_public_is_called():
    names = {call.name for call in CALLS}
    assert {*functional.__all__, *nn.__all__} <= names
    for call in CALLS:
        parameters = [name for name in inspect.signature(call.signature).parameters if name != "self"]
        assert sorted(call.arguments()) == sorted(parameters), call.name


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("call", [call for call in CALLS if not call.random], ids=lambda call: call.name)
def test_valid_calls_are_right_on_every_backend(call, backend):
    """Forward and backward, every argument given."""
    assert not difference(results_of(call, call.arguments(), "auto"), results_of(call, call.arguments(), backend))


def test_sample():
    """Bad arguments are named, with nothing of PyTorch's internals; what is accepted is of a type that it may have,
    and gives the right numbers."""
    verdicts = {str(case): judge(case) for case in SAMPLE}
    assert len(verdicts) > 1000
    assert not {case: verdict for case, verdict in verdicts.items() if isinstance(verdict, Finding)}


@pytest.mark.parametrize("call", [c for c in CALLS if c.name in functional.__all__], ids=lambda call: call.name)
def test_dtypes_that_do_not_fit(call):
    """Complex, integer and other tensors in place of floating-point ones: the error names the argument and the dtype.
    A scalar may be an integer, and restore_tokens converts its embeddings."""
    for argument, value in call.arguments().items():
        tensors = [value] if isinstance(value, torch.Tensor) else value if isinstance(value, list) else []
        for i, x in enumerate(tensors):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                continue
            converted = (x.dim() == 0 and argument != "steps") or argument in ("mask_token", "pos_embed", "fill")
            others = () if converted else (torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)
            for dtype in (torch.complex64, *others):
                wrong = x.detach().to(dtype)
                wrong = [*tensors[:i], wrong, *tensors[i + 1 :]] if isinstance(value, list) else wrong
                with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b.* got .*{dtype}(\W|$)"):
                    call.run(**{**call.arguments(), argument: wrong})


def test_findings_are_told_by_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz", "--only", "use_backend(name=Tensor)"])
    assert main() == 0
    monkeypatch.setattr("tests.fuzz.__main__.run", lambda first, last, *_: {first: ("number", "1, of the reference 2")})
    assert main() == 1
    assert "use_backend(name=) 1x [Tensor]: 1, of the reference 2" in capsys.readouterr().out


def test_tensors_whose_storage_was_freed():
    """As FSDP frees that of parameters: reading them would end the process."""
    freed = [case for case in cases() if case.label.endswith("tensor, without storage")]
    verdicts = {str(case): judge(case) for case in freed}
    assert len(verdicts) > 100
    assert not {case: verdict for case, verdict in verdicts.items() if isinstance(verdict, Finding)}
