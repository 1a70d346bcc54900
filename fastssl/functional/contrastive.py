"""Contrastive losses by softmax, and what is made of the same similarities."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import reference
from fastssl._checks import (
    check_alike,
    check_features,
    check_group,
    check_labels,
    check_negatives,
    check_pair,
    check_reduction,
    check_rows,
    check_scalar,
    check_share,
    check_temperature,
    check_vector,
)
from fastssl.distributed import ProcessGroup, Ring, mean_over_processes
from fastssl.functional._shared import (
    as_scalar,
    dot,
    finish,
    inverse,
    logsumexp,
    needs_gradient,
    unit,
    without_autocast,
)
from fastssl.ops import contrastive, current_backend
from fastssl.ops._precision import accumulate_dtype, product_precision

Sums = tuple[Tensor, Tensor]  # (total, shift) of the exponentials of similarities: log-sum-exp = log(total) + shift
_TOPK_COLUMNS, _TOPK_ELEMENTS = 1 << 14, 1 << 22  # of a block of similarities


def nt_xent(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    r"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (arXiv:2002.05709).

    Row i of z1 and row i of z2 embed two views of one image. Each of the 2B rows of [z1; z2] must pick its
    partner among the 2B - 1 others:

        loss_i = -log( exp(<z_i, z_pos(i)> / temperature) / sum_{j != i} exp(<z_i, z_j> / temperature) )

    The 2B x 2B similarities are never stored: memory is O(B D).

    Args:
        z1: (B, D) embeddings of the first views; float32, bfloat16, float16 or float64.
        z2: (B, D) embeddings of the second views, of z1's dtype and device.
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
            A negative one is taken as it stands.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        reduction: "mean" over the 2B rows, "sum", or "none".

    Returns:
        0-d loss, or with "none" (2B,) losses, those of z1's rows first; in z1's dtype, float32 under autocast.
        The mean over an empty batch is NaN. NaN and Inf in z1 or z2 come out as NaN.

    Raises:
        TypeError: if z1 or z2 is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is zero or not finite
            (as a tensor: NaN comes out), or reduction is unknown.
    """
    check_pair(z1, z2)
    check_temperature(temperature)
    check_reduction(reduction)
    if current_backend() == "reference":
        return reference.contrastive.nt_xent(z1, z2, temperature=temperature, normalize=normalize, reduction=reduction)
    loss, _, _ = contrastive.nt_xent(z1, z2, inverse(temperature, z1), normalize, product_precision(z1))
    return finish(loss, reduction, z1)


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    r"""Log-sum-exp of the similarities of each row of x with all rows of y, as softmax contrastive losses need it.

        lse_i = log sum_{j != exclude[i]} exp(scale <x_i, y_j>) - offset_i

    Against a queue of negatives (MoCo, arXiv:1911.05722), with `pos` the scaled similarities of the positive pairs,
    InfoNCE is `softplus(similarity_logsumexp(x, queue, scale=s, offset=pos))`; against a batch that holds the
    positives, it is `similarity_logsumexp(x, y, scale=s, offset=pos)`.

    The M x N similarities are never stored: memory is O((M + N) D). A y that needs no gradient may be overwritten
    between the forward and the backward pass, as a queue is; a second derivative needs its values and then raises.

    Args:
        x: (M, D) rows; float32, bfloat16, float16 or float64. They are not normalised here.
        y: (N, D) rows, of x's dtype and device.
        scale: multiplies the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        exclude: (M,) int64, the column to leave out of each row; -1, or any number that is no column, leaves none out.
        offset: (M,) subtracted from each row's result, which is then as accurate as the difference is small.

    Returns:
        (M,) in float32, in float64 for float64. Minus infinity where no column is left, with a gradient of zero.
        NaN where a similarity that is not left out is NaN or plus infinity.

    Raises:
        TypeError: if x, y, exclude or offset is no tensor, or scale neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, or scale is a number that is not finite.
    """
    check_rows("x", x, "(M, D)")
    check_rows("y", y, "(N, D)")
    check_features("x", x, "y", y)
    check_alike("x", x, "y", y)
    check_scalar("scale", scale)
    if exclude is not None:
        check_vector("exclude", exclude, x)
        if exclude.dtype != torch.int64:
            raise ValueError(f"exclude must have dtype torch.int64, got {exclude.dtype}")
    if offset is not None:
        check_vector("offset", offset, x)
    if current_backend() == "reference":
        return reference.contrastive.similarity_logsumexp(x, y, scale=scale, exclude=exclude, offset=offset)
    lse = logsumexp(*_row_sums(x, y, as_scalar(scale, x), exclude, product_precision(x)))
    return lse if offset is None else lse - offset


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
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
    arXiv:1911.05722), the positive keys of the other queries (SimCSE, arXiv:2104.08821; MoCo v3, arXiv:2104.02057),
    or both (SimCSE with hard negatives).

    The similarities with shared keys are never stored: memory is O((B + K) D). Keys without `requires_grad` cost
    nothing in the backward pass, and may be overwritten before it if `normalize` is False.

    Args:
        query: (B, D) float32, bfloat16, float16 or float64.
        positive_key: (B, D), of query's dtype and device.
        negative_keys: (K, D), negatives of every query, or with negative_mode "paired" (B, K, D), K for each.
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        negative_mode: "unpaired" or "paired", the shape of negative_keys.
        in_batch_negatives: whether other queries' positive keys are negatives; None: where there are no
            negative_keys.
        symmetric: the mean of this loss and that in which queries and positive keys have changed places; only
            where other rows of the batch are the only negatives.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        label_smoothing: the share of the target that is spread over all of a query's keys, as in
            `torch.nn.functional.cross_entropy`; only where other rows of the batch are the only negatives.
        reduction: "mean" over the B queries, "sum", or "none".
        return_metrics: also return what people log, at no further product.
        group: processes that hold a part of the batch each, see `clip_loss`; where in_batch_negatives are, the positive
            keys of all of them are a query's negatives. negative_keys stay where they are.

    Returns:
        0-d loss, or with "none" (B,) losses, in query's dtype, float32 under autocast. The mean over an empty batch
        is NaN. A query without negatives has loss 0. With return_metrics (loss, metrics), detached 0-d float32
        tensors: "accuracy", the share of queries that are more similar to their positive key than to any negative
        (where symmetric, of both directions); "positive_similarity", the mean <q_i, k_i>; "alignment", the mean
        |q_i - k_i|^2 (arXiv:2005.10242).

    Raises:
        TypeError: if query, positive_key or negative_keys is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes, devices or options do not fit, or temperature is a number that is zero or not
            finite (as a tensor: NaN comes out), or on every process, if those of group differ in shapes, dtypes or
            requires_grad.
    """
    check_pair(query, positive_key, "query", "positive_key")
    check_negatives(query, negative_keys, negative_mode)
    if in_batch_negatives is None:
        in_batch_negatives = negative_keys is None
    check_share("label_smoothing", label_smoothing)
    for name, value in (("symmetric", symmetric), ("label_smoothing", label_smoothing)):
        if value and (negative_keys is not None or not in_batch_negatives):
            raise ValueError(f"{name} must be {type(value)(0)} unless all negatives are from the batch, got {value}")
    check_temperature(temperature)
    check_reduction(reduction)
    check_group(group)
    if current_backend() == "reference":
        return reference.contrastive.info_nce(
            query, positive_key, negative_keys, temperature=temperature, negative_mode=negative_mode,
            in_batch_negatives=in_batch_negatives, symmetric=symmetric, normalize=normalize,
            label_smoothing=label_smoothing, reduction=reduction, return_metrics=return_metrics,
        )  # fmt: skip
    precision, scale = product_precision(query), inverse(temperature, query)
    q, k, others = (unit(x) if normalize and x is not None else x for x in (query, positive_key, negative_keys))
    ring = None
    if group is not None and in_batch_negatives:
        ring = Ring(group, query=q, positive_key=k, temperature=scale)
    if symmetric:
        loss, sums = _pair_loss(q, k, scale, None, label_smoothing, precision, ring)
        directions = [[pair] for pair in sums]
    else:
        sums, shared = [], [k] if in_batch_negatives and ring is None else []
        if negative_mode == "unpaired" and others is not None:
            shared.append(others)
        elif others is not None:
            sums.append(_sum_exponentials(dot(q[:, None], others) * scale))
        own = torch.arange(q.shape[0], device=q.device) if in_batch_negatives else None
        if ring is not None:
            sums.append(_row_sums(q, k, scale, own, precision, ring))
        if shared:
            keys = torch.cat(shared) if len(shared) > 1 else shared[0]  # a queue is not to be copied
            sums.append(_row_sums(q, keys, scale, own if ring is None else None, precision))
        similarity = dot(q, k)
        negatives = [logsumexp(*pair) for pair in sums] or [torch.full_like(similarity, float("-inf"))]
        loss = _cross_entropy(functools.reduce(torch.logaddexp, negatives), similarity * scale)
        if label_smoothing:
            loss = loss + label_smoothing * scale * (similarity - dot(q, _mean(k, ring)))
        directions = [sums]
    loss = finish(loss, reduction, query)
    if not return_metrics:
        return loss
    accuracy, metrics = _metrics(q, k, scale, directions)
    return loss, {"accuracy": torch.stack(accuracy).mean(), **metrics}


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""The symmetric softmax loss of CLIP (arXiv:2103.00020), with labels that of UniCL (arXiv:2204.03610).

    With S = logit_scale image_features text_features^T, each image must find its text among all texts, and each text
    its image among all images:

        loss_i = 1/2 (log sum_j exp(S_ij) - S_ii) + 1/2 (log sum_j exp(S_ji) - S_ii)

    With labels, a row's positives are all columns of the same label, and S_ii becomes their mean similarity.
    The B x B logits are never stored: memory is O(B D).

    Args:
        image_features: (B, D) rows, normalised by the caller; float32, bfloat16, float16 or float64.
        text_features: (B, D), of image_features' dtype and device.
        logit_scale: multiplies the similarities (in CLIP exp of a parameter): a number, or a 0-d tensor, which
            gets its exact gradient.
        labels: (B,) int64, the label of each pair; None: every pair has its own.
        label_smoothing: the share of the target that is spread over all columns, as in
            `torch.nn.functional.cross_entropy`.
        reduction: "mean" over the B pairs, "sum", or "none".
        return_metrics: also return what people log, at no further product.
        group: processes that hold B pairs each of one batch: the images and texts of all of them are a pair's
            negatives. None: this process alone. All must call this, and the backward pass, with the same arguments
            but for the features. The texts travel from one to the next (`fastssl.distributed`): nobody holds the
            whole batch. Without labels only.

    Returns:
        0-d loss, or with "none" (B,) losses, in image_features' dtype, float32 under autocast. The mean over an
        empty batch is NaN. With return_metrics (loss, metrics), detached 0-d float32 tensors: "image_accuracy" and
        "text_accuracy", the shares of images and of texts whose own partner is more similar than any other (not with
        labels); "positive_similarity", the mean <image_i, text_i>; "alignment", the mean |image_i - text_i|^2
        (arXiv:2005.10242).

        With a group, the loss (and metrics) of this process's pairs. The mean over the processes of their mean losses
        is that of one process on the whole batch. Gradients of features are those of the sum of the processes' losses,
        and of logit_scale each process gets a share of that: averaged over the processes, as DistributedDataParallel
        does, gradients of parameters are those of one process on the whole batch. There are no second derivatives.

    Raises:
        TypeError: if features or labels are no tensors, or logit_scale neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, or logit_scale is a number that is not finite, or on every
            process, if those of group differ in shapes, dtypes or requires_grad.
    """
    check_pair(image_features, text_features, "image_features", "text_features")
    check_scalar("logit_scale", logit_scale)
    check_share("label_smoothing", label_smoothing)
    check_reduction(reduction)
    if labels is not None:
        check_labels(labels, image_features, "image_features")
        if group is not None:
            raise ValueError(f"labels must be None where there is a group, got shape {tuple(labels.shape)}")
    check_group(group)
    if current_backend() == "reference":
        return reference.contrastive.clip_loss(
            image_features, text_features, logit_scale, labels=labels, label_smoothing=label_smoothing,
            reduction=reduction, return_metrics=return_metrics,
        )  # fmt: skip
    scale, precision = as_scalar(logit_scale, image_features), product_precision(image_features)
    ring = None
    if group is not None:
        ring = Ring(group, image_features=image_features, text_features=text_features, logit_scale=scale)
    loss, sums = _pair_loss(image_features, text_features, scale, labels, label_smoothing, precision, ring)
    loss = finish(loss, reduction, image_features)
    if not return_metrics:
        return loss
    negatives = [] if labels is not None else [[pair] for pair in sums]
    accuracies, metrics = _metrics(image_features, text_features, scale, negatives)
    return loss, {**dict(zip(("image_accuracy", "text_accuracy"), accuracies, strict=False)), **metrics}


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Supervised contrastive learning (SupCon, arXiv:2004.11362), its L_out: the positives are outside of the log.

        loss_i = log sum_{j != i} exp(S_ij) - mean_{j in P(i)} S_ij,    S = z z^T / temperature,

    P(i) being the other rows of row i's label. A row without any has loss 0, and counts in the mean. The N x N
    similarities are never stored: memory is O(N D).

    Args:
        features: (N, D) rows, or (B, V, D), V views of each sample; float32, bfloat16, float16 or float64.
        labels: (N,) or (B,) int64, the label of each row or sample.
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        reduction: "mean" over the rows, "sum", or "none": (N,), or (B, V) losses.

    Returns:
        The loss in features' dtype, float32 under autocast. The mean over an empty batch is NaN.

    Raises:
        TypeError: if features or labels is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is zero or not finite (as a
            tensor: NaN comes out), or reduction is unknown.
    """
    views = isinstance(features, Tensor) and features.dim() == 3
    check_rows("features", features, "(N, D) or (B, V, D)", 3 if views else 2)
    check_labels(labels, features, "features")
    check_temperature(temperature)
    check_reduction(reduction)
    if current_backend() == "reference":
        return reference.contrastive.sup_con(
            features, labels, temperature=temperature, normalize=normalize, reduction=reduction
        )
    scale, precision = inverse(temperature, features), product_precision(features)
    rows = features
    if views:
        rows, labels = features.flatten(0, 1), labels.repeat_interleave(features.shape[1])
    loss, _, _ = contrastive.sup_con(rows, labels, scale, normalize, precision)
    return finish(loss.view(features.shape[:-1]), reduction, features)


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""The decoupled contrastive loss (DCL, arXiv:2110.06848): NT-Xent without the positive in the denominator.

        loss_i = -w_i <z1_i, z2_i> / T + log sum_{j != i} (exp(<z1_i, z1_j> / T) + exp(<z1_i, z2_j> / T))

    and likewise for the rows of z2, T being the temperature. Memory is O(B D).

    Args:
        z1: (B, D) embeddings of the first views; float32, bfloat16, float16 or float64.
        z2: (B, D) embeddings of the second views, of z1's dtype and device.
        temperature: T, a number, or a 0-d tensor, which gets its exact gradient.
        weight_fn: (rows, partners) -> (B,) weights w of the positives, called for either side with its (normalised)
            rows and those of the other; None: 1.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.
        reduction: "mean" over the 2B rows, "sum", or "none".

    Returns:
        0-d loss, or with "none" (2B,) losses, those of z1's rows first; in z1's dtype, float32 under autocast. The
        mean over an empty batch is NaN, and a pair alone has no negatives: minus infinity.

    Raises:
        TypeError: if z1 or z2 is no tensor, or temperature neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, temperature is a number that is zero or not finite (as a
            tensor: NaN comes out), or reduction is unknown.
    """
    check_pair(z1, z2)
    check_temperature(temperature)
    check_reduction(reduction)
    if current_backend() == "reference":
        return reference.contrastive.dcl(
            z1, z2, temperature=temperature, weight_fn=weight_fn, normalize=normalize, reduction=reduction
        )
    scale, precision = inverse(temperature, z1), product_precision(z1)
    x, y = (unit(z) if normalize else z for z in (z1, z2))
    positive = dot(x, y) * scale
    own = torch.arange(x.shape[0], device=x.device)
    across = [logsumexp(*pair) for pair in _pair_sums(x, y, scale, own, precision)]
    losses = []
    for rows, partners, lse in ((x, y, across[0]), (y, x, across[1])):
        within = logsumexp(*contrastive.self_logsumexp(rows, scale, precision))
        aligned = positive if weight_fn is None else positive * weight_fn(rows, partners)
        losses.append(torch.logaddexp(within, lse) - aligned)
    return finish(torch.cat(losses), reduction, z1)


def uniformity(x: Tensor, *, t: float | Tensor = 2.0) -> Tensor:
    r"""How unevenly directions are spread over the sphere (arXiv:2005.10242): the logarithm of the mean potential.

        log mean_{i != j} exp(-t |z_i - z_j|^2),    |z_i - z_j|^2 = 2 - 2 <z_i, z_j>,    z_i = x_i / |x_i|

    It is 0 where all rows have one direction, and the lower, the more evenly they are spread. The N x N distances are
    never stored: memory is O(N D).

    Args:
        x: (N, D) rows, each divided by its Euclidean norm, as `torch.nn.functional.normalize` does; float32, bfloat16,
            float16 or float64. A row of zeros counts as orthogonal to all.
        t: multiplies the squared distances: a number, or a 0-d tensor, which gets its exact gradient.

    Returns:
        0-d, in x's dtype, float32 under autocast. NaN of fewer than two rows.

    Raises:
        TypeError: if x is no tensor, or t neither number nor tensor.
        ValueError: if x has another shape or dtype, or t is a number that is not finite.
    """
    check_rows("x", x, "(N, D)")
    check_scalar("t", t)
    if current_backend() == "reference":
        return reference.contrastive.uniformity(x, t=t)
    scale = 2 * as_scalar(t, x)
    total, shift = contrastive.self_logsumexp(unit(x), scale, product_precision(x))
    potential = (total / (x.shape[0] - 1)).log() + (shift - scale)  # the logarithm of each row's mean
    peak = potential.detach().logsumexp(0)
    return finish((potential - peak).exp().mean().log() + peak, "none", x)


@torch.no_grad()
def topk_similarity(query: Tensor, bank: Tensor, k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` most similar to each row of `query`, as k-nearest-neighbour evaluation asks for them.

    The M x N similarities are never stored: memory is O(M k) and a block. There are no gradients. The products are
    float32 ones of 16-bit inputs too, and follow `torch.set_float32_matmul_precision`.

    Args:
        query: (M, D) rows; float32, bfloat16, float16 or float64.
        bank: (N, D) rows, of query's dtype and device.
        k: how many, from 1 to N.
        normalize: divide each row by its Euclidean norm, as `torch.nn.functional.normalize` does.

    Returns:
        (values, indices), each (M, k): the similarities, descending, in float32, in float64 for float64; and the rows
        of bank that have them, int64. Which of equal similarities are taken, and in which order, is unspecified, as
        in `torch.topk`. NaN counts as the largest, as there.

    Raises:
        TypeError: if query or bank is no tensor, or k no integer.
        ValueError: if shapes, dtypes or devices do not fit, or k is below 1 or above N.
    """
    check_rows("query", query, "(M, D)")
    check_rows("bank", bank, "(N, D)")
    check_features("query", query, "bank", bank)
    check_alike("query", query, "bank", bank)
    if not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"k must be from 1 to the number of rows of bank, {bank.shape[0]}, got {k}")
    columns = max(k, _TOPK_COLUMNS)
    step = max(1, _TOPK_ELEMENTS // columns)
    values = query.new_empty((query.shape[0], k), dtype=accumulate_dtype(query.dtype))
    indices = query.new_empty((query.shape[0], k), dtype=torch.int64)
    for row in range(0, query.shape[0], step):
        rows = slice(row, row + step)
        for column in range(0, bank.shape[0], columns):
            S = _similarity(query[rows], bank[column : column + columns], normalize)
            best = S.topk(min(k, S.shape[1]), dim=1)
            found = best.indices + column
            if column:
                best = torch.cat([values[rows], best.values], 1).topk(k, dim=1)
                found = torch.cat([indices[rows], found], 1).gather(1, best.indices)
            values[rows], indices[rows] = best.values, found
    return values, indices


def _similarity(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """x y^T, in the dtype of sums, under autocast too."""
    x, y = (unit(t) if normalize else t.to(accumulate_dtype(t.dtype)) for t in (x, y))
    with without_autocast(x):
        return x @ y.T


def _mean(x: Tensor, ring: Ring | None = None) -> Tensor:
    """The mean row, of all processes in a ring, in the dtype of sums."""
    mean = x.mean(0, dtype=accumulate_dtype(x.dtype))
    return mean if ring is None else mean_over_processes(mean, ring.group)


def _sum_exponentials(S: Tensor) -> Sums:
    """(total, shift) of the rows of a matrix that is stored, as the operations give them."""
    shift = F.pad(S.detach(), (0, 1), value=float("-inf")).amax(1)
    shift = shift.where(shift != float("-inf"), 0)
    return (S - shift[:, None]).exp().sum(1), shift


def _row_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str, ring: Ring | None = None
) -> Sums:
    if ring is not None:
        return ring.similarity_logsumexp(x, y, scale, exclude, precision)
    weigh = needs_gradient(x, y, scale)
    return contrastive.similarity_logsumexp(x, y, scale, exclude, weigh, precision)[:2]


def _pair_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str, ring: Ring | None = None
) -> tuple[Sums, Sums]:
    """Those of the rows, and those of the columns."""
    pair_logsumexp = contrastive.pair_logsumexp if ring is None else ring.pair_logsumexp
    sums = pair_logsumexp(x, y, scale, exclude, precision)
    return sums[:2], sums[2:]


def _largest(sums: list[Sums]) -> Tensor | float:
    """The largest similarity that any of the sums has in each row, minus infinity where there is none."""
    shifts = [shift.where(total != 0, float("-inf")) for total, shift in sums]
    return torch.stack(shifts).amax(0) if shifts else float("-inf")


def _cross_entropy(negatives: Tensor, positive: Tensor) -> Tensor:
    """log(exp(positive) + exp(negatives)) - positive, without cancellation."""
    return -F.logsigmoid(positive - negatives) * (1 + 0 * positive.detach())  # NaN, not 0, where positive is infinite


def _pair_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    label_smoothing: float,
    precision: str,
    ring: Ring | None = None,
) -> tuple[Tensor, tuple[Sums, Sums]]:
    """The mean of the cross-entropies of row i and of column i of scale x y^T, and the sums over the negatives of both.

    The positive is the diagonal, or with labels all rows and columns of the same label alike, and then the sums are
    over all.
    """
    if labels is None and ring is None:
        loss, _, *sums = contrastive.clip_loss(x, y, scale, precision)
        sums = sums[:2], sums[2:]
        aligned = dot(x, y) if label_smoothing else None
    else:
        own = torch.arange(x.shape[0], device=x.device) if labels is None else None
        sums = _pair_sums(x, y, scale, own, precision, ring)
        rows, columns = (logsumexp(*pair) for pair in sums)
        if labels is None:
            aligned = dot(x, y)
            loss = (_cross_entropy(rows, aligned * scale) + _cross_entropy(columns, aligned * scale)) / 2
        else:
            (of_y, count), (of_x, _) = (contrastive.class_sums(z, labels) for z in (y, x))
            aligned = (dot(x, of_y) + dot(y, of_x)) / (2 * count)
            loss = (rows + columns) / 2 - aligned * scale
    if label_smoothing:
        loss = loss + label_smoothing * scale * (aligned - (dot(x, _mean(y, ring)) + dot(y, _mean(x, ring))) / 2)
    return loss, sums


@torch.no_grad()
def _metrics(
    x: Tensor, y: Tensor, scale: Tensor, negatives: list[list[Sums]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The shares of rows whose positive is above the largest negative, for each set of these; and what pairs give."""
    x, y = (t.detach().to(accumulate_dtype(t.dtype)) for t in (x, y))
    similarity = dot(x, y)
    distance = (x - y).square().sum(1)
    metrics = {"positive_similarity": similarity.mean(), "alignment": distance.mean()}
    accuracies = [(similarity * scale > _largest(sums)).float().mean() for sums in negatives]
    return accuracies, {name: value.float() for name, value in metrics.items()}
