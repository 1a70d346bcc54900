"""What an argument is replaced by."""

from __future__ import annotations

import decimal
import fractions
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Substitute = tuple[str, Callable[[], Any]]

_NUMBERS = (
    "0", "1", "-1", "2", "3", "7", "10**6", "2**31", "2**63 - 1", "-2**63", "2**64", "10**400", "0.0", "-0.0", "0.5",
    "1.5", "-0.5", "1e-8", "1e-30", "1e-38", "1e-45", "5e-324", "1e30", "3e38", "1e39", "1e308", "float('nan')",
    "float('inf')", "-float('inf')", "1j", "complex(0.5)", "True", "False", "np.float32(0.5)", "np.float64(0.5)",
    "np.float16(0.5)", "np.float64('nan')", "np.int64(2)", "np.int32(-1)", "np.uint8(2)", "np.bool_(True)",
    "np.complex64(1)", "np.str_('mean')", "np.array(0.5)", "np.array(2)", "np.array([0.5])", "np.ones((4, 8))",
    "np.ones((4, 8), dtype=object)", "decimal.Decimal('0.5')", "fractions.Fraction(1, 2)",
)  # fmt: skip
_OBJECTS = (
    "None", "''", "'text'", "'cpu'", "'cuda:99'", "b'mean'", "[]", "[1.0]", "[None]", "()", "(2, 2)", "(1,)",
    "(0.5, 2.0)", "(0.5, float('nan'))", "(-1, 2)", "('a', 'b')", "{}", "{'a': 1}", "set()", "object()", "int",
    "Tensor", "len", "lambda *a, **k: None", "lambda *a, **k: 'text'", "lambda *a, **k: torch.ones(3)", "nn.Module()",
    "nn.Linear(8, 8)", "nn.Linear(8, 8).double()", "nn.Identity()", "torch.float32", "torch.int64", "torch.strided",
    "torch.device('meta')", "torch.Size([4, 8])", "torch.Generator()", "range(4)", "iter([])", "Ellipsis",
    "slice(0, 1)", "Exception('x')", "io.StringIO()", "pathlib.Path('x')", "np", "NotImplemented",
    "memoryview(b'abc')", "bytearray(3)", "[[0.5] * 8] * 4",
)  # fmt: skip
_TENSORS = (
    "torch.tensor(0.5)", "torch.tensor(2)", "torch.tensor(True)", "torch.tensor(1j)",
    "torch.tensor(0.5, dtype=torch.float64)", "torch.tensor(float('nan'))", "torch.tensor(float('inf'))",
    "torch.tensor(0.0)", "torch.tensor(-1.0)", "torch.tensor([0.5])", "torch.tensor([[0.5]])",
    "torch.tensor([0.5], requires_grad=True)", "torch.empty(0)", "torch.empty(0, 8)", "torch.ones(4)",
    "torch.ones(4, 8)", "torch.ones(4, 8, 2)", "torch.ones(4, 4)", "torch.zeros(4, 8)",
    "torch.zeros(4, dtype=torch.int64)", "torch.full((4,), -1)", "torch.full((4,), 10**9)",
    "torch.tensor(0.5, device='meta')", "torch.ones(4, 8, device='meta')", "torch.ones(4, 8).to_sparse()",
    "torch.tensor(0.5).to_sparse()", "torch.tensor(0.5, dtype=torch.bfloat16)", "fake(torch.tensor(0.5))",
    "torch.ones(3, dtype=torch.uint8)",
)  # fmt: skip


class Subclass(Tensor):
    """A tensor of another class, and no more."""


def _fake(x: Tensor) -> Tensor:
    return FakeTensorMode(allow_non_fake_inputs=False).from_tensor(x.detach())


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


def _without_storage(x: Tensor) -> Tensor:
    x = x.detach().clone()
    x.untyped_storage().resize_(0)
    return x


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def fill(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if x.numel():
            x.view(-1)[x.numel() // 2] = value
        return x.requires_grad_(x.is_floating_point())

    return fill


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x.detach() * factor).requires_grad_(x.is_floating_point())


def _misaligned(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x.detach())


def _negated(x: Tensor) -> Tensor:
    view = torch._neg_view(x.detach())
    view.clone()  # one of booleans nothing can read
    return view


def _gaps(x: Tensor) -> Tensor:
    gaps = x.detach().new_empty(*(2 * size for size in x.shape))
    return gaps[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x.detach())


FROM_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    **{str(t).removeprefix("torch."): (lambda x, t=t: x.detach().to(t)) for t in (
        torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.int8,
        torch.uint8, torch.uint16, torch.bool, torch.complex64)},
    "conj": lambda x: x.detach().to(torch.complex64).conj(),
    "neg view": _negated,
    "one more dimension": lambda x: x.detach()[None],
    "one more at the end": lambda x: x.detach()[..., None],
    "flat": lambda x: x.detach().flatten(),
    "summed": lambda x: x.detach().sum(),
    "no rows": lambda x: x.detach()[:0],
    "one row": lambda x: x.detach()[:1],
    "one row less": lambda x: x.detach()[:-1],
    "one row more": lambda x: torch.cat([x.detach(), x.detach()[:1]]),
    "no columns": lambda x: x.detach()[..., :0],
    "one column": lambda x: x.detach()[..., :1],
    "one column less": lambda x: x.detach()[..., :-1],
    "transposed shape": lambda x: x.detach().mT.contiguous(),
    "transposed strides": lambda x: x.detach().mT.contiguous().mT,
    "expanded": lambda x: x.detach()[:1].expand(x.shape),
    "expanded twice": lambda x: x.detach().flatten()[:1].expand(x.numel()).view(x.shape) if x.dim() < 2 else
        x.detach()[:1, :1].expand(x.shape),
    "misaligned": _misaligned,
    "gaps": _gaps,
    "sparse COO": lambda x: x.detach().to_sparse(),
    "sparse COO that requires grad": lambda x: x.detach().to_sparse().requires_grad_(),
    "sparse CSR": lambda x: x.detach().to_sparse_csr(),
    "sparse CSC": lambda x: x.detach().to_sparse_csc(),
    "sparse BSR": lambda x: x.detach().to_sparse_bsr((1, 1)),
    "mkldnn": lambda x: x.detach().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x.detach())),
    "jagged": lambda x: torch.nested.nested_tensor(list(x.detach()), layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.qint8),
    "meta": lambda x: x.detach().to("meta"),
    "fake": _fake,
    "inference": _inference,
    "without storage": _without_storage,
    "named": lambda x: x.detach().refine_names(*(None for _ in x.shape)),
    "subclass": lambda x: x.detach().as_subclass(Subclass),
    "Parameter": lambda x: nn.Parameter(x.detach(), requires_grad=x.is_floating_point()),
    "Buffer": lambda x: nn.Buffer(x.detach()),
    "requires grad": lambda x: x.detach().requires_grad_(),
    "with a graph": lambda x: x.detach().requires_grad_() * 1,
    "read-only numpy": lambda x: torch.from_numpy(np.broadcast_to(x.detach().numpy(), x.shape).copy()),
    "NaN": _filled(float("nan")),
    "inf": _filled(float("inf")),
    "-1": _filled(-1),
    "huge": _filled(3e38),
    "large numbers": _scaled(1e30),
    "tiny numbers": _scaled(1e-30),
    "denormal numbers": _scaled(1e-42),
    "zeros": _scaled(0),
    "10**9 times": _scaled(10**9),
    "plus 100": lambda x: x.detach() + 100,
}  # fmt: skip


def substitutes(valid: Any) -> Iterator[Substitute]:
    """(what it is, () -> it) in place of `valid`."""
    scope = {"torch": torch, "np": np, "nn": nn, "Tensor": Tensor, "decimal": decimal, "fractions": fractions, "io": io,
             "pathlib": pathlib, "fake": _fake}  # fmt: skip
    for text in (*_NUMBERS, *_OBJECTS, *_TENSORS):
        yield text, lambda text=text: eval(text, dict(scope))
    if isinstance(valid, Tensor):
        for label, make in FROM_TENSOR.items():
            yield f"its tensor, {label}", lambda make=make: make(_fresh(valid))
    elif isinstance(valid, (list, tuple)) and valid and all(isinstance(x, Tensor) for x in valid):
        for label, make in FROM_TENSOR.items():
            yield f"its last tensor, {label}", lambda make=make: [*map(_fresh, valid[:-1]), make(_fresh(valid[-1]))]
        for label, make in {
            "one less": lambda x: x[:-1],
            "one more": lambda x: [*x, _fresh(x[-1])],
            "one twice": lambda x: [x[-1]] * len(x),
            "an iterator": iter,
            "a tuple": tuple,
            "a dict": lambda x: dict(enumerate(x)),
            "None last": lambda x: [*x[:-1], None],
            "one tensor": lambda x: x[-1],
        }.items():
            yield f"its tensors, {label}", lambda make=make: make([*map(_fresh, valid)])


def _fresh(x: Tensor) -> Tensor:
    """One that a call may write to."""
    if isinstance(x, nn.Parameter):
        return nn.Parameter(x.detach().clone(), requires_grad=x.requires_grad)
    return x.detach().clone().requires_grad_(x.requires_grad)
