"""Softmax contrastive losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import peers
from benchmarks.ops.registry import (
    Benchmark,
    Blockwise,
    Inputs,
    Loss,
    Size,
    small_batches,
    square_matrices,
    square_products,
    unit_pairs,
)

TEMPERATURE = 0.5  # the default of fastssl, of the reference and of lightly
QUEUE_TEMPERATURE = 0.07  # MoCo's
LABEL_TEMPERATURE = 0.1  # SupCon's, and DCL's
IN_BATCH_TEMPERATURE = 0.1  # the default of fastssl
LOGIT_SCALE = 1 / 0.07  # CLIP's, before training
CLASSES = 100


def _rows(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def _views(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, dim = size
    if rows < 2 or rows % 2:
        raise ValueError(f"sizes must have an even number of rows, two views of each sample, got {rows}")
    return tuple(z.to(dtype).requires_grad_() for z in _rows((rows // 2, dim), (rows // 2, dim)))


def _without(S: Tensor, row: Tensor) -> Tensor:
    """The similarities of some rows, except those with themselves."""
    return S.masked_fill(torch.arange(S.shape[1], device=S.device) == row[:, None], float("-inf"))


@Blockwise
def _nt_xent_oracle(row: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    z, rows = F.normalize(torch.cat([z1, z2]), dim=1), 2 * len(z1)
    row = torch.cat([row, row + len(z1)])
    S = _without(z[row] @ z.T / TEMPERATURE, row)
    return F.cross_entropy(S, (row + len(z1)) % rows, reduction="sum") / rows


def _nt_xent_needs(size: Size, itemsize: int) -> dict[str, float]:
    """Measured as 3.3 to 3.6, 1.1 to 1.2, and 4.2 to 5.8 matrices. metric_learning: rows for each negative pair."""
    needs = square_matrices(naive=4, compile=2, lightly=6)(size, itemsize)
    return {**needs, "metric_learning": 4 * size[0] ** 3 * itemsize}


def _views_traffic(size: Size, itemsize: int) -> float:
    """Both passes read the rows, the backward pass writes their gradients; for each row, loss, shift and total are
    written, then read."""
    return 3 * size[0] * size[1] * itemsize + 6 * size[0] * 4


Benchmark(
    "nt_xent",
    sizes=(*small_batches(128), (2048, 128), (8192, 128), (8192, 512)),
    memory_sizes=((32768, 128), (131072, 128)),
    inputs=_views,
    # S is symmetric: half of its tiles forward, and backward where they could not be kept; two products with that half.
    flops=square_products(1.5, again=0.5),
    traffic=_views_traffic,
    needs=_nt_xent_needs,
    arguments={"temperature": TEMPERATURE},
    peers={
        "lightly": lambda: peers.lightly().NTXentLoss(TEMPERATURE),
        "metric_learning": lambda: peers.MetricLearningNTXent(TEMPERATURE),
    },
    oracle=_nt_xent_oracle,
)


def _queue_inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries that require gradients; their keys and a queue, of unit length, that do not."""
    keys, queries, dim = size
    q, k, queue = _rows((queries, dim), (queries, dim), (keys, dim))
    return q.to(dtype).requires_grad_(), k.to(dtype), F.normalize(queue, dim=1).to(dtype)


def _normalized_queue(loss: Loss, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """As MoCo has it: its queue keeps normalised keys."""
    return loss(F.normalize(queries, dim=1), F.normalize(keys, dim=1), queue)


@Blockwise
def _queue_oracle(row: Tensor, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    q, k = F.normalize(queries[row], dim=1), F.normalize(keys[row], dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / QUEUE_TEMPERATURE
    return F.cross_entropy(logits, torch.zeros_like(row), reduction="sum") / len(queries)


Benchmark(
    "info_nce",
    sizes=((4096, 64, 128), (65536, 256, 128), (65536, 1024, 128)),  # keys x queries x features: MoCo's queue
    memory_sizes=(),
    inputs=_queue_inputs,
    # The keys are constant: the product with the weights accumulates beside the log-sum-exp, and backward only scales.
    flops=lambda size: 2 * (2 * math.prod(size)),
    # The queue is read once; queries and their keys by both passes; the weighted sum of keys is written and read in
    # float32, the gradient written.
    traffic=lambda size, itemsize: (size[0] + 5 * size[1]) * size[2] * itemsize + 2 * size[1] * size[2] * 4,
    needs=lambda size, itemsize: {
        "naive": 4 * size[0] * size[1] * itemsize,  # measured as 3.1 to 3.2
        "compile": 3 * size[0] * size[1] * itemsize,  # 2.0 to 2.2
        "lightly": (4 * size[1] + 2 * size[2]) * size[0] * itemsize,
    },
    arguments={"temperature": QUEUE_TEMPERATURE, "normalize": False},
    call=_normalized_queue,
    peers={"lightly": lambda: peers.LightlyQueue(QUEUE_TEMPERATURE)},
    oracle=_queue_oracle,
    kernel="similarity_logsumexp",
)


def _queries_and_keys(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(z.to(dtype).requires_grad_() for z in _rows(size, size))


@Blockwise
def _in_batch_oracle(row: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    q, k = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    return F.cross_entropy(q[row] @ k.T / IN_BATCH_TEMPERATURE, row, reduction="sum") / len(q)


@Blockwise
def _symmetric_oracle(row: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    q, k = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    logits = (x[row] @ y.T / IN_BATCH_TEMPERATURE for x, y in ((q, k), (k, q)))
    return sum(F.cross_entropy(S, row, reduction="sum") for S in logits) / (2 * len(q))


IN_BATCH_SIZES = *((rows, 128) for rows in (32, 64, 128, 256, 512, 1024, 8192)), (256, 512), (256, 768)

Benchmark(
    "info_nce",
    sizes=IN_BATCH_SIZES,
    memory_sizes=((65536, 512),),
    inputs=_queries_and_keys,
    # S and its product with the keys forward; backward S again where it could not be kept, and its product with the
    # queries.
    flops=square_products(3, again=1),
    # Both sides are read by both passes and their gradients written, that of the queries in float32 in between; four
    # numbers a row are written and read.
    traffic=lambda size, itemsize: size[0] * size[1] * (6 * itemsize + 2 * 4) + 8 * size[0] * 4,
    needs=square_matrices(naive=4, compile=2),
    arguments={"temperature": IN_BATCH_TEMPERATURE},
    oracle=_in_batch_oracle,
    name="info_nce_in_batch",
)

Benchmark(
    "info_nce",
    sizes=IN_BATCH_SIZES,
    memory_sizes=(),
    inputs=_queries_and_keys,
    flops=square_products(3, again=1),  # as CLIP
    traffic=lambda size, itemsize: 6 * size[0] * size[1] * itemsize + 8 * size[0] * 4,
    needs=square_matrices(naive=5, compile=3),
    arguments={"temperature": IN_BATCH_TEMPERATURE, "symmetric": True},
    oracle=_symmetric_oracle,
    kernel="clip_loss",
    name="info_nce_symmetric",
)


def _named_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """Queries, their positive keys, shared keys, all of which require gradients, and the ids of each query's own."""
    queries, keys, negatives, dim = size
    q, k, shared = (z.to(dtype).requires_grad_() for z in _rows((queries, dim), (queries, dim), (keys, dim)))
    return q, k, shared, torch.randint(keys, (queries, negatives), generator=torch.Generator().manual_seed(3))


def _named(loss: Loss, queries: Tensor, keys: Tensor, shared: Tensor, ids: Tensor) -> Tensor:
    return loss(queries, keys, shared, negative_ids=ids)


def _cosine(queries: Tensor, keys: Tensor, shared: Tensor, ids: Tensor) -> Tensor:
    """As transformers' code of wav2vec 2.0 has it: cosines with the positive and its negatives, in one tensor."""
    all_keys = torch.cat([keys[:, None], shared[ids]], 1)
    logits = F.cosine_similarity(queries[:, None].float(), all_keys.float(), dim=-1) / IN_BATCH_TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.int64, device=queries.device))


Benchmark(
    "info_nce",
    sizes=((2048, 4096, 100, 256), (512, 2048, 100, 256)),  # queries x keys x negatives of each x features
    memory_sizes=(),
    inputs=_named_inputs,
    # A dot product forward, and a sum for either side.
    flops=lambda size: 3 * 2 * size[0] * size[2] * size[3],
    # As of a batch; the ids are read by both passes, a number for each is written and read.
    traffic=lambda size, itemsize: (size[0] + size[1]) * size[3] * 6 * itemsize + size[0] * size[2] * 24,
    # Gathered keys and their gradient; and for cosines as many of both in float32.
    needs=lambda size, itemsize: {
        "naive": 3 * size[0] * size[2] * size[3] * itemsize,
        "compile": 3 * size[0] * size[2] * size[3] * itemsize,
        "cosine": 8 * size[0] * size[2] * size[3] * 4,
    },
    arguments={"temperature": IN_BATCH_TEMPERATURE},
    call=_named,
    peers={"cosine": lambda: _cosine},
    kernel="selected_logsumexp",
    name="info_nce_of_ids",
)


def _paired_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    queries, negatives, dim = size
    q, k, own = (z.to(dtype) for z in _rows((queries, dim), (queries, dim), (queries * negatives, dim)))
    return q.requires_grad_(), k.requires_grad_(), own.view(queries, negatives, dim).requires_grad_()


Benchmark(
    "info_nce",
    sizes=((2048, 100, 256), (256, 15, 768)),  # queries x negatives of each x features
    memory_sizes=(),
    inputs=_paired_inputs,
    flops=lambda size: 3 * 2 * math.prod(size),
    # Negatives are read by both passes, and their gradient is written.
    traffic=lambda size, itemsize: 3 * math.prod(size) * itemsize,
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), 4 * math.prod(size) * itemsize),
    arguments={"temperature": IN_BATCH_TEMPERATURE, "negative_mode": "paired"},
    kernel="selected_logsumexp",
    name="info_nce_paired",
)


def _clip_inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Images and texts of unit length, and the logit scale, all of which require gradients."""
    return *unit_pairs(size, dtype), torch.tensor(LOGIT_SCALE, requires_grad=True)


@Blockwise
def _clip_oracle(row: Tensor, images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    losses = (
        F.cross_entropy(scale * x[row] @ y.T, row, reduction="sum") for x, y in ((images, texts), (texts, images))
    )
    return sum(losses) / (2 * len(images))


Benchmark(
    "clip_loss",
    sizes=(*small_batches(512), (2048, 512), (8192, 512)),
    memory_sizes=((65536, 512),),
    inputs=_clip_inputs,
    # S forward, and backward where it could not be kept; a product with it for either side.
    flops=square_products(3, again=1),
    # Both sides are read twice, and their gradients written; totals and shifts of both are written and read.
    traffic=lambda size, itemsize: 6 * size[0] * size[1] * itemsize + 8 * size[0] * 4,
    needs=square_matrices(naive=5, compile=3, open_clip=5),  # measured as 4.2, 2.1, 4.3
    peers={"open_clip": lambda: peers.open_clip().ClipLoss()},
    oracle=_clip_oracle,
)


def _labelled(size: Size, dtype: torch.dtype) -> tuple[Tensor, ...]:
    labels = torch.randint(CLASSES, size[:1], generator=torch.Generator().manual_seed(1))
    return _rows(size)[0].to(dtype).requires_grad_(), labels


@Blockwise
def _sup_con_oracle(row: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(features, dim=1)
    S = z[row] @ z.T / LABEL_TEMPERATURE
    positive = (labels[row, None] == labels) & (torch.arange(len(z), device=z.device) != row[:, None])
    count = positive.sum(1)
    loss = _without(S, row).logsumexp(1) - S.where(positive, 0).sum(1) / count.clamp_min(1)
    return loss.where(count > 0, 0).sum() / len(z)


Benchmark(
    "sup_con",
    sizes=(*small_batches(128), (2048, 128), (8192, 128)),
    memory_sizes=((65536, 512),),
    inputs=_labelled,
    flops=square_products(1.5, again=0.5),  # as NT-Xent
    # As NT-Xent; the sums of each label add a read and a write, forward and backward.
    traffic=lambda size, itemsize: _views_traffic(size, itemsize) + 4 * size[0] * size[1] * itemsize,
    needs=square_matrices(naive=6, compile=2, metric_learning=14),  # measured as 5.6, 1.1, 12.3
    arguments={"temperature": LABEL_TEMPERATURE},
    peers={"metric_learning": lambda: peers.metric_learning_sup_con(LABEL_TEMPERATURE)},
    oracle=_sup_con_oracle,
)


@Blockwise
def _dcl_oracle(row: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    loss = 0
    for x, y in ((z1, z2), (z2, z1)):
        S = torch.cat([_without(x[row] @ z.T / LABEL_TEMPERATURE, row) for z in (x, y)], 1)
        loss = loss + (S.logsumexp(1) - (x[row] * y[row]).sum(1) / LABEL_TEMPERATURE).sum()
    return loss / (2 * len(z1))


Benchmark(
    "dcl",
    sizes=(*small_batches(128), (8192, 128)),
    memory_sizes=(),
    inputs=_views,
    flops=square_products(1.5, again=0.5),  # as NT-Xent
    traffic=_views_traffic,
    needs=square_matrices(naive=4, compile=3, lightly=7),  # measured as 3.1, 1.6 to 2.0, 5.6 to 6.6
    arguments={"temperature": LABEL_TEMPERATURE},
    peers={"lightly": lambda: peers.lightly().DCLLoss(LABEL_TEMPERATURE)},
    oracle=_dcl_oracle,
)
