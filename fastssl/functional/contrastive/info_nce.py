"""InfoNCE: queries, their positive keys, and negative keys from a batch or a queue."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import cross_entropy, dot, finish, inverse, kept, logsumexp, needs_gradient, unit
from fastssl._checks import (
    check_flag,
    check_group,
    check_ids,
    check_negatives,
    check_pair,
    check_reduction,
    check_share,
    check_temperature,
)
from fastssl._exponential_sums import Sums, bytes_to_keep_for, joined, row_sums
from fastssl._reductions import reduce
from fastssl.distributed import ProcessGroup, Ring
from fastssl.functional.contrastive.pairs import mean_row, pair_loss, pair_metrics
from fastssl.ops import contrastive, current_backend
from fastssl.ops._precision import product_precision, widen


@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = ..., *, negative_ids: Tensor | None = ...,
    temperature: float | Tensor = ..., negative_mode: str = ..., in_batch_negatives: bool | None = ...,
    symmetric: bool = ..., normalize: bool = ..., label_smoothing: float = ..., reduction: str = ...,
    return_metrics: Literal[False] = ..., group: ProcessGroup | None = ...,
) -> Tensor: ...

@overload
def info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = ..., *, negative_ids: Tensor | None = ...,
    temperature: float | Tensor = ..., negative_mode: str = ..., in_batch_negatives: bool | None = ...,
    symmetric: bool = ..., normalize: bool = ..., label_smoothing: float = ..., reduction: str = ...,
    return_metrics: Literal[True], group: ProcessGroup | None = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    negative_ids: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    negative_mode: str = "unpaired",
    in_batch_negatives: bool | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""InfoNCE (CPC, arXiv:1807.03748): each query must find its positive key among negative keys.

        loss_i = -log( exp(<q_i, k_i> / temperature) / sum_k exp(<q_i, k> / temperature) )

    where k runs over the positive key of query i and its negatives: those of `negative_keys` (a queue, as in MoCo,
    arXiv:1911.05722), or those of them that it names by their ids (wav2vec 2.0, arXiv:2006.11477), the positive keys of
    the other queries (SimCSE, arXiv:2104.08821; MoCo v3, arXiv:2104.02057), or both (SimCSE with hard negatives).

    The similarities with shared keys are never stored: memory is O((B + K) D). With ids, keys are read where they are,
    and memory is O((B + N) D + B K). Keys without `requires_grad` cost nothing in the backward pass, and may be
    overwritten before it, unless `symmetric`.

    Args:
        query: (B, D) float32, bfloat16, float16 or float64.
        positive_key: (B, D), of query's dtype and device.
        negative_keys: (K, D), negatives of every query, or with negative_mode "paired" (B, K, D), K for each, or with
            negative_ids (N, D).
        negative_ids: (B, K) int64 or int32, the rows of negative_keys that are a query's negatives, in any order, such
            as `sample_negatives` draws; those below 0 are none. None: negative_mode says which are.
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        negative_mode: "unpaired" or "paired", the shape of negative_keys.
        in_batch_negatives: whether other queries' positive keys are negatives; None: where there are no
            negative_keys.
        symmetric: take the mean of this loss and the one with queries and positive keys exchanged; only where other
            rows of the batch are the only negatives.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        label_smoothing: the share of the target that is spread over all of a query's keys, as in
            `torch.nn.functional.cross_entropy`; only where other rows of the batch are the only negatives.
        reduction: "mean" over the B queries, "sum", or "none".
        return_metrics: also return the metrics that people log; they cost no further product.
        group: processes that each hold a part of the batch, see `clip_loss`; with in_batch_negatives, the positive keys
            of all of them are a query's negatives. negative_keys stay where they are.

    Returns:
        0-d loss, or with "none" (B,) losses, in query's dtype, float32 under autocast. The mean over an empty batch is
        NaN. A query without negatives has loss 0. With return_metrics, (loss, metrics); the metrics are detached 0-d
        float32 tensors: "accuracy", the share of queries that are more similar to their positive key than to any
        negative (if symmetric, over both directions); "positive_similarity", the mean `<q_i, k_i>`; "alignment", the
        mean `|q_i - k_i|^2` (arXiv:2005.10242).

    Raises:
        TypeError: if query, positive_key, negative_keys or negative_ids is no tensor, or temperature neither number nor
            tensor.
        IndexError: on the CPU, if one of negative_ids is not below N. On CUDA an assertion stops the process.
        ValueError: if shapes, dtypes, devices or options do not fit, or temperature is a number that is zero or not
            finite (as a tensor: NaN comes out), or on every process, if those of group differ in shapes, dtypes or
            requires_grad.
    """
    query, positive_key = check_pair(query, positive_key, "query", "positive_key")
    query, positive_key, negative_keys = check_negatives(query, positive_key, negative_keys, negative_mode)
    if negative_ids is not None:
        _check_negative_ids(negative_ids, query, negative_keys, negative_mode)
    if in_batch_negatives is None:
        in_batch_negatives = negative_keys is None
    in_batch_negatives = check_flag("in_batch_negatives", in_batch_negatives)
    symmetric, normalize = check_flag("symmetric", symmetric), check_flag("normalize", normalize)
    return_metrics = check_flag("return_metrics", return_metrics)
    label_smoothing = check_share("label_smoothing", label_smoothing)
    for name, value in (("symmetric", symmetric), ("label_smoothing", label_smoothing)):
        if value and (negative_keys is not None or not in_batch_negatives):
            raise ValueError(f"{name} must be {type(value)(0)} unless all negatives are from the batch, got {value}")
    temperature = check_temperature(temperature, query)
    check_reduction(reduction)
    check_group(group)
    if current_backend() == "reference":
        positive_key, negative_keys = (None if x is None else kept(x) for x in (positive_key, negative_keys))
        return reference.contrastive.info_nce(
            query, positive_key, negative_keys, negative_ids=negative_ids, temperature=temperature,
            negative_mode=negative_mode,
            in_batch_negatives=in_batch_negatives, symmetric=symmetric, normalize=normalize,
            label_smoothing=label_smoothing, reduction=reduction, return_metrics=return_metrics,
        )  # fmt: skip
    precision, scale = product_precision(query), inverse(temperature, query)
    ring = None
    if group is not None and in_batch_negatives:
        ring = Ring(group, query=query, positive_key=positive_key, temperature=scale)
    whole = negative_keys is None and in_batch_negatives and ring is None  # one operation, norms included
    q, k, others = query, positive_key, negative_keys
    if negative_mode == "paired" and others is not None:
        negative_ids = torch.arange(others.shape[0] * others.shape[1], device=q.device).view(others.shape[:2])
        others = others.flatten(0, 1)
    if not whole and normalize:
        q, k = unit(q), unit(k)
        others = others if others is None or negative_ids is not None else unit(others)
    elif not whole:
        k = kept(k)
    if symmetric:
        loss, sums = pair_loss(q, k, scale, None, label_smoothing, reduction, precision, ring, normalize)
        directions = [[pair] for pair in sums]
    else:
        if whole:
            weigh = needs_gradient(q, k, scale)
            keep = bytes_to_keep_for(k, precision, (q, k, scale))
            loss, _, *sums = contrastive.info_nce(
                q, k, scale, label_smoothing, reduction, normalize, weigh, keep, precision
            )[:4]
            directions = [[sums]]
        else:
            keys = k if in_batch_negatives else None
            sums = _sums_of_negatives(q, keys, others, negative_ids, scale, normalize, precision, ring)
            positive = dot(q, k) * scale
            negatives = logsumexp(*joined(sums)) if sums else torch.full_like(positive, float("-inf"))
            loss = cross_entropy(negatives, positive)
            directions = [sums]
            if label_smoothing:
                loss = loss + label_smoothing * scale * (dot(q, k) - dot(q, mean_row(k, ring)))
            loss = reduce(loss, reduction)
    loss = finish(loss, "none", query)
    if not return_metrics:
        return loss
    if whole and normalize:
        q, k = unit(q.detach()), unit(k.detach())
    accuracy, metrics = pair_metrics(q, k, scale, directions)
    return loss, {"accuracy": torch.stack(accuracy).mean(), **metrics}


def _check_negative_ids(negative_ids: Tensor, query: Tensor, negative_keys: Tensor | None, negative_mode: str) -> None:
    if negative_keys is None:
        raise ValueError("negative_keys must be given with negative_ids, got None")
    if negative_mode != "unpaired":
        raise ValueError(f"negative_mode must be 'unpaired' with negative_ids, got {negative_mode!r}")
    check_ids("negative_ids", negative_ids, query, "query")
    if current_backend() == "reference" and not negative_ids.is_meta and (negative_ids >= len(negative_keys)).any():
        raise IndexError(f"negative_ids must be below {len(negative_keys)}, got {negative_ids.max()}")


def _sums_of_negatives(
    q: Tensor,
    keys: Tensor | None,
    others: Tensor | None,
    ids: Tensor | None,
    scale: Tensor,
    normalize: bool,
    precision: str,
    ring: Ring | None,
) -> list[Sums]:
    """Of `keys`, those of the batch without a query's own, and of `others`, in as few parts as there are: of all of
    them, or of those that each query names by `ids`, which are then to be normalised."""
    sums, shared = [], [keys] if keys is not None and ring is None else []
    if others is not None and ids is None:
        shared.append(others)
    elif others is not None:
        weigh = needs_gradient(q, others, scale)
        sums.append(contrastive.selected_logsumexp(widen(q), others, ids.long(), scale, normalize, weigh)[:2])
    own = None if keys is None else torch.arange(q.shape[0], device=q.device)
    if ring is not None:
        sums.append(row_sums(q, keys, scale, own, precision, ring))
    if shared:
        columns = torch.cat(shared) if len(shared) > 1 else shared[0]  # a queue is not to be copied
        sums.append(row_sums(q, columns, scale, own if ring is None else None, precision))
    return sums
