"""The softmax loss of pairs of images and texts."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastssl import reference
from fastssl._arithmetic import as_scalar, finish, of_reference
from fastssl._checks import (
    check_flag,
    check_group,
    check_labels,
    check_pair,
    check_reduction,
    check_scalar,
    check_share,
)
from fastssl.distributed import ProcessGroup, Ring
from fastssl.functional.contrastive.pairs import pair_loss, pair_metrics
from fastssl.ops import current_backend
from fastssl.ops._precision import product_precision


@overload
def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, *, labels: Tensor | None = ...,
    label_smoothing: float = ..., reduction: str = ..., return_metrics: Literal[False] = ...,
    group: ProcessGroup | None = ...,
) -> Tensor: ...

@overload
def clip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, *, labels: Tensor | None = ...,
    label_smoothing: float = ..., reduction: str = ..., return_metrics: Literal[True], group: ProcessGroup | None = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...


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
    r"""The symmetric softmax loss of CLIP (arXiv:2103.00020); with labels, that of UniCL (arXiv:2204.03610).

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
        return_metrics: also return the metrics that people log; they cost no further product.
        group: processes that each hold B pairs of one batch: the images and texts of all of them are a pair's
            negatives. None: this process alone. All must call this function and its backward pass, with the same
            arguments except for the features. The texts travel from one process to the next (`fastssl.distributed`):
            none holds the whole batch. Labels are those of all processes' pairs; every process holds the labels of the
            whole batch, and a sum of rows for each that occurs.

    Returns:
        0-d loss, or with "none" (B,) losses, in image_features' dtype, float32 under autocast. The mean over an empty
        batch is NaN. With return_metrics, (loss, metrics); the metrics are detached 0-d float32 tensors:
        "image_accuracy" and "text_accuracy", the shares of images and of texts whose own partner is more similar than
        any other (not with labels); "positive_similarity", the mean `<image_i, text_i>`; "alignment", the mean
        `|image_i - text_i|^2` (arXiv:2005.10242).

        With a group, the loss (and metrics) of this process's pairs. The mean over the processes of their mean losses
        is that of one process on the whole batch. The gradients of the features are those of the sum of the processes'
        losses, and each process gets a share of the gradient of logit_scale: averaged over the processes, as
        DistributedDataParallel does, the gradients of parameters are those of one process on the whole batch. There are
        no second derivatives.

    Raises:
        TypeError: if features or labels are no tensors, or logit_scale neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, or logit_scale is a number that is not finite, or on every
            process, if those of group differ in shapes, dtypes or requires_grad.
    """
    image_features, text_features = check_pair(image_features, text_features, "image_features", "text_features")
    logit_scale = check_scalar("logit_scale", logit_scale, image_features)
    label_smoothing = check_share("label_smoothing", label_smoothing)
    return_metrics = check_flag("return_metrics", return_metrics)
    check_reduction(reduction)
    if labels is not None:
        check_labels(labels, image_features, "image_features")
    check_group(group)
    if current_backend() == "reference":
        result = reference.contrastive.clip_loss(
            image_features, text_features, logit_scale, labels=labels, label_smoothing=label_smoothing,
            reduction=reduction, return_metrics=return_metrics,
        )  # fmt: skip
        return of_reference(result, image_features)
    scale, precision = as_scalar(logit_scale, image_features), product_precision(image_features)
    ring = None
    if group is not None:
        some = scale.new_empty(0, dtype=torch.int64) if labels is None else labels  # that all processes have, or none
        ring = Ring(group, image_features=image_features, text_features=text_features, logit_scale=scale, labels=some)
    loss, sums = pair_loss(image_features, text_features, scale, labels, label_smoothing, reduction, precision, ring)
    loss = finish(loss, "none", image_features)
    if not return_metrics:
        return loss
    negatives = [] if labels is not None else [[pair] for pair in sums]
    accuracies, metrics = pair_metrics(image_features, text_features, scale, negatives)
    return loss, {**dict(zip(("image_accuracy", "text_accuracy"), accuracies, strict=False)), **metrics}
