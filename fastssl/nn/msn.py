"""MSN's loss as a module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl._checks import (
    check_compatible,
    check_gather_distributed,
    check_number,
    check_positive_number,
    check_rows,
    check_size,
    renamed,
)
from fastssl.distributed import all_processes
from fastssl.functional import ibot_loss, sinkhorn_center


class MSNLoss(nn.Module):
    """The loss of Masked Siamese Networks (arXiv:2204.07141): anchors predict their targets' sharpened assignments to
    prototypes, and all prototypes are used. It takes the place of lightly's class of this name.

    Attributes: as the arguments.

    Args:
        temperature: of the assignments, positive.
        sinkhorn_iterations: of Sinkhorn-Knopp on the targets' assignments; 0: none.
        regularization_weight: of the anchors' mean entropy.
        gather_distributed: let Sinkhorn-Knopp see the targets of all processes.

    Raises:
        TypeError, ValueError: if an argument is of another type or out of its range, or gather_distributed is True and
            torch.distributed is not available.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = check_positive_number("temperature", temperature)
        self.sinkhorn_iterations = check_size("sinkhorn_iterations", sinkhorn_iterations)
        self.regularization_weight = check_number("regularization_weight", regularization_weight)
        self.gather_distributed = check_gather_distributed(gather_distributed)

    def forward(
        self, anchors: Tensor, targets: Tensor, prototypes: Tensor, target_sharpen_temperature: float = 0.25
    ) -> Tensor:
        """The mean loss over the anchors.

        Args:
            anchors: (V B, D) embeddings of V views of each image, the first views of all images first.
            targets: (B, D) embeddings, which get no gradient.
            prototypes: (K, D).
            target_sharpen_temperature: of the targets' assignments, which are taken to the power of its inverse.

        Returns:
            0-d loss, in anchors' dtype, float32 under autocast.

        Raises:
            TypeError, ValueError: if tensors or numbers do not fit.
        """
        named = {"anchors": anchors, "targets": targets, "prototypes": prototypes}
        for name, x in named.items():
            check_rows(name, x, "(K, D)" if name == "prototypes" else "(B, D)")
            if x.shape[1] != anchors.shape[1]:
                shapes = f"{tuple(anchors.shape)} and {tuple(x.shape)}"
                raise ValueError(f"anchors and {name} must have the same number of features, got {shapes}")
            check_compatible("anchors", anchors, name, x)
        if not prototypes.shape[0]:
            raise ValueError(f"prototypes must have at least one row, got shape {tuple(prototypes.shape)}")
        if not targets.shape[0] or anchors.shape[0] % targets.shape[0]:
            counts = f"{anchors.shape[0]} and {targets.shape[0]}"
            raise ValueError(f"anchors must be a multiple of targets in number, got {counts}")
        sharpening = check_positive_number("target_sharpen_temperature", target_sharpen_temperature)
        anchors, targets, prototypes = (F.normalize(x, dim=1) for x in (anchors, targets, prototypes))
        logits = F.linear(anchors, prototypes)
        with torch.no_grad():
            # Sinkhorn-Knopp starts from probabilities: their logarithms, at temperature 1.
            codes = (F.linear(targets, prototypes).float() / (self.temperature * sharpening)).log_softmax(1)
            center = None
            if self.sinkhorn_iterations:
                group = all_processes() if self.gather_distributed else None
                center = sinkhorn_center(codes, temperature=1.0, iterations=self.sinkhorn_iterations, group=group)
            codes = codes.to(logits.dtype).repeat(anchors.shape[0] // targets.shape[0], 1)
        with renamed(student_temperature="temperature"):
            loss = ibot_loss(
                logits, codes, student_temperature=self.temperature, teacher_temperature=1.0, center=center
            )
        if self.regularization_weight > 0:
            mean = (logits / self.temperature).softmax(1, dtype=torch.float32).mean(0)
            # As x^-x does, 0 counts nothing.
            loss = loss + self.regularization_weight * (math.log(len(mean)) + torch.xlogy(mean, mean).sum())
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, sinkhorn_iterations={self.sinkhorn_iterations}"
