"""The cross-entropy of a linear layer over a vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl import distributed, reference
from fastssl._arithmetic import finish, inverse, needs_gradient, of_reference
from fastssl._checks import (
    DTYPES,
    check_compatible,
    check_flag,
    check_group,
    check_integer,
    check_positive_temperature,
    check_reduction,
    check_rows,
    check_same_device,
    check_share,
    check_tensor,
)
from fastssl.distributed import ProcessGroup, check_alike
from fastssl.ops import current_backend
from fastssl.ops import linear_cross_entropy as ops
from fastssl.ops._precision import accumulate_dtype, product_precision


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 1.0,
    normalize: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""`F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`, the last layer and the loss of
    language models in one. It takes the place of PyTorch's function of this name.

    Logits are computed for some rows at a time, and never stored as a whole: no memory grows with N V. Rows without a
    label take no part in any product (on CUDA they take part as zeros: to leave them out would make the CPU wait). With
    "mean" and "sum" the forward pass takes the gradients, too, while it has the logits: three products in all, two
    where input or linear_weight needs no gradient. With "none", in float16, under torch.compile and with group it is
    one more: the backward pass computes the logits again. And on a CPU one more where linear_weight's gradient
    would take more than 256 MiB in float32 beside the one that is returned, as of 128,256 words x 1,024 in bfloat16.

    Args:
        input: (..., D) features, for instance (B, L, D) of B texts of L tokens; float32, bfloat16, float16 or float64.
        linear_weight: (V, D), a row for each of V words or classes, of input's dtype and device; maybe the table of
            embeddings.
        target: labels, int64 of shape (...), from 0 to below V, or ignore_index; or floating-point distributions
            (..., V), which get their exact gradient.
        linear_bias: (V,), added to the logits, of input's dtype and device.
        weight: (V,), of classes, as of `F.cross_entropy`: a constant, of any floating-point dtype. None: 1.
        reduction: "mean", which divides by the sum of the labels' class weights, with distributions by the number of
            rows; "sum"; or "none".
        ignore_index: a label that says that there is none. None: -100. It means nothing with distributions.
        label_smoothing: from 0 to 1: how much of a target is spread over all classes.
        temperature: positive, divides the logits before the bias: a number or a 0-d tensor, which gets its exact
            gradient.
        normalize: the rows of input and linear_weight are scaled to unit length: logits are cosines over the
            temperature, as in wav2vec 2.0 and HuBERT.
        group: processes that share out the words: linear_weight, linear_bias and weight have the rows of this one's,
            those of rank 0 first, any number of them; input and target are the same on all, and labels count through
            all words. All get the same loss, the exact gradients of their own rows, and all the gradient of input.

    Returns:
        0-d loss, or (...) with reduction "none", 0 where there is no label; in input's dtype, float32 under autocast.
        The mean over no label is NaN, and its gradients are 0.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes, dtypes or devices do not fit, label_smoothing is not from 0 to 1, temperature is a number
            that is not finite and positive (a tensor that is not positive makes the loss NaN), reduction is unknown,
            or with group target is not of labels; or on every process, if input or target differ in shape or dtype.
        IndexError: on the CPU, if a label is neither from 0 to below V nor ignore_index. On CUDA an assertion stops the
            process.
    """
    check_layer(input, linear_weight, linear_bias)
    soft = _check_target(target, input, len(linear_weight))
    if weight is not None:
        _check_vector("weight", weight, linear_weight)
    check_reduction(reduction)
    ignore_index = -100 if ignore_index is None else check_integer("ignore_index", ignore_index)
    label_smoothing = check_share("label_smoothing", label_smoothing)
    temperature = check_positive_temperature("temperature", temperature, input)
    normalize = check_flag("normalize", normalize)
    check_group(group)
    if group is not None and soft:
        raise ValueError("target must be labels with group, got distributions")
    if current_backend() == "reference":
        return _of_reference(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            temperature=temperature,
            normalize=normalize,
        )
    dtype, (classes, dim) = accumulate_dtype(input.dtype), linear_weight.shape
    x = input.reshape(-1, dim)
    y = target.reshape(-1, classes) if soft else target.reshape(-1)
    bias = linear_weight.new_empty(0) if linear_bias is None else linear_bias
    scale = inverse(temperature, input).reshape(1)
    class_weight = None if weight is None else weight.detach().to(dtype)
    if group is not None:
        check_alike(group, {"input": x, "target": y})
        arguments = x, linear_weight, bias, y, scale, class_weight, label_smoothing, ignore_index, normalize
        shared = distributed.linear_cross_entropy.linear_cross_entropy
        loss, weights = shared(group, *arguments, product_precision(input))
        if reduction == "mean":
            loss = loss.sum() / weights.sum()
        return finish(loss.view(input.shape[:-1]) if reduction == "none" else loss.sum(), "none", input)
    if class_weight is not None and reduction == "mean" and not soft:  # a quotient of two sums of them
        class_weight = class_weight / class_weight.abs().amax().clamp_min(torch.finfo(dtype).tiny)
    row_weight, nothing = None, 0.0
    if reduction != "none":
        row_weight, nothing = _row_weights(x, y, class_weight, classes, ignore_index, reduction)
    inputs = x, linear_weight, bias, scale
    taken = needs_gradient(*inputs, target) and row_weight is not None and _takes(x, linear_weight, bias)
    flags = taken, taken and (x.requires_grad or scale.requires_grad), taken and linear_weight.requires_grad
    arguments = x, linear_weight, bias, y, scale, class_weight, row_weight, label_smoothing
    precision = product_precision(input)
    if soft:
        derive_target = taken and target.requires_grad
        loss, *_ = ops.linear_soft_cross_entropy(*arguments, normalize, *flags, derive_target, precision)
    else:
        loss, *_ = ops.linear_cross_entropy(*arguments, ignore_index, normalize, *flags, precision)
    return finish(loss.view(input.shape[:-1]) if reduction == "none" else loss + nothing, "none", input)


def _takes(*inputs: Tensor) -> bool:
    """Whether the forward pass is to take the gradients. The backward pass does where it would not use what was taken,
    see `ops/_derivative.py`, and in float16, which may not hold gradients before a loss scale multiplies them."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not traced and all(x.dtype != torch.float16 for x in inputs)


def _row_weights(
    x: Tensor, target: Tensor, class_weight: Tensor | None, classes: int, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | float]:
    """What each row's loss is multiplied by, and what is added to their sum: NaN where there is no label."""
    dtype = accumulate_dtype(x.dtype)
    if target.is_floating_point():
        ones = x.new_ones(len(x), dtype=dtype)
        return (ones, 0.0) if reduction == "sum" else (ones / max(len(x), 1), 0.0 if len(x) else math.nan)
    known = target != ignore_index
    if reduction == "sum":
        return known.to(dtype), 0.0
    if class_weight is None:
        total = known.sum().to(dtype)
    else:
        total = class_weight[target.where(known, 0).clamp(0, classes - 1)].where(known, 0).sum()
    nothing = torch.full_like(total, math.nan).where(~known.any(), 0)
    return (1 / total).expand(len(x)).where(known, 0), nothing


def check_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    check_tensor("input", input)
    check_rows("input", input, "(..., D)", max(input.dim(), 1))
    check_rows("linear_weight", linear_weight, "(V, D)")
    if linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            "input and linear_weight must have as many features, got"
            f" {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if len(linear_weight) == 0:
        raise ValueError(f"linear_weight must have at least one row, got shape {tuple(linear_weight.shape)}")
    check_compatible("input", input, "linear_weight", linear_weight)
    if linear_bias is not None:
        _check_vector("linear_bias", linear_bias, linear_weight)
        check_compatible("input", input, "linear_bias", linear_bias)


def _check_vector(name: str, vector: Tensor, linear_weight: Tensor) -> None:
    check_tensor(name, vector)
    if vector.dtype not in DTYPES:
        raise ValueError(f"{name} must have a floating-point dtype of 16, 32 or 64 bits, got {vector.dtype}")
    if vector.shape != linear_weight.shape[:1]:
        rule = f"must have shape ({len(linear_weight)},), as linear_weight has rows"
        raise ValueError(f"{name} {rule}, got {tuple(vector.shape)}")
    check_same_device(name, vector, "linear_weight", linear_weight)


def _check_target(target: Tensor, input: Tensor, classes: int) -> bool:
    """Whether it is of distributions."""
    check_tensor("target", target)
    soft = target.is_floating_point()
    if target.dtype not in (torch.int64, *DTYPES):
        raise ValueError(f"target must be int64, or floating-point of 16, 32 or 64 bits, got {target.dtype}")
    expected = (*input.shape[:-1], classes) if soft else tuple(input.shape[:-1])
    if tuple(target.shape) != expected:
        what = "distributions" if soft else "labels"
        raise ValueError(f"target must have shape {expected}, of {what}, got {tuple(target.shape)}")
    check_same_device("target", target, "input", input)
    return soft


def _of_reference(input: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
    return of_reference(reference.linear_cross_entropy.linear_cross_entropy(input, *args, **kwargs), input)
