"""One function per loss or operation: the face of the package.

Every function checks its arguments before any kernel runs, follows `torch.set_float32_matmul_precision`
and autocast for the precision of its products, and sums in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import reference
from fastssl._checks import (
    check_alike,
    check_batch,
    check_eps,
    check_features,
    check_group,
    check_ids,
    check_labels,
    check_negatives,
    check_number,
    check_pair,
    check_reduction,
    check_rows,
    check_scalar,
    check_share,
    check_size,
    check_temperature,
    check_tensors,
    check_vector,
)
from fastssl.distributed import ProcessGroup, Ring, gather_rows, mean_over_processes
from fastssl.ops import contrastive, correlation, current_backend, ema, masking, sigmoid
from fastssl.ops._precision import accumulate_dtype, autocast_enabled, product_precision

__all__ = [
    "barlow_twins",
    "clip_loss",
    "correlation_algorithm",
    "covariance_loss",
    "cross_correlation",
    "dcl",
    "ema_update_",
    "gather_tokens",
    "info_nce",
    "nt_xent",
    "random_masking",
    "random_masking_ids",
    "redundancy_loss",
    "restore_tokens",
    "scatter_tokens",
    "siglip_loss",
    "similarity_logsumexp",
    "sup_con",
    "topk_similarity",
    "uniformity",
    "variance_loss",
    "vicreg",
]

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
    loss, _, _ = contrastive.nt_xent(z1, z2, _inverse(temperature, z1), normalize, product_precision(z1))
    return _finish(loss, reduction, z1)


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
    lse = _logsumexp(*_row_sums(x, y, _scalar(scale, x), exclude, product_precision(x)))
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
    precision, scale = product_precision(query), _inverse(temperature, query)
    q, k, others = (_unit(x) if normalize and x is not None else x for x in (query, positive_key, negative_keys))
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
            sums.append(_sum_exponentials(_dot(q[:, None], others) * scale))
        own = torch.arange(q.shape[0], device=q.device) if in_batch_negatives else None
        if ring is not None:
            sums.append(_row_sums(q, k, scale, own, precision, ring))
        if shared:
            keys = torch.cat(shared) if len(shared) > 1 else shared[0]  # a queue is not to be copied
            sums.append(_row_sums(q, keys, scale, own if ring is None else None, precision))
        similarity = _dot(q, k)
        negatives = [_logsumexp(*pair) for pair in sums] or [torch.full_like(similarity, float("-inf"))]
        loss = _cross_entropy(functools.reduce(torch.logaddexp, negatives), similarity * scale)
        if label_smoothing:
            loss = loss + label_smoothing * scale * (similarity - _dot(q, _mean(k, ring)))
        directions = [sums]
    loss = _finish(loss, reduction, query)
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
    scale, precision = _scalar(logit_scale, image_features), product_precision(image_features)
    ring = None
    if group is not None:
        ring = Ring(group, image_features=image_features, text_features=text_features, logit_scale=scale)
    loss, sums = _pair_loss(image_features, text_features, scale, labels, label_smoothing, precision, ring)
    loss = _finish(loss, reduction, image_features)
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
    scale, precision = _inverse(temperature, features), product_precision(features)
    rows = features
    if views:
        rows, labels = features.flatten(0, 1), labels.repeat_interleave(features.shape[1])
    loss, _, _ = contrastive.sup_con(rows, labels, scale, normalize, precision)
    return _finish(loss.view(features.shape[:-1]), reduction, features)


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
    scale, precision = _inverse(temperature, z1), product_precision(z1)
    x, y = (_unit(z) if normalize else z for z in (z1, z2))
    positive = _dot(x, y) * scale
    own = torch.arange(x.shape[0], device=x.device)
    across = [_logsumexp(*pair) for pair in _pair_sums(x, y, scale, own, precision)]
    losses = []
    for rows, partners, lse in ((x, y, across[0]), (y, x, across[1])):
        within = _logsumexp(*contrastive.self_logsumexp(rows, scale, precision))
        aligned = positive if weight_fn is None else positive * weight_fn(rows, partners)
        losses.append(torch.logaddexp(within, lse) - aligned)
    return _finish(torch.cat(losses), reduction, z1)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The sigmoid loss of SigLIP (arXiv:2303.15343): every pair of an image and a text is a decision of its own.

        loss = -sum_ij log sigmoid(l_ij (logit_scale <image_i, text_j> + logit_bias)),    l_ij = 1 if i = j, else -1

    divided by B for the mean. The B x B logits are never stored: memory is O(B D). Gradients are taken in the
    forward pass, if any is needed.

    Args:
        image_features: (B, D) rows, normalised by the caller; float32, bfloat16, float16 or float64.
        text_features: (B, D), of image_features' dtype and device.
        logit_scale: multiplies the similarities (in SigLIP exp of a parameter): a number, or a 0-d tensor, which
            gets its exact gradient.
        logit_bias: added to the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        reduction: "mean" over the B images, or "sum".
        group: processes that hold B pairs each of one batch: an image's decisions are on the texts of all of them.
            What is returned, and what it is to be differentiated, is as in `clip_loss`.

    Returns:
        0-d loss in image_features' dtype, float32 under autocast. The mean over an empty batch is NaN.

    Raises:
        TypeError: if features are no tensors, or logit_scale or logit_bias neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, logit_scale or logit_bias is a number that is not finite,
            or reduction is unknown, or on every process, if those of group differ in shapes, dtypes or requires_grad.
    """
    check_pair(image_features, text_features, "image_features", "text_features")
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    check_group(group)
    if current_backend() == "reference":
        return reference.sigmoid.siglip_loss(
            image_features, text_features, logit_scale, logit_bias, reduction=reduction
        )
    scale, bias = _scalar(logit_scale, image_features), _scalar(logit_bias, image_features)
    batch = image_features.shape[0]
    inputs, precision = (image_features, text_features, scale, bias), product_precision(image_features)
    if group is None:
        loss, *_ = sigmoid.siglip_loss(*inputs, _needs_gradient(*inputs), precision)
    else:
        names = "image_features", "text_features", "logit_scale", "logit_bias"
        ring = Ring(group, **dict(zip(names, inputs, strict=True)))
        own = torch.arange(batch, device=image_features.device)
        positive = _dot(image_features, text_features) * scale + bias
        loss = ring.similarity_softplus(*inputs, own, precision) - F.logsigmoid(positive).sum()
    return _finish(loss / batch if reduction == "mean" else loss, "none", image_features)


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
    scale = 2 * _scalar(t, x)
    total, shift = contrastive.self_logsumexp(_unit(x), scale, product_precision(x))
    potential = (total / (x.shape[0] - 1)).log() + (shift - scale)  # the logarithm of each row's mean
    peak = potential.detach().logsumexp(0)
    return _finish((potential - peak).exp().mean().log() + peak, "none", x)


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float | Tensor) -> None:
    """Exponential moving average, in place: the teacher of MoCo (arXiv:1911.05722), BYOL (arXiv:2006.07733) and DINO.

        target = momentum target + (1 - momentum) source

    of all pairs in one pass over memory, in float32 arithmetic where both are of 32 or 16 bits.

    Args:
        targets: tensors of any shape, float32, bfloat16, float16 or float64; changed.
        sources: as many, each of its target's shape and device, and of any of those dtypes. From its first element to
            its last, no target may share memory with another tensor, unless source and target are one.
        momentum: from 0, which copies, to 1, which leaves the targets as they are: a number, or a 0-d tensor, whose
            value is not checked and which no GPU waits for.

    Raises:
        TypeError: if a target or a source is no tensor, or momentum neither number nor tensor.
        ValueError: before anything is changed, if numbers, shapes, dtypes or devices do not fit, momentum is a number
            below 0 or above 1, or a target shares memory.
    """
    targets, sources = list(targets), list(sources)
    check_tensors("targets", targets)
    check_tensors("sources", sources)
    if isinstance(momentum, Tensor):
        check_scalar("momentum", momentum)
    else:
        check_share("momentum", momentum)
    if current_backend() == "reference":
        ema.check_pairs(targets, sources)
        reference.ema.ema_update_(targets, sources, momentum)
        return
    momentum = torch.as_tensor(momentum, dtype=torch.float64)
    devices = {x.device for x in (*targets, *sources)}
    if len(devices) < 2:
        ema.ema_update_(targets, sources, momentum)
    else:
        ema.check_pairs(targets, sources)
        for device in devices:
            on_device = [[x for x in tensors if x.device == device] for tensors in (targets, sources)]
            ema.ema_update_(*on_device, momentum)
    torch.autograd.graph.increment_version(targets)


def random_masking_ids(
    batch: int,
    length: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of each sample stay, drawn at random (MAE, arXiv:2111.06377).

    One seed is drawn from the generator; what follows from it is the same on every device.

    Args:
        batch: B, the number of samples.
        length: L, the number of tokens of each.
        mask_ratio: the share that is masked, from 0 to 1: int(L (1 - mask_ratio)) stay.
        generator: the source of randomness; None: PyTorch's default one of the CPU.
        device: of the result; None: the generator's.

    Returns:
        ids_keep (B, L_keep) int64, the tokens that stay, in random order; mask (B, L) float32, 1 where a token is
        masked, else 0; ids_restore (B, L) int64, the inverse of the permutation that begins with ids_keep.

    Raises:
        TypeError: if mask_ratio is no number, or batch or length no integer.
        ValueError: if mask_ratio is not from 0 to 1, or batch or length is negative.
    """
    check_size("batch", batch)
    check_size("length", length)
    check_share("mask_ratio", mask_ratio)
    if batch * length >= 1 << 62:
        raise ValueError(f"batch x length must be below 2^62, got {batch} x {length}")
    source = generator.device if generator is not None else "cpu"
    seed = torch.randint(1 << 62, (), generator=generator, device=source).to(device or source)
    ids_keep, ids_restore, mask = masking.masking_ids(seed, batch, length, int(length * (1 - mask_ratio)))
    return ids_keep, mask, ids_restore


def random_masking(
    x: Tensor, mask_ratio: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a random part of the tokens of each sample (MAE, arXiv:2111.06377).

    Args:
        x: (B, L, D) tokens; float32, bfloat16, float16 or float64.
        mask_ratio: the share that is masked, from 0 to 1: int(L (1 - mask_ratio)) stay.
        generator: the source of randomness; None: PyTorch's default one of the CPU. The same seed draws the same masks
            on every device. torch.compile cannot trace one.

    Returns:
        The triple of the paper's code: x_visible (B, L_keep, D), the tokens that stay, in random order; mask (B, L)
        float32, 1 where a token is masked, else 0; ids_restore (B, L) int64, for `restore_tokens`.

    Raises:
        TypeError: if x is no tensor, or mask_ratio no number.
        ValueError: if x's shape or dtype does not fit, or mask_ratio is not from 0 to 1.
    """
    check_rows("x", x, "(B, L, D)", 3)
    batch, length, _ = x.shape
    ids_keep, mask, ids_restore = random_masking_ids(batch, length, mask_ratio, generator=generator, device=x.device)
    return gather_tokens(x, ids_keep), mask, ids_restore


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """The tokens of each sample that are named: out[b, k] = x[b, ids[b, k]].

    Args:
        x: (B, L, D) tokens; float32, bfloat16, float16 or float64.
        ids: (B, K) int64 or int32, from 0 to L - 1, in any order, repeated or not.

    Returns:
        (B, K, D) of x's dtype.

    Raises:
        TypeError: if x or ids is no tensor.
        ValueError: if shapes, dtypes or devices do not fit.
        IndexError: on the CPU, if one of ids is below 0 or above L - 1. On CUDA PyTorch's assertion stops the process.
    """
    check_rows("x", x, "(B, L, D)", 3)
    check_ids("ids", ids, x)
    return _implementation("gather_tokens")(x, ids)


def scatter_tokens(tokens: Tensor, ids: Tensor, length: int, fill: float | Tensor = 0.0) -> Tensor:
    """Put tokens in their places: out[b, l] = the sum of tokens[b, k] with ids[b, k] = l, `fill` where there is none.

    Args:
        tokens: (B, K, D); float32, bfloat16, float16 or float64.
        ids: (B, K) int64 or int32, from 0 to length - 1, in any order, repeated or not.
        length: L, the number of places.
        fill: for places that get no token: a number, or a tensor of D elements, which gets its gradient.

    Returns:
        (B, L, D) of tokens' dtype.

    Raises:
        TypeError: if tokens or ids is no tensor, or length no integer.
        ValueError: if shapes, dtypes or devices do not fit, or length is negative.
        IndexError: on the CPU, if one of ids is below 0 or above length - 1. On CUDA PyTorch's assertion stops the
            process.
    """
    check_rows("tokens", tokens, "(B, K, D)", 3)
    check_ids("ids", ids, tokens)
    if ids.shape != tokens.shape[:2]:
        raise ValueError(f"ids must have shape {tuple(tokens.shape[:2])}, one for each token, got {tuple(ids.shape)}")
    check_size("length", length)
    fill = _feature_row("fill", fill, tokens)
    return _implementation("scatter_tokens")(tokens, ids, length, fill)


def restore_tokens(
    x_visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None
) -> Tensor:
    """Undo `random_masking`, as MAE's decoder does (arXiv:2111.06377): tokens back in their places, mask tokens
    between them, and the position embedding added, in one pass.

    Args:
        x_visible: (B, L_keep, D) tokens; float32, bfloat16, float16 or float64.
        ids_restore: (B, L) int64 or int32: place l holds token ids_restore[b, l], and where that is L_keep or above the
            mask token.
        mask_token: D elements, of any shape, such as (1, 1, D).
        pos_embed: L D elements, of any shape, such as (1, L, D); None: none is added.

    Returns:
        (B, L, D) of x_visible's dtype, to which mask_token and pos_embed are converted.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if shapes, dtypes or devices do not fit.
        IndexError: on the CPU, if one of ids_restore is negative. On CUDA PyTorch's assertion stops the process.
    """
    check_rows("x_visible", x_visible, "(B, L_keep, D)", 3)
    check_ids("ids_restore", ids_restore, x_visible)
    length, dim = ids_restore.shape[1], x_visible.shape[2]
    mask_token = _feature_row("mask_token", mask_token, x_visible)
    if pos_embed is not None:
        if not isinstance(pos_embed, Tensor):
            raise TypeError(f"pos_embed must be a Tensor, got {type(pos_embed).__name__}")
        if pos_embed.device != x_visible.device:
            devices = f"{pos_embed.device} and {x_visible.device}"
            raise ValueError(f"pos_embed and x_visible must be on the same device, got {devices}")
        if pos_embed.numel() != length * dim:
            shape = tuple(pos_embed.shape)
            raise ValueError(f"pos_embed must have {length} x {dim} elements, a row for each place, got shape {shape}")
        pos_embed = pos_embed.reshape(length, dim)
    return _implementation("restore_tokens")(x_visible, ids_restore, mask_token, pos_embed)


def _implementation(name: str) -> Callable[..., Tensor]:
    """Of masking, in the backend that is chosen."""
    return getattr(reference.masking if current_backend() == "reference" else masking, name)


def _feature_row(name: str, value: float | Tensor, tokens: Tensor) -> Tensor:
    """(D,), from a number or a tensor of D elements."""
    dim = tokens.shape[2]
    if not isinstance(value, Tensor):
        if name != "fill" or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a Tensor{' or a number' * (name == 'fill')}, got {type(value).__name__}")
        return tokens.new_full((dim,), value)
    if value.numel() != dim:
        raise ValueError(f"{name} must have {dim} elements, one for each feature, got shape {tuple(value.shape)}")
    if value.device != tokens.device:
        raise ValueError(f"{name} and tokens must be on the same device, got {value.device} and {tokens.device}")
    return value.reshape(dim)


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
    x, y = (_unit(t) if normalize else t.to(accumulate_dtype(t.dtype)) for t in (x, y))
    with _without_autocast(x):
        return x @ y.T


def _scalar(scalar: float | Tensor, x: Tensor) -> Tensor:
    """0-d, on x's device, in the dtype of sums."""
    dtype = accumulate_dtype(x.dtype)
    if isinstance(scalar, Tensor):
        return scalar.to(device=x.device, dtype=dtype)
    return torch.full((), scalar, dtype=dtype, device=x.device)


def _inverse(temperature: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return _scalar(temperature, x).reciprocal()
    return _scalar(1 / temperature, x)


def _unit(x: Tensor) -> Tensor:
    """Unit rows, in the dtype of sums."""
    return F.normalize(x.to(accumulate_dtype(x.dtype)), dim=-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Products of rows with rows, in the dtype of sums, under autocast too, where vecdot would not be."""
    dtype = accumulate_dtype(x.dtype)
    return (x.to(dtype) * y.to(dtype)).sum(-1)


def _mean(x: Tensor, ring: Ring | None = None) -> Tensor:
    """The mean row, of all processes in a ring, in the dtype of sums."""
    mean = x.mean(0, dtype=accumulate_dtype(x.dtype))
    return mean if ring is None else mean_over_processes(mean, ring.group)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


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
    weigh = _needs_gradient(x, y, scale)
    return contrastive.similarity_logsumexp(x, y, scale, exclude, weigh, precision)[:2]


def _pair_sums(
    x: Tensor, y: Tensor, scale: Tensor, exclude: Tensor | None, precision: str, ring: Ring | None = None
) -> tuple[Sums, Sums]:
    """Those of the rows, and those of the columns."""
    pair_logsumexp = contrastive.pair_logsumexp if ring is None else ring.pair_logsumexp
    sums = pair_logsumexp(x, y, scale, exclude, precision)
    return sums[:2], sums[2:]


def _logsumexp(total: Tensor, shift: Tensor) -> Tensor:
    some = total != 0  # the gradient of log(0) is NaN
    return total.where(some, 1).log().where(some, float("-inf")) + shift


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
        aligned = _dot(x, y) if label_smoothing else None
    else:
        own = torch.arange(x.shape[0], device=x.device) if labels is None else None
        sums = _pair_sums(x, y, scale, own, precision, ring)
        rows, columns = (_logsumexp(*pair) for pair in sums)
        if labels is None:
            aligned = _dot(x, y)
            loss = (_cross_entropy(rows, aligned * scale) + _cross_entropy(columns, aligned * scale)) / 2
        else:
            (of_y, count), (of_x, _) = (contrastive.class_sums(z, labels) for z in (y, x))
            aligned = (_dot(x, of_y) + _dot(y, of_x)) / (2 * count)
            loss = (rows + columns) / 2 - aligned * scale
    if label_smoothing:
        loss = loss + label_smoothing * scale * (aligned - (_dot(x, _mean(y, ring)) + _dot(y, _mean(x, ring))) / 2)
    return loss, sums


@torch.no_grad()
def _metrics(
    x: Tensor, y: Tensor, scale: Tensor, negatives: list[list[Sums]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The shares of rows whose positive is above the largest negative, for each set of these; and what pairs give."""
    x, y = (t.detach().to(accumulate_dtype(t.dtype)) for t in (x, y))
    similarity = _dot(x, y)
    distance = (x - y).square().sum(1)
    metrics = {"positive_similarity": similarity.mean(), "alignment": distance.mean()}
    accuracies = [(similarity * scale > _largest(sums)).float().mean() for sums in negatives]
    return accuracies, {name: value.float() for name, value in metrics.items()}


def _finish(loss: Tensor, reduction: str, x: Tensor) -> Tensor:
    loss = reference.contrastive.reduce(loss, reduction)
    return loss if autocast_enabled(x) else loss.to(x.dtype)


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambda_param: float = 5e-3,
    eps: float = 1e-5,
    unbiased: bool = False,
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Barlow Twins (arXiv:2103.03230): the views' features shall correlate each with itself, and with no other.

        loss = sum_i (C_ii - 1)^2 + lambda_param sum_{i != j} C_ij^2,    C = A^T B / B_rows,

    A and B being the views' features, standardised over the batch: less their mean, divided by sqrt(variance + eps).
    By default that is `torch.nn.functional.batch_norm`, as in the authors' code; with unbiased=True and eps=0 it is
    Algorithm 1 of the paper. The D x D correlations are never stored, see `correlation_algorithm`: memory is O(B D).

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device.
        lambda_param: the weight of the redundancy. Where it is 0, that need not be computed.
        eps: added to the variances. A feature that is constant over the batch has correlation 0 with all, and with
            an eps of 0 NaN.
        unbiased: divide the variances by B - 1, not by B. C is divided by B in either case.
        return_metrics: also return the loss's parts, at no further product.
        group: processes that hold B rows each of one batch, over which features are standardised and correlated. None:
            this process alone. All must call this, and the backward pass, with the same arguments but for the features.
            The processes exchange their rows where those of all are at most D, and D x D correlations else, which then
            are stored; their products are of the dtype of sums.

    Returns:
        0-d loss in z_a's dtype, float32 under autocast; NaN where z_a or z_b has NaN or Inf. With return_metrics
        (loss, metrics), detached 0-d float32 tensors: "invariance", sum_i (C_ii - 1)^2; "redundancy",
        sum_{i != j} C_ij^2, or 0 where it was not computed.

        With a group, every process's loss (and metrics) is that of the whole batch. Gradients of features are those of
        the sum of the processes' losses: averaged over the processes, as DistributedDataParallel does, gradients of
        parameters are those of one process on the whole batch.

    Raises:
        TypeError: if z_a or z_b is no tensor, or lambda_param or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, lambda_param or eps is not
            finite, eps is negative, or on every process, if those of group differ in shapes, dtypes or requires_grad.
    """
    check_pair(z_a, z_b, "z_a", "z_b")
    check_number("lambda_param", lambda_param)
    check_eps(eps)
    check_group(group)
    check_batch(group, z_a=z_a, z_b=z_b)
    if current_backend() == "reference":
        return reference.correlation.barlow_twins(
            z_a, z_b, lambda_param=lambda_param, eps=eps, unbiased=unbiased, return_metrics=return_metrics
        )
    if _exchanges_rows(z_a, group):
        loss, invariance, redundancy = _barlow_twins(*_gather(group, z_a, z_b), 1.0, lambda_param, eps, unbiased)
    else:
        C = _cross_correlation(z_a, z_b, eps, unbiased, group)
        invariance, redundancy = (C.diagonal() - 1).square().sum(), correlation.off_diagonal_squares(C)
        loss = invariance + lambda_param * redundancy
    return _with_metrics(loss, z_a, return_metrics, invariance=invariance, redundancy=redundancy)


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    eps: float = 1e-4,
    unbiased: bool = True,
    invariance_reduction: str = "mean",
    variance_reduction: str = "mean",
    return_metrics: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""VICReg (arXiv:2105.04906): variance, invariance and covariance of the views' features.

        loss = lambda_param invariance + mu_param variance + nu_param covariance
        invariance = mean (z_a - z_b)^2
        variance   = the mean of the views' mean_i relu(1 - sqrt(Var z_i + eps))
        covariance = the sum of the views' sum_{i != j} Cov(z_i, z_j)^2 / D

    That is the authors' code. The paper's equations sum up the invariance over the features (invariance_reduction
    "batchmean") and the variance over the views (variance_reduction "sum"). The D x D covariances are never stored, see
    `correlation_algorithm`: memory is O(B D).

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device.
        lambda_param: the weight of the invariance.
        mu_param: the weight of the variance.
        nu_param: the weight of the covariance. Where it is 0, that need not be computed.
        eps: added to the variances. With an eps of 0, a feature that is constant over the batch has gradient NaN.
        unbiased: divide variances and covariances by B - 1, not by B.
        invariance_reduction: "mean" over rows and features, or "batchmean": over rows, summed up over features.
        variance_reduction: "mean" or "sum" over the two views.
        return_metrics: also return the loss's parts, at no further product.
        group: processes that hold B rows each of one batch, as in `barlow_twins`.

    Returns:
        0-d loss in z_a's dtype, float32 under autocast; NaN where z_a or z_b has NaN or Inf. With return_metrics
        (loss, metrics), detached 0-d float32 tensors: "invariance", "variance" and "covariance", or 0 where that was
        not computed. With a group they, and what is to be differentiated, are as in `barlow_twins`.

    Raises:
        TypeError: if z_a or z_b is no tensor, or a weight or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, a weight or eps is not
            finite, eps is negative, a reduction is unknown, or on every process, if those of group differ in shapes,
            dtypes or requires_grad.
    """
    check_pair(z_a, z_b, "z_a", "z_b")
    for name, number in (("lambda_param", lambda_param), ("mu_param", mu_param), ("nu_param", nu_param)):
        check_number(name, number)
    check_eps(eps)
    if invariance_reduction not in ("mean", "batchmean"):
        raise ValueError(f"invariance_reduction must be 'mean' or 'batchmean', got {invariance_reduction!r}")
    if variance_reduction not in ("mean", "sum"):
        raise ValueError(f"variance_reduction must be 'mean' or 'sum', got {variance_reduction!r}")
    check_group(group)
    check_batch(group, z_a=z_a, z_b=z_b)
    if current_backend() == "reference":
        return reference.correlation.vicreg(
            z_a, z_b, lambda_param=lambda_param, mu_param=mu_param, nu_param=nu_param, eps=eps, unbiased=unbiased,
            invariance_reduction=invariance_reduction, variance_reduction=variance_reduction,
            return_metrics=return_metrics,
        )  # fmt: skip
    features = z_a.shape[1] if invariance_reduction == "batchmean" else 1
    views = 2 if variance_reduction == "sum" else 1
    weights = lambda_param * features, mu_param * views, nu_param
    vicreg_of = _vicreg if _exchanges_rows(z_a, group) else _vicreg_of_processes
    loss, invariance, variance, covariance = vicreg_of(group, z_a, z_b, *weights, eps, unbiased)
    metrics = {"invariance": invariance * features, "variance": variance * views, "covariance": covariance}
    return _with_metrics(loss, z_a, return_metrics, **metrics)


def covariance_loss(z: Tensor, *, unbiased: bool = True) -> Tensor:
    r"""VICReg's covariance term of one view (arXiv:2105.04906): sum_{i != j} Cov(z_i, z_j)^2 / D.

    Args:
        z: (B, D) embeddings, B >= 2; float32, bfloat16, float16 or float64.
        unbiased: divide the covariances by B - 1, not by B.

    Returns:
        0-d loss in z's dtype, float32 under autocast; NaN where z has NaN or Inf.

    Raises:
        TypeError: if z is no tensor.
        ValueError: if its shape or dtype does not fit, or it has one row or none.
    """
    check_rows("z", z, "(B, D)")
    check_batch(None, z=z)
    if current_backend() == "reference":
        return reference.correlation.covariance_loss(z, unbiased=unbiased)
    return _variance_covariance(z, 0.0, 1.0, 1.0, unbiased)  # with this eps no deviation is below 1


def variance_loss(z: Tensor, *, eps: float = 1e-4, unbiased: bool = True) -> Tensor:
    r"""VICReg's variance term of one view (arXiv:2105.04906): mean_i relu(1 - sqrt(Var z_i + eps)).

    Args:
        z: (B, D) embeddings, B >= 2; float32, bfloat16, float16 or float64.
        eps: added to the variances. With an eps of 0, a feature that is constant over the batch has gradient NaN.
        unbiased: divide the variances by B - 1, not by B.

    Returns:
        0-d loss in z's dtype, float32 under autocast; NaN where z has NaN or Inf.

    Raises:
        TypeError: if z is no tensor, or eps no number.
        ValueError: if its shape or dtype does not fit, it has one row or none, or eps is not finite or negative.
    """
    check_rows("z", z, "(B, D)")
    check_eps(eps)
    check_batch(None, z=z)
    if current_backend() == "reference":
        return reference.correlation.variance_loss(z, eps=eps, unbiased=unbiased)
    return _variance_covariance(z, 1.0, 0.0, eps, unbiased)


def redundancy_loss(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> Tensor:
    r"""The redundancy term of Barlow Twins (arXiv:2103.03230): sum_{i != j} C_ij^2, C as in `barlow_twins`.

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device; or z_a itself.
        eps: added to the variances.
        unbiased: divide the variances by B - 1, not by B.

    Returns:
        0-d loss in z_a's dtype, float32 under autocast; NaN where z_a or z_b has NaN or Inf.

    Raises:
        TypeError: if z_a or z_b is no tensor, or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, or eps is not finite or
            negative.
    """
    check_pair(z_a, z_b, "z_a", "z_b")
    check_eps(eps)
    check_batch(None, z_a=z_a, z_b=z_b)
    if current_backend() == "reference":
        return reference.correlation.redundancy_loss(z_a, z_b, eps=eps, unbiased=unbiased)
    return _finish(_barlow_twins(z_a, z_b, 0.0, 1.0, eps, unbiased)[0], "none", z_a)


def cross_correlation(
    z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, unbiased: bool = False, group: ProcessGroup | None = None
) -> Tensor:
    r"""The cross-correlations of the views' features that `barlow_twins` is a loss of: C = A^T B / B_rows.

    It is stored, and made of one product in the dtype of sums, by PyTorch. Derivatives are PyTorch's own.

    Args:
        z_a: (B, D) embeddings of the first views, B >= 2; float32, bfloat16, float16 or float64.
        z_b: (B, D) embeddings of the second views, of z_a's dtype and device.
        eps: added to the variances.
        unbiased: divide the variances by B - 1, not by B.
        group: processes that hold B rows each of one batch, as in `barlow_twins`.

    Returns:
        (D, D) correlations in z_a's dtype, float32 under autocast; with a group, those of the whole batch.

    Raises:
        TypeError: if z_a or z_b is no tensor, or eps no number.
        ValueError: if shapes, dtypes or devices do not fit, the batch has one row or none, eps is not finite or
            negative, or on every process, if those of group differ in shapes, dtypes or requires_grad.
    """
    check_pair(z_a, z_b, "z_a", "z_b")
    check_eps(eps)
    check_group(group)
    check_batch(group, z_a=z_a, z_b=z_b)
    return _finish(_cross_correlation(z_a, z_b, eps, unbiased, group), "none", z_a)


def correlation_algorithm(batch: int, dim: int) -> str:
    """Which of two algorithms `barlow_twins`, `vicreg`, `covariance_loss` and `redundancy_loss` run.

    The sum of the squares of A^T B, which is D x D, is the product of A A^T and B B^T, which are B x B, element by
    element. Where the batch is smaller than the features are many, that ("dual") costs a share of about B / D of the
    product that is written down; else the D x D correlations are made block by block, for the loss and its gradients
    alike ("primal"). dual subtracts the diagonal from a sum with it, to which its rounding errors are relative. Towards
    B = D the diagonal may be nearly all of the sum, so dual runs where 4 B <= 3 D. There it still is, where few
    features vary and those do not correlate: `redundancy_loss` and `covariance_loss`, tiny then, have few digits.

    Args:
        batch: B, the number of rows, of all processes in a group that exchanges them.
        dim: D, the number of features.

    Returns:
        "dual" or "primal".
    """
    return "dual" if 4 * batch <= 3 * dim else "primal"


def _barlow_twins(
    z_a: Tensor, z_b: Tensor, invariance_param: float, lambda_param: float, eps: float, unbiased: bool
) -> tuple[Tensor, ...]:
    """(loss, invariance, redundancy)"""
    options = invariance_param, lambda_param, eps, unbiased, correlation_algorithm(*z_a.shape) == "dual"
    return correlation.barlow_twins(z_a, z_b, *options, _needs_gradient(z_a, z_b), product_precision(z_a))[:3]


def _vicreg(
    group: ProcessGroup | None,
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, ...]:
    """(loss, invariance, variance, covariance)"""
    z_a, z_b = _gather(group, z_a, z_b)
    options = lambda_param, mu_param, nu_param, eps, unbiased, correlation_algorithm(*z_a.shape) == "dual"
    return correlation.vicreg(z_a, z_b, *options, _needs_gradient(z_a, z_b), product_precision(z_a))[:4]


def _vicreg_of_processes(
    group: ProcessGroup,
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float,
    mu_param: float,
    nu_param: float,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, ...]:
    """The same, of processes that exchange their shares of the D x D covariances."""
    dtype = accumulate_dtype(z_a.dtype)
    invariance = mean_over_processes((z_a.to(dtype) - z_b.to(dtype)).square().mean(), group)
    centered = [_center(z, group) for z in (z_a, z_b)]
    correction = _correction(z_a, unbiased, group)
    covariances = (_correlate(x, x, group) * correction for x in centered)
    covariance = sum(correlation.off_diagonal_squares(C) for C in covariances) / z_a.shape[1]
    variances = (_mean_square(x, group) * correction for x in centered)
    variance = sum(F.relu(1 - (x + eps).sqrt()).mean() for x in variances) / 2
    loss = lambda_param * invariance + mu_param * variance + nu_param * covariance
    return loss, invariance, variance, covariance


def _variance_covariance(z: Tensor, mu_param: float, nu_param: float, eps: float, unbiased: bool) -> Tensor:
    options = mu_param, nu_param, eps, unbiased, correlation_algorithm(*z.shape) == "dual"
    loss, *_ = correlation.variance_covariance(z, *options, _needs_gradient(z), product_precision(z))
    return _finish(loss, "none", z)


def _exchanges_rows(z: Tensor, group: ProcessGroup | None) -> bool:
    """Whether the rows of all processes are a smaller message than D x D correlations."""
    return group is None or z.shape[0] * group.size() <= z.shape[1]


def _gather(group: ProcessGroup | None, *views: Tensor) -> tuple[Tensor, ...]:
    return views if group is None else tuple(gather_rows(z, group) for z in views)


def _center(z: Tensor, group: ProcessGroup | None) -> Tensor:
    """z less the means of its columns over all processes, in the dtype of sums."""
    if group is None:
        return correlation.center(z)
    z = z.to(accumulate_dtype(z.dtype))
    shifted = z - mean_over_processes(z[:1].detach(), group)  # nearly exact where a column is constant
    return shifted - mean_over_processes(shifted.mean(0), group)


def _standardize(z: Tensor, eps: float, unbiased: bool, group: ProcessGroup | None) -> Tensor:
    centered = _center(z, group)
    variance = _mean_square(centered, group) * _correction(z, unbiased, group)
    return centered * (variance + eps).rsqrt()


def _mean_square(x: Tensor, group: ProcessGroup | None) -> Tensor:
    mean = x.square().mean(0)
    return mean if group is None else mean_over_processes(mean, group)


def _correction(z: Tensor, unbiased: bool, group: ProcessGroup | None) -> float:
    """What a mean over the rows of all processes is to be multiplied by."""
    rows = z.shape[0] * (1 if group is None else group.size())
    return rows / (rows - unbiased)


def _correlate(a: Tensor, b: Tensor, group: ProcessGroup | None) -> Tensor:
    """The mean over the rows of all processes of the products of each two columns, under autocast too."""
    with _without_autocast(a):
        product = a.T @ b / a.shape[0]
    return product if group is None else mean_over_processes(product, group)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else contextlib.nullcontext()


def _cross_correlation(z_a: Tensor, z_b: Tensor, eps: float, unbiased: bool, group: ProcessGroup | None) -> Tensor:
    a, b = (_standardize(z, eps, unbiased, group) for z in (z_a, z_b))
    return _correlate(a, b, group)


def _with_metrics(
    loss: Tensor, x: Tensor, return_metrics: bool, **metrics: Tensor
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    loss = _finish(loss, "none", x)
    return (loss, {name: metric.detach().float() for name, metric in metrics.items()}) if return_metrics else loss
