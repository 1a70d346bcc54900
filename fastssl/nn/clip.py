"""The losses of CLIP and SigLIP as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl._arithmetic import as_scalar, cross_entropy, dot, finish, logsumexp
from fastssl._checks import check_pair, check_scalar
from fastssl._exponential_sums import row_sums
from fastssl.distributed import (
    ProcessGroup,
    Ring,
    default_group,
    mean_over_processes,
    with_mean_gradient,
    with_scaled_gradient,
)
from fastssl.functional import clip_loss, siglip_loss
from fastssl.ops._precision import product_precision

_IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """The softmax loss of CLIP (arXiv:2103.00020). It takes the place of open_clip's class of this name.

    In several processes, each with a part of the batch, the texts travel from process to process: none holds the whole
    batch, and each computes only its share of the loss. The flags choose:

    - local_loss False: every process returns the loss of the whole batch. True: it returns that of its own pairs.
    - gather_with_grad True: the gradients of the features are those of the sum of the processes' losses, so that the
      averaged gradients of parameters are exact. False: they are those of this process's loss; without local_loss they
      are too small by a factor of the number of processes, with local_loss the other processes' rows are constants.

    The gradient of logit_scale is open_clip's; where both flags are True, it is on every process their mean.

    Attributes: as the arguments.

    Args:
        local_loss: see above.
        gather_with_grad: see above.
        cache_labels: without effect: there are no labels to store.
        rank: of this process.
        world_size: the number of processes; 1 for this one alone.
        use_horovod: must be False.

    Raises:
        ValueError: if use_horovod is True.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(f"use_horovod must be False, processes talk by torch.distributed, got {use_horovod}")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss.

        Args:
            image_features: (B, D) rows, normalised by the caller; float32, bfloat16, float16 or float64.
            text_features: (B, D), of image_features' dtype and device.
            logit_scale: multiplies the similarities: a number or a tensor of one element.
            logit_bias: added to all similarities, which does not change the loss: its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            0-d loss in image_features' dtype, float32 under autocast.

        Raises:
            TypeError, ValueError: as `fastssl.functional.clip_loss`, and if rank and world_size are not those of
                torch.distributed's default group.
        """
        scale = _element(logit_scale)
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, scale)
        else:
            group = default_group(self.rank, self.world_size)
            if self.local_loss and not self.gather_with_grad:
                loss = _against_constants(image_features, text_features, scale, group)
            else:
                loss = self._across(image_features, text_features, scale, group)
        if isinstance(logit_bias, Tensor):
            loss = loss + (0 * _element(logit_bias)).to(loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def _across(self, image: Tensor, text: Tensor, scale: float | Tensor, group: ProcessGroup) -> Tensor:
        if isinstance(scale, Tensor):
            scale = with_mean_gradient(scale, group)
        if not self.gather_with_grad:
            image, text = (with_scaled_gradient(x, 1 / self.world_size) for x in (image, text))
        loss = clip_loss(image, text, scale, group=group)
        return loss if self.local_loss else mean_over_processes(loss, group)

    def extra_repr(self) -> str:
        return (
            f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, rank={self.rank},"
            f" world_size={self.world_size}"
        )


class SigLipLoss(nn.Module):
    """The sigmoid loss of SigLIP (arXiv:2303.15343). It takes the place of open_clip's class of this name.

    In several processes, each with a part of the batch, the texts travel from process to process. A process returns the
    loss of its images with all texts. The gradients of the features are those of the sum of the processes' losses, so
    that the averaged gradients of parameters are exact.

    Attributes: as the arguments.

    Args:
        cache_labels: without effect, there are no labels to store.
        rank: of this process.
        world_size: the number of processes; 1 for none but this one.
        dist_impl: "bidir", "shift", "reduce" or "gather", which all give the same numbers, and here are one and the
            same; None: "bidir".

    Raises:
        ValueError: if dist_impl is unknown.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in _IMPLEMENTATIONS:
            raise ValueError(f"dist_impl must be one of {', '.join(map(repr, _IMPLEMENTATIONS))}, got {dist_impl!r}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of all pairs, divided by B.

        Args:
            image_features: (B, D) rows, normalised by the caller; float32, bfloat16, float16 or float64.
            text_features: (B, D), of image_features' dtype and device.
            logit_scale: multiplies the similarities: a number or a tensor of one element.
            logit_bias: added to the similarities: a number or a tensor of one element; None: 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            0-d loss in image_features' dtype, float32 under autocast.

        Raises:
            TypeError, ValueError: as `fastssl.functional.siglip_loss`, and if rank and world_size are not those of
                torch.distributed's default group.
        """
        group = None if self.world_size == 1 else default_group(self.rank, self.world_size)
        bias = 0.0 if logit_bias is None else _element(logit_bias)
        loss = siglip_loss(image_features, text_features, _element(logit_scale), bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, dist_impl={self.dist_impl!r}"


def _element(scalar: float | Tensor) -> float | Tensor:
    """A tensor of one element as a 0-d tensor."""
    return scalar.reshape(()) if isinstance(scalar, Tensor) and scalar.numel() == 1 else scalar


def _against_constants(image: Tensor, text: Tensor, logit_scale: float | Tensor, group: ProcessGroup) -> Tensor:
    """CLIP's loss of this process's pairs, all rows on the other side being constants."""
    check_pair(image, text, "image_features", "text_features")
    check_scalar("logit_scale", logit_scale)
    scale, precision = as_scalar(logit_scale, image), product_precision(image)
    ring = Ring(group, image_features=image, text_features=text, logit_scale=scale)
    own = torch.arange(image.shape[0], device=image.device)
    loss = 0
    for rows, columns in ((image, text.detach()), (text, image.detach())):
        negatives = logsumexp(*row_sums(rows, columns, scale, own, precision, ring))
        loss = loss + cross_entropy(negatives, dot(rows, columns) * scale) / 2
    return finish(loss, "mean", image)
