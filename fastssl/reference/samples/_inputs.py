"""What the sample inputs of several families share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.reference.samples._spec import COMPILED, POISONED, RAGGED, SHAPES, TRACED, BadInput


def leaf(x: Tensor) -> Tensor:
    """`x`, to be differentiated."""
    return x.detach().requires_grad_()


def generator(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """(*shape, scale) -> normal numbers, the same in every run."""
    source = torch.Generator().manual_seed(0)

    def rows(*shape: int, scale: float = 1.0) -> Tensor:
        # Drawn in float32 for every dtype, so that the float64 oracle sees values each dtype can hold.
        return (scale * torch.randn(shape, generator=source)).to(device, dtype)

    return rows


def unit_generator(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """(*shape) -> rows of length 1."""
    rows = generator(torch.float32, device)
    return lambda *shape: F.normalize(rows(*shape), dim=-1).to(dtype)


def pair_bad_inputs(x: str, y: str, *rest: object) -> Iterator[BadInput]:
    """Of two arguments called `x` and `y` of one shape, and the positional arguments that follow them."""
    z = torch.randn(8, 16)

    def bad(label: str, a: object, b: object, error: type[Exception], match: str) -> BadInput:
        return BadInput(label, (a, b, *rest), {}, error, match)

    yield bad("shapes differ", z, z[:, :8], ValueError, rf"{x} and {y} .*same shape.*\(8, 16\).*\(8, 8\)")
    yield bad("one dimension", z, z[0], ValueError, rf"{y} .*\(B, D\).*\(16,\)")
    yield bad("no features", z[:, :0], z[:, :0], ValueError, rf"{x} .*at least one feature.*\(8, 0\)")
    yield bad("dtypes differ", z, z.double(), ValueError, rf"{x} and {y} .*same dtype.*float32.*float64")
    yield bad("integers", z.long(), z.long(), ValueError, rf"{x} .*floating.*int64")
    yield bad("not a tensor", z, z.tolist(), TypeError, rf"{y} .*Tensor.*list")
    yield bad("devices differ", z, z.to("meta"), ValueError, rf"{x} and {y} .*same device.*cpu.*meta")


def scalar_bad_inputs(name: str, *args: object) -> Iterator[BadInput]:
    """Of the keyword argument `name`, a number or a tensor of one element, beside `args`."""
    yield BadInput(f"{name} nan", args, {name: float("nan")}, ValueError, f"{name} .*finite.*nan")
    yield BadInput(f"{name} infinite", args, {name: -float("inf")}, ValueError, f"{name} .*finite.*-inf")
    yield BadInput(f"{name} vector", args, {name: torch.ones(2)}, ValueError, rf"{name} .*one.* element.*\(2,\)")
    yield BadInput(f"{name} text", args, {name: "1"}, TypeError, f"{name} .*number.*str")


def sized(*sizes: int) -> set[str]:
    """The tags of a sample of nothing but sizes, rows first."""
    tags = {
        TRACED: sizes[0] <= 2 and max(sizes) <= 9,
        SHAPES: min(sizes) > 1,
        COMPILED: sizes[0] == 5,
        RAGGED: max(sizes) >= 64,
        POISONED: 3 < min(sizes) and 16 <= sizes[-1] and max(sizes) <= 64,
    }
    return {tag for tag, holds in tags.items() if holds}


def largest_norm(*tensors: Tensor) -> float:
    return max((x.detach().double().norm(dim=-1).max().item() for x in tensors if x.numel()), default=0.0)
