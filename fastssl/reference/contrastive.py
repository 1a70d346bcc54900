"""Softmax contrastive losses, as the papers write them.

NT-Xent (SimCLR, arXiv:2002.05709). With z the 2B rows of [z1; z2], each divided by its Euclidean norm
(at least 1e-12, as `torch.nn.functional.normalize`), and s = 1 / temperature,

    S_ij   = s <z_i, z_j>
    loss_i = log sum_{j != i} exp(S_ij) - S_{i, pos(i)},      pos(i) = (i + B) mod 2B.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def _nt_xent_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int, scale: float = 1.0) -> Tensor:
        # Drawn in float32 for every dtype, so that the float64 oracle sees values each dtype can hold.
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    for batch, dim in [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (64, 127), (65, 129), (129, 16), (300, 40)]:
        yield Sample(f"{batch}x{dim}", (leaf(rows(batch, dim)), leaf(rows(batch, dim))))
    z1, z2 = rows(33, 24), rows(33, 24)
    for temperature in (0.07, 0.01, 1.0, -1.0):
        yield Sample(f"temperature={temperature}", (leaf(z1), leaf(z2)), {"temperature": temperature})
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield Sample("learnable temperature", (leaf(z1), leaf(z2)), {"temperature": learnable})
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
    precision = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
    return z1, z2, scale, sample.kwargs.get("normalize", True), precision[z1.dtype]


OpSpec("nt_xent", "contrastive", nt_xent, _nt_xent_samples, _nt_xent_bad_inputs, _nt_xent_op_args)
