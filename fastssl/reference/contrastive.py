"""Softmax contrastive losses, as the papers write them.

NT-Xent (SimCLR, arXiv:2002.05709). With z the 2B rows of [z1; z2], each divided by its Euclidean norm
(at least 1e-12, as `torch.nn.functional.normalize`), and s = 1 / temperature,

    S_ij   = s <z_i, z_j>
    loss_i = log sum_{j != i} exp(S_ij) - S_{i, pos(i)},      pos(i) = (i + B) mod 2B.

`similarity_logsumexp` is the first of the two terms between any two sets of rows: the normaliser of InfoNCE
(CPC, arXiv:1807.03748), of MoCo's queue (arXiv:1911.05722), and of NT-Xent over several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.reference._spec import BadInput, OpSpec, Sample


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """`loss` reduced as PyTorch's loss functions do."""
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


def nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """NT-Xent as people write it: concatenate, multiply, mask the diagonal, cross-entropy."""
    batch = z1.shape[0]
    z = torch.cat([z1, z2])
    if normalize:
        z = F.normalize(z, dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(2 * batch, dtype=torch.bool, device=z.device)
    positive = torch.arange(2 * batch, device=z.device).roll(batch)
    loss = F.cross_entropy(similarity.masked_fill(itself, float("-inf")), positive, reduction="none")
    return reduce(loss, reduction)


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The log-sum-exp over the columns of the stored similarity matrix."""
    similarity = x @ y.T * scale
    if exclude is not None:
        column = torch.arange(y.shape[0], device=y.device)
        similarity = similarity.masked_fill(column == exclude[:, None], float("-inf"))
    lse = similarity.logsumexp(1)
    lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
    return lse if offset is None else lse - offset


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _generator(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int, scale: float = 1.0) -> Tensor:
        # Drawn in float32 for every dtype, so that the float64 oracle sees values each dtype can hold.
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    return rows


def _nt_xent_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows, leaf = _generator(dtype, device), _leaf
    for batch, dim in [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (64, 127), (65, 129), (129, 16), (300, 40)]:
        yield Sample(f"{batch}x{dim}", (leaf(rows(batch, dim)), leaf(rows(batch, dim))))
    z1, z2 = rows(33, 24), rows(33, 24)
    for temperature in (0.07, 0.01, 1.0, -1.0):
        yield Sample(f"temperature={temperature}", (leaf(z1), leaf(z2)), {"temperature": temperature})
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield Sample("learnable temperature", (leaf(z1[:7, :6]), leaf(z2[:7, :6])), {"temperature": learnable})
    for reduction in ("none", "sum"):
        yield Sample(f"reduction={reduction}", (leaf(z1), leaf(z2)), {"reduction": reduction})
    yield Sample("not normalized", (leaf(z1), leaf(z2)), {"normalize": False, "temperature": 1.0})
    yield Sample("not normalized, large", (leaf(6 * z1), leaf(6 * z2)), {"normalize": False, "temperature": 0.5})
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 33)).T))
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49]))
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24))))
    yield Sample("only one side differentiable", (leaf(z1), z2))
    zero = z1.clone()
    zero[3] = 0
    yield Sample("identical views", (leaf(z1), leaf(z1)))
    if dtype != torch.float16:  # F.normalize's 1e-12 is 0 in float16, where eager PyTorch divides 0 by 0
        yield Sample("zero row", (leaf(zero), leaf(z2)))
        yield Sample("huge and tiny rows", (leaf(1e6 * z1), leaf(1e-6 * z2)))
    yield Sample("empty", (leaf(rows(0, 24)), leaf(rows(0, 24))), {"reduction": "sum"})


def _nt_xent_bad_inputs() -> Iterator[BadInput]:
    z = torch.randn(8, 16)
    yield BadInput("shapes differ", (z, z[:, :8]), {}, ValueError, r"z1 and z2 .*same shape.*\(8, 16\).*\(8, 8\)")
    yield BadInput("one dimension", (z[0], z[0]), {}, ValueError, r"z1 .*\(B, D\).*\(16,\)")
    yield BadInput("no features", (z[:, :0], z[:, :0]), {}, ValueError, r"z1 .*at least one feature.*\(8, 0\)")
    yield BadInput("dtypes differ", (z, z.double()), {}, ValueError, r"same dtype.*float32.*float64")
    yield BadInput("integers", (z.long(), z.long()), {}, ValueError, r"z1 .*floating.*int64")
    yield BadInput("complex", (z.cfloat(), z.cfloat()), {}, ValueError, r"z1 .*floating.*complex64")
    yield BadInput("not a tensor", (z.tolist(), z), {}, TypeError, r"z1 .*Tensor.*list")
    yield BadInput("devices differ", (z, z.to("meta")), {}, ValueError, r"same device.*cpu.*meta")
    yield BadInput("zero temperature", (z, z), {"temperature": 0.0}, ValueError, r"temperature .*zero.*0\.0")
    yield BadInput("nan temperature", (z, z), {"temperature": float("nan")}, ValueError, r"temperature .*nan")
    yield BadInput("temperature vector", (z, z), {"temperature": torch.ones(2)}, ValueError, r"temperature .*\(2,\)")
    yield BadInput("temperature text", (z, z), {"temperature": "0.5"}, TypeError, r"temperature .*str")
    yield BadInput("reduction", (z, z), {"reduction": "average"}, ValueError, r"reduction .*'average'")


def _nt_xent_op_args(sample: Sample) -> tuple:
    z1, z2 = sample.args
    temperature = sample.kwargs.get("temperature", 0.5)
    accumulate = torch.float64 if z1.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(temperature, dtype=accumulate, device=z1.device).reciprocal()
    return z1, z2, scale, sample.kwargs.get("normalize", True), str(z1.dtype).removeprefix("torch.")


def _similarity_logsumexp_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows, leaf = _generator(dtype, device), _leaf

    def unit(*shape: int) -> Tensor:
        return F.normalize(rows(*shape).float(), dim=1).to(dtype)

    for m, n, dim in [(1, 1, 1), (1, 9, 8), (9, 1, 8), (5, 7, 64), (32, 64, 128), (64, 65, 127), (129, 257, 16)]:
        yield Sample(f"{m}x{n}x{dim}", (leaf(unit(m, dim)), leaf(unit(n, dim))), {"scale": 2.0})
    x, y = unit(33, 24), unit(65, 24)
    own = torch.arange(33, device=device)
    for scale in (0.0, 14.0, 100.0, -1.0):
        yield Sample(f"scale={scale}", (leaf(x), leaf(y)), {"scale": scale, "exclude": own})
    learnable = torch.tensor(5.0, device=device, requires_grad=True)
    few = leaf(x[:5, :4]), leaf(y[:9, :4])
    yield Sample("learnable scale", few, {"scale": learnable, "exclude": own[:5] + 2, "offset": leaf(rows(5))})
    yield Sample("queue", (leaf(x), y), {"scale": 10.0})
    yield Sample("only y differentiable", (x, leaf(y)), {"scale": 10.0})
    yield Sample("excludes no column", (leaf(x), leaf(y)), {"exclude": 65 - 2 * own})
    yield Sample("excludes every column", (leaf(x), leaf(y[:1])), {"exclude": own - 3})
    yield Sample("large rows", (leaf(6 * rows(33, 24)), leaf(rows(65, 24))))
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 65)).T), {"exclude": own})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49]), {"exclude": own})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24))))
    yield Sample("no columns", (leaf(x), leaf(y[:0])))
    yield Sample("empty", (leaf(x[:0]), leaf(y)), {"exclude": own[:0]})


def _similarity_logsumexp_bad_inputs() -> Iterator[BadInput]:
    x, y = torch.randn(8, 16), torch.randn(9, 16)
    yield BadInput("features differ", (x, y[:, :8]), {}, ValueError, r"x and y .*same number.*\(8, 16\).*\(9, 8\)")
    yield BadInput("one dimension", (x, y[0]), {}, ValueError, r"y .*\(N, D\).*\(16,\)")
    yield BadInput("no features", (x[:, :0], y[:, :0]), {}, ValueError, r"x .*at least one feature.*\(8, 0\)")
    yield BadInput("dtypes differ", (x, y.half()), {}, ValueError, r"x and y .*same dtype.*float32.*float16")
    yield BadInput("integers", (x.long(), y.long()), {}, ValueError, r"x .*floating.*int64")
    yield BadInput("not a tensor", (x, y.tolist()), {}, TypeError, r"y .*Tensor.*list")
    yield BadInput("devices differ", (x, y.to("meta")), {}, ValueError, r"same device.*cpu.*meta")
    yield BadInput("infinite scale", (x, y), {"scale": float("inf")}, ValueError, r"scale .*finite.*inf")
    yield BadInput("scale vector", (x, y), {"scale": torch.ones(2)}, ValueError, r"scale .*\(2,\)")
    yield BadInput("scale text", (x, y), {"scale": "1"}, TypeError, r"scale .*str")
    own = torch.arange(8)
    yield BadInput("exclude too long", (x, y), {"exclude": torch.arange(9)}, ValueError, r"exclude .*\(8,\).*\(9,\)")
    yield BadInput("exclude mask", (x, y), {"exclude": own > 3}, ValueError, r"exclude .*int64.*bool")
    yield BadInput("exclude list", (x, y), {"exclude": own.tolist()}, TypeError, r"exclude .*Tensor.*list")
    yield BadInput("exclude elsewhere", (x, y), {"exclude": own.to("meta")}, ValueError, r"exclude .*device.*meta.*cpu")
    yield BadInput("offset scalar", (x, y), {"offset": torch.ones(())}, ValueError, r"offset .*\(8,\).*\(\)")


def _similarity_logsumexp_op_args(sample: Sample) -> tuple:
    x, y = sample.args
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(sample.kwargs.get("scale", 1.0), dtype=accumulate, device=x.device)
    return x, y, scale, sample.kwargs.get("exclude"), True, str(x.dtype).removeprefix("torch.")


def _largest_norm(*tensors: Tensor) -> float:
    return max((x.detach().double().norm(dim=1).max().item() for x in tensors if x.shape[0]), default=0.0)


def _nt_xent_magnitude(sample: Sample) -> float:
    """The largest |S_ij| that lengths allow."""
    square = 1 if sample.kwargs.get("normalize", True) else _largest_norm(*sample.args) ** 2
    return square / abs(torch.as_tensor(sample.kwargs.get("temperature", 0.5)).item())


OpSpec(
    "nt_xent",
    "contrastive",
    nt_xent,
    _nt_xent_samples,
    _nt_xent_bad_inputs,
    _nt_xent_op_args,
    _nt_xent_magnitude,
)


def _similarity_logsumexp_magnitude(sample: Sample) -> float:
    """The largest |S_ij| that lengths allow."""
    x, y = sample.args
    return abs(torch.as_tensor(sample.kwargs.get("scale", 1.0)).item()) * _largest_norm(x) * _largest_norm(y)


OpSpec(
    "similarity_logsumexp",
    "contrastive",
    similarity_logsumexp,
    _similarity_logsumexp_samples,
    _similarity_logsumexp_bad_inputs,
    _similarity_logsumexp_op_args,
    _similarity_logsumexp_magnitude,
)
