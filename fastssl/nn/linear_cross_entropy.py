"""The cross-entropy of a linear layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl._checks import (
    check_device,
    check_dtype,
    check_flag,
    check_integer,
    check_memory,
    check_positive,
    check_positive_number,
    check_reduction,
    check_rows,
    check_share,
    check_tensor,
)
from fastssl.functional import linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """The last layer of a language model and its cross-entropy, in one. It takes the place of PyTorch's class of this
    name, and loads its state_dict: the layer is `linear`.

    Its weight may be shared with a table of embeddings:

        LinearCrossEntropyLoss(embedding.embedding_dim, embedding.num_embeddings, linear_weight=embedding.weight)

    Attributes: as the arguments, but for in_features, bias and linear_weight, which are those of `linear`.

    Args:
        in_features: D, features of a row.
        num_classes: V, words or classes.
        bias: whether the layer has one.
        device, dtype: of the layer.
        reduction, weight, ignore_index, label_smoothing, temperature, normalize: as of
            `fastssl.functional.linear_cross_entropy`; weight is a buffer, temperature a number.
        linear_weight: (V, D), a parameter that becomes the layer's weight in place of a new one. device and dtype are
            then its own.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind, shape or value.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        normalize: bool = False,
        linear_weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        shape = check_positive("num_classes", num_classes), check_positive("in_features", in_features)
        check_memory("num_classes", shape, 4)
        device = check_device(device)
        check_dtype("dtype", dtype)
        check_flag("bias", bias)
        check_reduction(reduction)
        if weight is not None:
            check_tensor("weight", weight)
            if weight.shape != shape[:1]:
                raise ValueError(f"weight must have shape ({num_classes},), got {tuple(weight.shape)}")
        self.num_classes = num_classes
        self.reduction = reduction
        self.ignore_index = None if ignore_index is None else check_integer("ignore_index", ignore_index)
        self.label_smoothing = check_share("label_smoothing", label_smoothing)
        self.temperature = check_positive_number("temperature", temperature)
        self.normalize = check_flag("normalize", normalize)
        self.register_buffer("weight", weight)
        if linear_weight is None:
            self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
            return
        check_rows("linear_weight", linear_weight, "(num_classes, in_features)")
        if not isinstance(linear_weight, nn.Parameter):
            raise TypeError(f"linear_weight must be a Parameter, got {type(linear_weight).__name__}")
        if tuple(linear_weight.shape) != shape:
            raise ValueError(f"linear_weight must have shape {shape}, got {tuple(linear_weight.shape)}")
        self.linear = nn.Linear(in_features, num_classes, bias=False, device="meta")
        self.linear.weight = linear_weight
        if bias:
            self.linear.bias = nn.Parameter(linear_weight.new_zeros(num_classes))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: (..., in_features).
            target: labels (...), int64, or distributions (..., num_classes).

        Returns:
            As `fastssl.functional.linear_cross_entropy`.

        Raises:
            TypeError, ValueError, IndexError: as `fastssl.functional.linear_cross_entropy`.
        """
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            temperature=self.temperature,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, reduction={self.reduction!r}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, temperature={self.temperature}, normalize={self.normalize}"
        )
