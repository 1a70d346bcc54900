"""What became of a call: a right number, an error that names its argument, or a finding."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fastssl
from tests.fuzz.calls import CALLS, Call, TheirOwn
from tests.fuzz.catalogue import substitutes

SECONDS = 20  # that a call may take
INTERNALS = re.compile(
    r"internal|fastssl::|aten::|has no attribute|Expected a value of type|not implemented for|Could not run|dispatch"
    r"|unsupported operand|file an issue|report a bug|unexpected keyword|object is not|not supported between|cast"
    r"|can't be converted|cannot be converted|argument '|element \d+ of tensors|Expected all tensors|Expected object"
    r"|Unsupported|NYI|storage|_cpp|NestedTensor|SparseCPU|FakeTensor|symbolic|NotImplemented",
    re.IGNORECASE,
)
FUNCTIONS = ("encoders", "loss_fn", "norm_layer", "weight_fn")  # arguments whose errors are their own
ERRORS = (TypeError, ValueError, IndexError)


@dataclass(frozen=True)
class Case:
    call: Call
    argument: str
    label: str
    make: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.call.name}({self.argument}={self.label})"


@dataclass(frozen=True)
class Finding:
    kind: str
    text: str


@dataclass(frozen=True)
class Results:
    outputs: list[Any]
    gradients: list[Tensor | None]  # of the leaves among the arguments


def cases() -> Iterator[Case]:
    for call in CALLS:
        for argument, valid in call.arguments().items():
            for label, make in substitutes(valid):
                if argument.endswith(("iterations", "nlayers")) and label in ("10**6", "2**31", "2**63 - 1"):
                    continue  # which take long, and are right
                if call.name.startswith("sinkhorn") and label in ("10**6", "2**31", "1e-30"):
                    continue  # temperatures at which float32's digits do not do, as is documented
                yield Case(call, argument, label, make)


def judge(case: Case) -> Finding | str:
    """ "result", "refused" or "impossible"; or what is wrong."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            case.make()
    except Exception:  # such a tensor cannot be
        return "impossible"
    try:
        results = _results(case, "auto")
    except TimeoutError:
        return Finding("hang", f"no result after {SECONDS} s")
    except Exception as error:
        return _judge_error(case, error)
    if not _fits(case):
        return Finding("accepted", f"of type {type(case.make()).__name__}")
    if case.call.random:
        return "result"
    return _judge_results(case, results)


def _judge_error(case: Case, error: Exception) -> Finding | str:
    if isinstance(error, TheirOwn):
        return "refused"
    text = f"{type(error).__name__}: {str(error).strip()}"
    documented = "RuntimeError" in (inspect.getdoc(case.call.signature) or "") and type(error) is RuntimeError
    if _asks_for_memory(error) or case.argument in FUNCTIONS:
        return "refused"
    if str(error).startswith("Inference tensors cannot be saved"):  # as by any operation of PyTorch
        return "refused"
    if not isinstance(error, ERRORS) and not documented:
        return Finding("exception", text)
    if INTERNALS.search(re.split(r",? got ", str(error))[0]):
        return Finding("internals", text)
    others = "|".join(re.escape(name) for name in (*case.call.arguments(), *case.call.others))
    if not re.search(rf"\b{re.escape(case.argument)}\b", str(error)) and not re.search(
        rf"\b({others})\b.* (must|needs)\b", str(error)
    ):
        return Finding("unnamed", text)
    return "refused"


def _asks_for_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate" in str(error)


def _fits(case: Case) -> bool:
    """Whether an argument that was taken is of the type that its annotation names."""
    annotation = inspect.signature(case.call.signature).parameters[case.argument].annotation
    value = case.make()
    number = isinstance(value, (np.number, np.bool_)) or (isinstance(value, np.ndarray) and value.ndim == 0)
    element = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    real = isinstance(value, (int, float)) or (number and not np.issubdtype(value.dtype, np.complexfloating))
    fits = {
        "Tensor": isinstance(value, Tensor),
        "float": real or element,
        "int": isinstance(value, int) or (number and np.issubdtype(value.dtype, np.integer)) or type(value) is np.bool_,
        "bool": isinstance(value, (bool, np.bool_)),
        "str": isinstance(value, str),
        "None": value is None,
        "nn.Module": isinstance(value, nn.Module),
    }
    names = [name for name in re.split(r"\s*\|\s*", str(annotation)) if name]
    return any(fits.get(name, True) for name in names)


def _judge_results(case: Case, results: Results) -> Finding | str:
    """Near the reference's in float64, or in the dtype at hand."""
    if not all(_has_values(x) for x in (*results.outputs, *results.gradients) if isinstance(x, Tensor)):
        return "result"
    references, errors = [], []
    for change in (_as_double, lambda x: x):
        try:
            references.append(_results(case, "reference", change))
        except Exception as error:
            errors.append(f"the reference raises {type(error).__name__}: {error}")
    if not references:
        # PyTorch's own operations save no inference tensors, and write to none.
        return "result" if "nference tensor" in errors[-1] else Finding("reference", "; ".join(errors))
    told = difference(results, *references, infinite=_is_infinite(case.make()))
    return Finding("number", told) if told else "result"


def _has_values(x: Tensor) -> bool:
    dense = x.layout == torch.strided and not x.is_nested and not x.is_quantized
    return dense and x.is_cpu and not isinstance(x, FakeTensor) and (x.numel() == 0 or x.data_ptr() != 0)


def _is_infinite(x: Any) -> bool:
    scalar = isinstance(x, Tensor) and x.numel() == 1 and x.is_floating_point() and _has_values(x)
    return scalar and bool(x.double().isinf())


def difference(results: Results, *references: Results, infinite: bool = False) -> str:
    """What differs from all the references, if anything does.

    Where a loss is not finite, its gradients need not be. Of a scale that is infinite, as a tensor, all is NaN or
    infinite, on every backend, but not everywhere which of them.
    """
    finite = all(x.double().isfinite().all() for x in results.outputs if isinstance(x, Tensor))
    for name, free in (("outputs", infinite and not finite), ("gradients", not finite)):
        mine, *theirs = (getattr(each, name) for each in (results, *references))
        if any(len(mine) != len(others) for others in theirs):
            return f"{len(mine)} {name}, of the reference {[len(others) for others in theirs]}"
        for x, *right in zip(mine, *theirs, strict=True):
            if told := _difference(x, right, free):
                return f"{name}: {told}"
    return ""


def _difference(result: Any, references: list[Any], may_be_infinite: bool) -> str:
    if not all(isinstance(x, Tensor) for x in (result, *references)):
        same = any(result is right or result == right for right in references)
        return "" if same else f"{result!r}, of the reference {references!r}"
    if any(result.shape != right.shape for right in references):
        return f"shape {tuple(result.shape)}, of the reference {[tuple(right.shape) for right in references]}"
    if any(x.is_complex() for x in (result, *references)):
        return "" if any(torch.equal(result.to(right.dtype), right) for right in references) else "complex numbers"
    x = result.detach().double()
    close = torch.zeros_like(x, dtype=torch.bool)
    largest = torch.finfo(result.dtype).max if result.is_floating_point() else float("inf")
    unit = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(result.dtype, 1e-3)
    values = []
    for right in references:
        y = right.detach().double()
        y = torch.where(y.abs() > largest, y.sign() * float("inf"), y)
        size = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
        close |= (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= unit * (size + 1e-2))
        if may_be_infinite:
            close |= ~(x.isfinite() & y.isfinite())
        values.append(y.flatten())
    if len(values) == 2:  # in float64, and in the dtype at hand: at most twice the error of that
        exact, rounded = (y.view_as(x) for y in values)
        close |= (x - exact).abs() <= 2 * (rounded - exact).abs()
        close |= ~x.isfinite() & ~rounded.isfinite() & (exact.abs() > 1e-3 * largest)  # what it is a sum of is infinite
    if close.all():
        return ""
    i = (~close).flatten().nonzero()[0].item()
    return f"{x.flatten()[i].item():.6g}, of the reference {' and '.join(f'{y[i].item():.6g}' for y in values)}"


def _results(case: Case, backend: str, change: Callable[[Any], Any] = lambda x: x) -> Results:
    arguments = {**case.call.arguments(), case.argument: case.make()}
    kept = case.call.kept
    return results_of(case.call, {k: x if k in kept else change(x) for k, x in arguments.items()}, backend, change)


def results_of(
    call: Call, arguments: dict[str, Any], backend: str, change: Callable[[Any], Any] = lambda x: x
) -> Results:
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]
    chosen = contextlib.nullcontext() if call.name == "use_backend" else fastssl.use_backend(backend)
    with _time_limit(), warnings.catch_warnings(), torch.random.fork_rng(), chosen:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        outputs = _flat(call.run(**arguments, **({"change": change} if call.has_tensors else {})))
        differentiable = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        gradients = []
        if differentiable and leaves:
            total = sum(x.sum() for x in differentiable)
            gradients += torch.autograd.grad(total, leaves, allow_unused=True)
    return Results(outputs, gradients)


def _flat(x: Any) -> list[Any]:
    if isinstance(x, dict):
        x = list(x.values())
    return [y for part in x for y in _flat(part)] if isinstance(x, (list, tuple)) else [x]


def _as_double(x: Any) -> Any:
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).double()
    if isinstance(x, (list, tuple)) and type(x) in (list, tuple):
        return type(x)(map(_as_double, x))
    if type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and x.layout == torch.strided and x.data_ptr():
        wide = x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, nn.Parameter):
            return nn.Parameter(wide, x.requires_grad)
        return wide if x.is_leaf else wide * 1
    return torch.float64 if x is torch.float32 else x


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
