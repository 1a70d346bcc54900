"""Inputs for the softmax contrastive losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastssl.reference.contrastive import clip_loss, dcl, info_nce, nt_xent, similarity_logsumexp, sup_con
from fastssl.reference.samples._inputs import (
    generator,
    largest_norm,
    leaf,
    pair_bad_inputs,
    scalar_bad_inputs,
    sized,
    unit_generator,
)
from fastssl.reference.samples._spec import EDGE, POISONED, RAGGED, TRACED, BadInput, OpSpec, Sample


def _nt_xent_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for batch, dim in [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (64, 127), (65, 129), (129, 16), (300, 40)]:
        yield Sample(f"{batch}x{dim}", (leaf(rows(batch, dim)), leaf(rows(batch, dim))), tags=sized(batch, dim))
    z1, z2 = rows(33, 24), rows(33, 24)
    for temperature in (0.07, 0.01, 1.0, -1.0):
        yield Sample(f"temperature={temperature}", (leaf(z1), leaf(z2)), {"temperature": temperature})
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield Sample(
        "learnable temperature", (leaf(z1[:7, :6]), leaf(z2[:7, :6])), {"temperature": learnable}, tags={TRACED}
    )
    for reduction in ("none", "sum"):
        yield Sample(f"reduction={reduction}", (leaf(z1), leaf(z2)), {"reduction": reduction})
    yield Sample("not normalized", (leaf(z1), leaf(z2)), {"normalize": False, "temperature": 1.0}, tags={POISONED})
    yield Sample("not normalized, large", (leaf(6 * z1), leaf(6 * z2)), {"normalize": False, "temperature": 0.5})
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 33)).T), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49]), tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24))), tags={TRACED})
    yield Sample("only one side differentiable", (leaf(z1), z2))
    zero = z1.clone()
    zero[3] = 0
    yield Sample("identical views", (leaf(z1), leaf(z1)))
    if dtype != torch.float16:  # F.normalize's 1e-12 is 0 in float16, where eager PyTorch divides 0 by 0
        yield Sample("zero row", (leaf(zero), leaf(z2)), tags={EDGE})
        yield Sample("huge and tiny rows", (leaf(1e6 * z1), leaf(1e-6 * z2)))
    yield Sample("empty", (leaf(rows(0, 24)), leaf(rows(0, 24))), {"reduction": "sum"}, tags={TRACED})


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


def _similarity_logsumexp_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows, unit = generator(dtype, device), unit_generator(dtype, device)
    for m, n, dim in [(1, 1, 1), (1, 9, 8), (9, 1, 8), (5, 7, 64), (32, 64, 128), (64, 65, 127), (129, 257, 16)]:
        yield Sample(f"{m}x{n}x{dim}", (leaf(unit(m, dim)), leaf(unit(n, dim))), {"scale": 2.0}, tags=sized(m, n, dim))
    x, y = unit(33, 24), unit(65, 24)
    own = torch.arange(33, device=device)
    for scale in (0.0, 14.0, 100.0, -1.0):
        yield Sample(
            f"scale={scale}",
            (leaf(x), leaf(y)),
            {"scale": scale, "exclude": own},
            tags={EDGE, POISONED} if scale == 14.0 else {EDGE},
        )
    learnable = torch.tensor(5.0, device=device, requires_grad=True)
    few = leaf(x[:5, :4]), leaf(y[:9, :4])
    yield Sample(
        "learnable scale", few, {"scale": learnable, "exclude": own[:5] + 2, "offset": leaf(rows(5))}, tags={TRACED}
    )
    yield Sample("queue", (leaf(x), y), {"scale": 10.0}, tags={POISONED})
    yield Sample("only y differentiable", (x, leaf(y)), {"scale": 10.0})
    yield Sample("excludes no column", (leaf(x), leaf(y)), {"exclude": 65 - 2 * own}, tags={EDGE})
    yield Sample("excludes every column", (leaf(x), leaf(y[:1])), {"exclude": own - 3}, tags={EDGE})
    yield Sample("large rows", (leaf(6 * rows(33, 24)), leaf(rows(65, 24))))
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 65)).T), {"exclude": own}, tags={TRACED})
    yield Sample(
        "sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49]), {"exclude": own}, tags={TRACED}
    )
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24))), tags={TRACED})
    yield Sample("no columns", (leaf(x), leaf(y[:0])))
    yield Sample("empty", (leaf(x[:0]), leaf(y)), {"exclude": own[:0]}, tags={TRACED})


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


def _info_nce_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows, unit = generator(dtype, device), unit_generator(dtype, device)
    for batch, dim in [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (65, 129), (129, 16), (300, 40)]:
        yield Sample(f"{batch}x{dim}", (leaf(rows(batch, dim)), leaf(rows(batch, dim))), tags=sized(batch, dim))
        if batch > 100:
            both = {"symmetric": True}
            yield Sample(f"{batch}x{dim}, symmetric", (leaf(rows(batch, dim)), leaf(rows(batch, dim))), both)
    q, k, queue, paired = rows(33, 24), rows(33, 24), rows(127, 24), rows(33, 7, 24)
    keys = leaf(q), leaf(k), leaf(queue)
    unit_keys = leaf(unit(33, 24)), leaf(unit(33, 24)), unit(127, 24)
    for temperature in (0.07, 0.01, -1.0):
        yield Sample(f"temperature={temperature}", (leaf(q), leaf(k)), {"temperature": temperature})
    yield Sample("queue", unit_keys, {"normalize": False, "temperature": 0.07}, tags={POISONED})
    yield Sample("queue of constant keys", (leaf(q), k, queue), {"temperature": 0.01})
    yield Sample("queue and batch", keys, {"in_batch_negatives": True}, tags={TRACED})
    yield Sample("queue, no keys", (leaf(q), leaf(k), leaf(queue[:0])))
    few = tuple(leaf(x[:5, :4]) for x in (q, k, queue))
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield Sample("learnable temperature", few[:2], {"temperature": learnable, "symmetric": True}, tags={TRACED})
    yield Sample(
        "learnable temperature, queue", few, {"temperature": learnable, "in_batch_negatives": True}, tags={TRACED}
    )
    few = leaf(q[:2, :4]), leaf(k[:2, :4]), leaf(paired[:2, :3, :4])
    mode = {"negative_mode": "paired"}
    yield Sample("learnable temperature, paired", few, {**mode, "temperature": learnable}, tags={TRACED})
    yield Sample("paired", (leaf(q), leaf(k), leaf(paired)), mode)
    yield Sample(
        "paired and batch",
        (leaf(q), leaf(k), leaf(paired)),
        {**mode, "in_batch_negatives": True},
        tags={TRACED, POISONED},
    )
    yield Sample("paired, no keys", (leaf(q), leaf(k), leaf(paired[:, :0])), mode)
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(-2, 127, (33, 9), generator=source).to(device)
    ids[5], ids[7] = 3, -1
    yield Sample("ids", keys, {"negative_ids": ids})
    yield Sample("ids and batch", keys, {"negative_ids": ids.int(), "in_batch_negatives": True}, tags={TRACED})
    unit_ids = {"negative_ids": ids, "normalize": False, "temperature": 0.07}
    yield Sample("ids, not normalized", (*unit_keys[:2], leaf(unit(127, 24))), unit_ids, tags={POISONED})
    few_ids = torch.tensor([[0, 3, -1], [3, 3, 1]], device=device)
    few = leaf(q[:2, :4]), leaf(k[:2, :4]), leaf(queue[:4, :4])
    yield Sample("learnable temperature, ids", few, {"negative_ids": few_ids, "temperature": learnable}, tags={TRACED})
    wide = leaf(rows(40, 129)), leaf(rows(40, 129)), leaf(rows(50, 129))
    wide_ids = torch.randint(50, (40, 70), generator=source).to(device)
    yield Sample("ids, wide", wide, {"negative_ids": wide_ids, "temperature": -0.2}, tags={RAGGED})
    yield Sample("ids, no keys", (leaf(q), leaf(k), leaf(queue[:0])), {"negative_ids": ids.clamp_max(-1)}, tags={EDGE})
    yield Sample("no ids", keys, {"negative_ids": ids[:, :0]}, tags={EDGE})
    yield Sample("no negatives", (leaf(q), leaf(k)), {"in_batch_negatives": False})
    yield Sample("symmetric", (leaf(q), leaf(k)), {"symmetric": True, "reduction": "sum"})
    yield Sample("smoothed", (leaf(q), leaf(k)), {"label_smoothing": 0.1, "reduction": "none"})
    yield Sample("one row, smoothed", (leaf(q[:1]), leaf(k[:1])), {"label_smoothing": 0.5}, tags={EDGE})
    several = leaf(rows(300, 40)), leaf(rows(300, 40))
    yield Sample("smoothed, not normalized", several, {"label_smoothing": 1.0, "normalize": False, "temperature": 9})
    yield Sample("only keys differentiable, smoothed", (q, leaf(k)), {"label_smoothing": 0.2})
    yield Sample("symmetric, smoothed", (leaf(q), leaf(k)), {"symmetric": True, "label_smoothing": 0.1})
    confident = leaf(q), leaf(q + rows(33, 24, scale=1e-3))
    yield Sample("confident", confident, {"temperature": 0.05})
    yield Sample("confident, symmetric", confident, {"temperature": 0.01, "symmetric": True})
    large = leaf(6 * q), leaf(6 * k)
    yield Sample("not normalized, large", large, {"normalize": False, "temperature": 0.5})
    yield Sample("not normalized, symmetric", unit_keys[:2], {"normalize": False, "symmetric": True}, tags={POISONED})
    few = leaf(q[:5, :4]), leaf(k[:5, :4])
    yield Sample("few", few, {"temperature": learnable}, tags={TRACED})
    yield Sample("few, smoothed", few, {"temperature": learnable, "label_smoothing": 0.3}, tags={TRACED})
    yield Sample("few, not normalized", few, {"temperature": learnable, "normalize": False}, tags={TRACED})
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 33)).T), tags={TRACED})
    yield Sample(
        "sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49]), {"symmetric": True}, tags={TRACED}
    )
    yield Sample(
        "expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24)), leaf(rows(1, 24)).expand(5, 24)), tags={TRACED}
    )
    constant = leaf(q), k
    yield Sample("only queries differentiable", constant, tags={TRACED})
    yield Sample("only queries differentiable, symmetric", constant, {"symmetric": True})
    yield Sample("only queries differentiable, not normalized", constant, {"normalize": False}, tags={POISONED})
    yield Sample("only keys differentiable", (q, leaf(k)))
    if dtype != torch.float16:  # F.normalize's 1e-12 is 0 in float16, where eager PyTorch divides 0 by 0
        zero = q.clone()
        zero[3] = 0
        yield Sample("zero row", (leaf(zero), leaf(k)), tags={EDGE})
        yield Sample("zero key, symmetric", (leaf(q), leaf(zero)), {"symmetric": True}, tags={EDGE})
        yield Sample("huge and tiny rows", (leaf(1e6 * q), leaf(1e-6 * k)))
        yield Sample("huge and tiny rows, symmetric", (leaf(1e-6 * q), leaf(1e6 * k)), {"symmetric": True})
    yield Sample("empty", (leaf(q[:0]), leaf(k[:0])), {"reduction": "sum"}, tags={TRACED})
    yield Sample("empty, symmetric", (leaf(q[:0]), leaf(k[:0])), {"symmetric": True, "reduction": "sum"}, tags={TRACED})
    yield Sample("empty, queue", (leaf(q[:0]), leaf(k[:0]), leaf(queue)), {"reduction": "sum"}, tags={TRACED})


def _labels_bad_inputs(*args: object) -> Iterator[BadInput]:
    """Of the keyword argument `labels`, beside `args` of 8 rows."""
    labels = torch.arange(8)
    yield BadInput("labels too short", args, {"labels": labels[:7]}, ValueError, r"labels .*\(8,\).*\(7,\)")
    yield BadInput("labels one-hot", args, {"labels": torch.eye(8).long()}, ValueError, r"labels .*\(8,\).*\(8, 8\)")
    yield BadInput("labels float", args, {"labels": labels.float()}, ValueError, r"labels .*int64.*float32")
    yield BadInput("labels list", args, {"labels": labels.tolist()}, TypeError, r"labels .*Tensor.*list")
    yield BadInput("labels elsewhere", args, {"labels": labels.to("meta")}, ValueError, r"labels .*device.*meta.*cpu")


def _share_bad_inputs(*args: object) -> Iterator[BadInput]:
    for share in (-0.1, 1.5, float("nan")):
        match = f"label_smoothing .*from 0 to 1.*{share}"
        yield BadInput(f"label_smoothing {share}", args, {"label_smoothing": share}, ValueError, match)
    yield BadInput("label_smoothing text", args, {"label_smoothing": "0.1"}, TypeError, "label_smoothing .*number.*str")


def _info_nce_bad_inputs() -> Iterator[BadInput]:
    q, k, queue, paired = torch.randn(8, 16), torch.randn(8, 16), torch.randn(9, 16), torch.randn(8, 5, 16)
    yield from pair_bad_inputs("query", "positive_key")
    yield from scalar_bad_inputs("temperature", q, k)
    yield from _share_bad_inputs(q, k)
    yield BadInput("temperature zero", (q, k), {"temperature": 0}, ValueError, r"temperature .*zero.*0")
    yield BadInput("reduction", (q, k), {"reduction": "average"}, ValueError, r"reduction .*'average'")
    for label, keys, mode, error, match in (
        ("mode", queue, "both", ValueError, r"negative_mode .*'paired'.*'both'"),
        ("paired keys", paired, "unpaired", ValueError, r"negative_keys .*\(K, D\).*\(8, 5, 16\)"),
        ("unpaired keys", queue, "paired", ValueError, r"negative_keys .*\(B, K, D\).*\(9, 16\)"),
        ("key features", queue[:, :8], "unpaired", ValueError, r"negative_keys .*features.*\(9, 8\).*\(8, 16\)"),
        ("paired key features", paired[..., :8], "paired", ValueError, r"negative_keys .*\(8, 5, 8\).*\(8, 16\)"),
        ("paired key rows", paired[:7], "paired", ValueError, r"negative_keys .*rows.*\(7, 5, 16\).*\(8, 16\)"),
        ("key dtype", queue.half(), "unpaired", ValueError, r"query and negative_keys .*dtype.*float32.*float16"),
        ("key integers", queue.long(), "unpaired", ValueError, r"negative_keys .*floating.*int64"),
        ("key device", queue.to("meta"), "unpaired", ValueError, r"query and negative_keys .*device.*cpu.*meta"),
        ("key list", queue.tolist(), "unpaired", TypeError, r"negative_keys .*Tensor.*list"),
    ):
        yield BadInput(label, (q, k, keys), {"negative_mode": mode}, error, match)
    ids = torch.zeros(8, 5, dtype=torch.int64)
    for label, keys, options, error, match in (
        ("ids flat", queue, {"negative_ids": ids[0]}, ValueError, r"negative_ids must have shape \(8, K\).*\(5,\)"),
        ("ids of fewer rows", queue, {"negative_ids": ids[:7]}, ValueError, r"negative_ids must have shape \(8, K\)"),
        ("ids floats", queue, {"negative_ids": ids.float()}, ValueError, "negative_ids must have dtype .*float32"),
        ("ids list", queue, {"negative_ids": ids.tolist()}, TypeError, "negative_ids must be a Tensor, got list"),
        ("ids elsewhere", queue, {"negative_ids": ids.to("meta")}, ValueError, "negative_ids and query .*device"),
        ("ids without keys", None, {"negative_ids": ids}, ValueError, "negative_keys must be given with negative_ids"),
        (
            "paired ids",
            paired,
            {"negative_ids": ids, "negative_mode": "paired"},
            ValueError,
            "negative_mode must be 'unpaired' with negative_ids, got 'paired'",
        ),
    ):
        yield BadInput(label, (q, k, keys), options, error, match)
    for name, value in (("symmetric", True), ("label_smoothing", 0.1)):
        match = f"{name} .*negatives.*{value}"
        yield BadInput(f"{name} with a queue", (q, k, queue), {name: value}, ValueError, match)
        options = {name: value, "in_batch_negatives": False}
        yield BadInput(f"{name} without negatives", (q, k), options, ValueError, match)


def _clip_loss_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows, unit = generator(dtype, device), unit_generator(dtype, device)
    for batch, dim in [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (65, 129), (129, 16)]:
        yield Sample(f"{batch}x{dim}", (leaf(unit(batch, dim)), leaf(unit(batch, dim)), 14.0), tags=sized(batch, dim))
    x, y = unit(33, 24), unit(33, 24)
    for scale in (0.0, 100.0, -1.0):
        yield Sample(f"scale={scale}", (leaf(x), leaf(y), scale), tags={EDGE, POISONED} if scale == 14.0 else {EDGE})
    learnable = torch.tensor(5.0, device=device, requires_grad=True)
    labels = torch.arange(33, device=device) // 2 - 5
    labels[3], labels[-2:] = 1 << 40, -(1 << 40)
    few = leaf(x[:5, :4]), leaf(y[:5, :4]), learnable
    yield Sample("learnable scale", few, {"label_smoothing": 0.1}, tags={TRACED})
    yield Sample("learnable scale, labels", few, {"labels": labels[:5]}, tags={TRACED})
    yield Sample("labels", (leaf(x), leaf(y), 14.0), {"labels": labels}, tags={POISONED})
    yield Sample(
        "labels, smoothed", (leaf(x), leaf(y), 100.0), {"labels": labels, "label_smoothing": 0.1}, tags={TRACED}
    )
    yield Sample("one label", (leaf(x), leaf(y), 14.0), {"labels": torch.zeros_like(labels), "reduction": "none"})
    yield Sample("smoothed", (leaf(x), leaf(y), 14.0), {"label_smoothing": 0.1, "reduction": "sum"})
    yield Sample("one row, smoothed", (leaf(x[:1]), leaf(y[:1]), 14.0), {"label_smoothing": 0.5}, tags={EDGE})
    several = leaf(unit(300, 40)), leaf(unit(300, 40))
    yield Sample("smoothed, several blocks", (*several, -7.0), {"label_smoothing": 1.0})
    yield Sample("confident", (leaf(x), leaf(x + rows(33, 24, scale=1e-3)), 100.0))
    yield Sample("large rows", (leaf(6 * rows(33, 24)), leaf(rows(33, 24)), 1.0))
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 33)).T, 1.0), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], leaf(rows(66, 50))[1::2, 25:49], 1.0), tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24)), 1.0), tags={TRACED})
    yield Sample("only images differentiable", (leaf(x), y, 14.0))
    zero = x.clone()
    zero[3] = 0
    yield Sample("zero row", (leaf(zero), leaf(y), 14.0), tags={EDGE})
    yield Sample("empty", (leaf(x[:0]), leaf(y[:0]), 14.0), {"reduction": "sum"}, tags={TRACED})
    yield Sample(
        "empty, labels", (leaf(x[:0]), leaf(y[:0]), 14.0), {"labels": labels[:0], "reduction": "sum"}, tags={TRACED}
    )


def _clip_loss_bad_inputs() -> Iterator[BadInput]:
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    yield from pair_bad_inputs("image_features", "text_features", 14.0)
    yield from scalar_bad_inputs("logit_scale", x, y)
    yield from _share_bad_inputs(x, y, 14.0)
    yield from _labels_bad_inputs(x, y, 14.0)
    yield BadInput("reduction", (x, y, 14.0), {"reduction": "average"}, ValueError, r"reduction .*'average'")


def _sup_con_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)

    def classes(count: int) -> Tensor:
        return torch.arange(count, device=device) * 7 % (count // 3 + 1)

    for count, dim in [(1, 1), (1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (65, 129), (129, 16)]:
        yield Sample(f"{count}x{dim}", (leaf(rows(count, dim)), classes(count)), tags=sized(count, dim))
    z, labels = rows(33, 24), classes(33)
    for temperature in (0.07, 0.01, -1.0):
        yield Sample(f"temperature={temperature}", (leaf(z), labels), {"temperature": temperature})
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield Sample("learnable temperature", (leaf(z[:7, :6]), labels[:7] // 4), {"temperature": learnable}, tags={TRACED})
    odd = torch.arange(33, device=device) // 2 - 5
    odd[3], odd[-2:] = 1 << 40, -(1 << 40)
    yield Sample("labels of any size", (leaf(z), odd), {"reduction": "none"})
    yield Sample("one label", (leaf(z), torch.zeros_like(labels)), {"reduction": "sum"})
    yield Sample("no two of a label", (leaf(z), torch.arange(33, device=device)))
    yield Sample("views", (leaf(rows(9, 3, 24)), labels[:9]), {"reduction": "none"}, tags={TRACED, POISONED})
    yield Sample("one view", (leaf(rows(9, 1, 24)), labels[:9]))
    near = rows(11, 1, 24) + rows(11, 3, 24, scale=1e-3)
    yield Sample("confident", (leaf(near), torch.arange(11, device=device)), {"temperature": 0.05})
    yield Sample("not normalized, large", (leaf(6 * z), labels), {"normalize": False, "temperature": 0.5})
    yield Sample("transposed", (leaf(rows(24, 33)).T, labels), tags={TRACED})
    yield Sample("sliced", (leaf(rows(66, 50))[::2, 1:25], labels.repeat_interleave(2)[::2]), tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), labels[:1].expand(9)), tags={TRACED})
    if dtype != torch.float16:  # F.normalize's 1e-12 is 0 in float16, where eager PyTorch divides 0 by 0
        zero = z.clone()
        zero[3] = 0
        yield Sample("zero row", (leaf(zero), labels), tags={EDGE})
    yield Sample("empty", (leaf(z[:0]), labels[:0]), {"reduction": "sum"}, tags={TRACED})
    yield Sample("empty, views", (leaf(rows(0, 2, 24)), labels[:0]), {"reduction": "none"}, tags={TRACED})


def _sup_con_bad_inputs() -> Iterator[BadInput]:
    z, labels = torch.randn(8, 16), torch.arange(8)
    for label, features, error, match in (
        ("one dimension", z[0], ValueError, r"features .*\(N, D\) or \(B, V, D\).*\(16,\)"),
        ("four dimensions", z.view(8, 2, 2, 4), ValueError, r"features .*\(N, D\) or \(B, V, D\).*\(8, 2, 2, 4\)"),
        ("no features", z.view(8, 2, 8)[..., :0], ValueError, r"features .*at least one feature.*\(8, 2, 0\)"),
        ("integers", z.long(), ValueError, r"features .*floating.*int64"),
        ("not a tensor", z.tolist(), TypeError, r"features .*Tensor.*list"),
    ):
        yield BadInput(label, (features, labels), {}, error, match)
    yield BadInput("labels of views", (z.view(4, 2, 16), labels), {}, ValueError, r"labels .*\(4,\).*\(8,\)")
    yield from _labels_bad_inputs(z)
    yield from scalar_bad_inputs("temperature", z, labels)
    yield BadInput("temperature zero", (z, labels), {"temperature": 0.0}, ValueError, r"temperature .*zero.*0\.0")
    yield BadInput("reduction", (z, labels), {"reduction": "average"}, ValueError, r"reduction .*'average'")


def _dcl_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    rows = generator(dtype, device)
    for batch, dim in [(1, 8), (2, 3), (3, 1), (5, 64), (32, 128), (65, 129), (129, 16)]:
        yield Sample(f"{batch}x{dim}", (leaf(rows(batch, dim)), leaf(rows(batch, dim))), tags=sized(batch, dim))
    z1, z2 = rows(33, 24), rows(33, 24)
    for temperature in (0.07, 0.01, -1.0):
        yield Sample(f"temperature={temperature}", (leaf(z1), leaf(z2)), {"temperature": temperature})
    learnable = torch.tensor(0.2, device=device, requires_grad=True)
    yield Sample(
        "learnable temperature", (leaf(z1[:5, :4]), leaf(z2[:5, :4])), {"temperature": learnable}, tags={TRACED}
    )
    weighted = {"weight_fn": _von_mises_fisher_weights, "reduction": "sum"}
    yield Sample("weighted", (leaf(z1), leaf(z2)), weighted, tags={TRACED})
    large = leaf(6 * z1), leaf(6 * z2)
    yield Sample("not normalized, large", large, {"normalize": False, "temperature": 0.5})
    yield Sample("transposed", (leaf(rows(24, 33)).T, leaf(rows(24, 33)).T), {"reduction": "none"}, tags={TRACED})
    yield Sample("expanded", (leaf(rows(1, 24)).expand(9, 24), leaf(rows(9, 24))), tags={TRACED})
    yield Sample("only one side differentiable", (leaf(z1), z2))
    yield Sample("confident", (leaf(z1), leaf(z1 + rows(33, 24, scale=1e-3))), {"temperature": 0.05})
    yield Sample("empty", (leaf(z1[:0]), leaf(z2[:0])), {"reduction": "sum"}, tags={TRACED})


def _von_mises_fisher_weights(x: Tensor, y: Tensor) -> Tensor:
    """The weights of the paper's DCLW, of the dtype of the rows."""
    return 2 - len(x) * torch.softmax((x * y).sum(1) / 0.5, 0)


def _dcl_bad_inputs() -> Iterator[BadInput]:
    z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    yield from pair_bad_inputs("z1", "z2")
    yield from scalar_bad_inputs("temperature", z1, z2)
    yield BadInput("temperature zero", (z1, z2), {"temperature": 0.0}, ValueError, r"temperature .*zero.*0\.0")
    yield BadInput("reduction", (z1, z2), {"reduction": "average"}, ValueError, r"reduction .*'average'")


def _temperature_magnitude(default: float) -> Callable[[Sample], float]:
    """The largest |S_ij| that lengths allow, of a loss with `temperature` and `normalize`."""

    def magnitude(sample: Sample) -> float:
        rows = (x for x in sample.args if x.is_floating_point())
        square = 1 if sample.kwargs.get("normalize", True) else largest_norm(*rows) ** 2
        return square / abs(torch.as_tensor(sample.kwargs.get("temperature", default)).item())

    return magnitude


OpSpec(
    "nt_xent",
    "contrastive",
    nt_xent,
    _nt_xent_samples,
    _nt_xent_bad_inputs,
    _temperature_magnitude(0.5),
    reductions=("none", "mean", "sum"),
)


def _similarity_logsumexp_magnitude(sample: Sample) -> float:
    """The largest |S_ij| that lengths allow."""
    x, y = sample.args
    return abs(torch.as_tensor(sample.kwargs.get("scale", 1.0)).item()) * largest_norm(x) * largest_norm(y)


OpSpec(
    "similarity_logsumexp",
    "contrastive",
    similarity_logsumexp,
    _similarity_logsumexp_samples,
    _similarity_logsumexp_bad_inputs,
    _similarity_logsumexp_magnitude,
)


def _clip_loss_magnitude(sample: Sample) -> float:
    """The largest |S_ij| that lengths allow."""
    x, y, scale = sample.args
    return abs(torch.as_tensor(scale).item()) * largest_norm(x) * largest_norm(y)


OpSpec(
    "info_nce",
    "contrastive",
    info_nce,
    _info_nce_samples,
    _info_nce_bad_inputs,
    _temperature_magnitude(0.1),
    reductions=("none", "mean", "sum"),
)
OpSpec(
    "clip_loss",
    "contrastive",
    clip_loss,
    _clip_loss_samples,
    _clip_loss_bad_inputs,
    _clip_loss_magnitude,
    reductions=("none", "mean", "sum"),
)
OpSpec(
    "sup_con",
    "contrastive",
    sup_con,
    _sup_con_samples,
    _sup_con_bad_inputs,
    _temperature_magnitude(0.1),
    reductions=("none", "mean", "sum"),
)
OpSpec(
    "dcl",
    "contrastive",
    dcl,
    _dcl_samples,
    _dcl_bad_inputs,
    _temperature_magnitude(0.1),
    reductions=("none", "mean", "sum"),
)
