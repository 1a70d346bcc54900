"""SupCon as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl._arithmetic import dot, finish
from fastssl._checks import (
    check_choice,
    check_divisor,
    check_labels,
    check_rows,
    check_scalar,
    check_temperature,
    check_tensor,
)
from fastssl.functional import similarity_logsumexp, sup_con
from fastssl.ops.contrastive import class_sums


class SupConLoss(nn.Module):
    """Supervised contrastive learning (SupCon, arXiv:2004.11362), or SimCLR (arXiv:2002.05709) without labels.

    It takes the place of the class of this name that the paper's authors published. As that does, it expects
    normalised features, and does not normalise them.

    Attributes: as the arguments.

    Args:
        temperature: divides the similarities.
        contrast_mode: "all": every view is an anchor; "one": only the first view of each sample is.
        base_temperature: the loss is multiplied by temperature / base_temperature.

    Raises:
        TypeError: if a temperature is neither number nor tensor.
        ValueError: if contrast_mode is unknown, or a temperature zero or not finite.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        check_choice("contrast_mode", contrast_mode, ("all", "one"))
        check_divisor("temperature", temperature)
        check_divisor("base_temperature", base_temperature)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: None = None) -> Tensor:
        """The mean loss. A view without positives has loss 0.

        Args:
            features: (B, V, ...) rows, V views of each sample, what follows being flattened; float32, bfloat16,
                float16 or float64.
            labels: (B,) integers, the label of each sample; None: each has its own.
            mask: must be None.

        Returns:
            0-d loss in features' dtype, float32 under autocast.

        Raises:
            TypeError: if features or labels is no tensor.
            ValueError: if shapes, dtypes or devices do not fit, or there is a mask.
        """
        if mask is not None:
            raise ValueError(f"mask must be None, positives are chosen by labels, got {type(mask).__name__}")
        if isinstance(features, Tensor) and features.dim() > 3:
            features = features.flatten(2)
        check_rows("features", features, "(B, V, ...)", 3)
        batch, views = features.shape[:2]
        if labels is None:
            labels = torch.arange(batch, device=features.device)
        else:
            check_tensor("labels", labels)
            if not labels.is_floating_point() and not labels.is_complex():
                labels = labels.reshape(-1).long()
        check_labels(labels, features, "features")
        if self.contrast_mode == "all":
            loss = sup_con(features, labels, temperature=self.temperature, normalize=False)
        else:
            loss = self._of_first_views(features.transpose(0, 1).flatten(0, 1), labels.repeat(views), batch)
        return loss * (self.temperature / check_scalar("base_temperature", self.base_temperature, features))

    def _of_first_views(self, rows: Tensor, labels: Tensor, batch: int) -> Tensor:
        anchors, scale = rows[:batch], 1 / check_temperature(self.temperature, rows)
        lse = similarity_logsumexp(anchors, rows, scale=scale, exclude=torch.arange(batch, device=rows.device))
        sums, count = (t[:batch] for t in class_sums(rows, labels))
        aligned = (dot(anchors, sums) - dot(anchors, anchors)) / (count - 1).clamp_min(1)
        return finish((lse - aligned * scale).where(count > 1, 0), "mean", rows)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r},"
            f" base_temperature={self.base_temperature}"
        )
