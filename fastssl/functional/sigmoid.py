"""Contrastive losses by sigmoid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import distributed, reference
from fastssl._arithmetic import as_scalar, dot, finish, needs_gradient, of_reference
from fastssl._checks import check_choice, check_group, check_pair, check_scalar
from fastssl.distributed import ProcessGroup, Ring
from fastssl.ops import current_backend, sigmoid
from fastssl.ops._precision import product_precision


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor = 0.0,
    *,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The sigmoid loss of SigLIP (arXiv:2303.15343): each pair of an image and a text is a binary decision of its own.

        loss = -sum_ij log sigmoid(l_ij (logit_scale <image_i, text_j> + logit_bias)),    l_ij = 1 if i = j, else -1

    divided by B for the mean. The B x B logits are never stored: memory is O(B D). Gradients are computed in the
    forward pass, if any are needed.

    Args:
        image_features: (B, D) rows, normalised by the caller; float32, bfloat16, float16 or float64.
        text_features: (B, D), of image_features' dtype and device.
        logit_scale: multiplies the similarities (in SigLIP exp of a parameter): a number, or a 0-d tensor, which
            gets its exact gradient.
        logit_bias: added to the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        reduction: "mean" over the B images, or "sum".
        group: processes that each hold B pairs of one batch: each image is paired with the texts of all of them. What
            is returned, and how it is differentiated, is as in `clip_loss`.

    Returns:
        0-d loss in image_features' dtype, float32 under autocast. The mean over an empty batch is NaN.

    Raises:
        TypeError: if features are no tensors, or logit_scale or logit_bias neither number nor tensor.
        ValueError: if shapes, dtypes or devices do not fit, logit_scale or logit_bias is a number that is not finite,
            or reduction is unknown, or on every process, if those of group differ in shapes, dtypes or requires_grad.
    """
    image_features, text_features = check_pair(image_features, text_features, "image_features", "text_features")
    logit_scale = check_scalar("logit_scale", logit_scale, image_features)
    logit_bias = check_scalar("logit_bias", logit_bias, image_features)
    check_choice("reduction", reduction, ("mean", "sum"))
    check_group(group)
    if current_backend() == "reference":
        loss = reference.sigmoid.siglip_loss(
            image_features, text_features, logit_scale, logit_bias, reduction=reduction
        )
        return of_reference(loss, image_features)
    scale, bias = as_scalar(logit_scale, image_features), as_scalar(logit_bias, image_features)
    batch = image_features.shape[0]
    inputs, precision = (image_features, text_features, scale, bias), product_precision(image_features)
    if group is None:
        loss, *_ = sigmoid.siglip_loss(*inputs, needs_gradient(*inputs), precision)
    else:
        names = "image_features", "text_features", "logit_scale", "logit_bias"
        ring = Ring(group, **dict(zip(names, inputs, strict=True)))
        own = torch.arange(batch, device=image_features.device)
        positive = dot(image_features, text_features) * scale + bias
        loss = distributed.sigmoid.similarity_softplus(ring, *inputs, own, precision) - F.logsigmoid(positive).sum()
    return finish(loss / batch if reduction == "mean" else loss, "none", image_features)
